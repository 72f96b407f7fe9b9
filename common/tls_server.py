"""The serving side of mutual TLS over gRPC: credentials that follow renewed files, and the names of who calls.

Used by the daemons that serve gRPC; what each name may do is theirs to say.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc

from common.errors import EXIT_UNAVAILABLE, UserError
from common.logs import get_logger

_log = get_logger(__name__)


def server_credentials(cert: str, key: str, client_ca: str, hint: str) -> grpc.ServerCredentials:
    """Mutual TLS from these files; a renewed certificate is taken up without a restart.

    Raises UserError, with `hint` for what to do, when a file cannot be read.
    """
    paths = [Path(key), Path(cert), Path(client_ca)]

    def load() -> grpc.ServerCertificateConfiguration:
        private, certificate, authority = (path.read_bytes() for path in paths)
        return grpc.ssl_server_certificate_configuration([(private, certificate)], authority)

    def stamps() -> list[int]:
        return [path.stat().st_mtime_ns for path in paths]

    try:
        seen, current = stamps(), load()
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}.", hint, EXIT_UNAVAILABLE) from None

    first = current

    def renewed() -> grpc.ServerCertificateConfiguration:
        nonlocal seen, current
        try:
            now = stamps()
            if now != seen:
                seen, current = now, load()
        except OSError as error:
            _log.error("certificate cannot be read again; the old one is served", why=str(error))
        return current

    return grpc.dynamic_ssl_server_credentials(first, renewed, require_client_authentication=True)


def names_of(auth: Mapping[str, Any]) -> list[str]:
    """The names on a caller's certificate, alternative names first, from gRPC's `auth_context`."""
    return [
        value.decode("utf-8", "replace")
        for key in ("x509_subject_alternative_name", "x509_common_name")
        for value in auth.get(key, ())
    ]


def stays_here(target: str) -> bool:
    """Whether a gRPC listening address can be reached from this machine only: a unix socket or loopback."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    host = target.rpartition(":")[0].removeprefix("ipv4:").removeprefix("ipv6:").removeprefix("[").removesuffix("]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
