"""Mutual TLS: whether its files can be used, for servers too, and gRPC channels of a program that calls others.

A renewed certificate counts from the next channel on: `stamps` tells when the files have changed.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import grpc
from pydantic import Field, model_validator

from common.config import ConfigModel
from common.errors import UserError
from common.logs import get_logger

log = get_logger(__name__)
Stub = TypeVar("Stub")


class ClientTls(ConfigModel):
    """Certificates for calls to others. All three or none."""

    ca: str = Field(default="", description="Authority that signed the others' certificates, PEM.")
    cert: str = Field(default="", description="Own certificate, PEM: its name decides what the others allow.")
    key: str = Field(default="", description="Its private key, PEM.")

    @property
    def on(self) -> bool:
        return bool(self.ca)

    @model_validator(mode="after")
    def _whole(self) -> ClientTls:
        given = [bool(value) for value in (self.ca, self.cert, self.key)]
        if any(given) and not all(given):
            raise ValueError("ca, cert and key belong together; set all of them or none")
        return self


def check_files(tls: ClientTls, where: str) -> None:
    """`check_pem` for a section of a configuration; no TLS is right as well."""
    if tls.on:
        check_pem({f"{where}.ca": tls.ca}, {f"{where}.cert": tls.cert}, {f"{where}.key": tls.key})


def check_pem(authority: dict[str, str], certificate: dict[str, str], key: dict[str, str]) -> None:
    """Each argument is one setting's name and the path it gives.

    Raises UserError for a file that cannot be read, is no PEM, or a key that is not the certificate's.
    """
    (ca_name, ca), (cert_name, cert), (_, key_path) = (next(iter(one.items())) for one in (authority, certificate, key))
    for name, path in (authority | certificate | key).items():
        try:
            Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"{name}: {path}: {error.strerror}.", "Check the path and its permissions.") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cafile=ca)
    except ssl.SSLError:
        raise UserError(f"{ca_name}: {ca}: holds no certificate in PEM form.", "Name the authority's file.") from None
    try:
        context.load_cert_chain(cert, key_path, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        reason = str(getattr(error, "reason", None) or error).lower().replace("_", " ")
        raise UserError(
            f"{cert_name}: {cert} and {key_path} do not work together: {reason}.",
            "Name a certificate and its own private key, both PEM and without a password.",
        ) from None


def channel_credentials(tls: ClientTls) -> grpc.ChannelCredentials:
    """Raises UserError when a file cannot be read."""
    try:
        ca, key, cert = (Path(path).read_bytes() for path in (tls.ca, tls.key, tls.cert))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}.", "Check the certificate files.") from None
    return grpc.ssl_channel_credentials(ca, key, cert)


def open_channel(
    address: str, tls: ClientTls | None, name: str = "", options: Sequence[tuple[str, Any]] = ()
) -> grpc.aio.Channel:
    """A channel with the certificates as they are now, a plain one without `tls`.

    `name`: what the server's certificate says where that is not its address. Raises UserError.
    """
    if tls is None:
        return grpc.aio.insecure_channel(address, options=[*options])
    named = [("grpc.ssl_target_name_override", name)] if name else []
    return grpc.aio.secure_channel(address, channel_credentials(tls), options=[*options, *named])


class Renewing(Generic[Stub]):
    """A stub whose channel is made anew once the certificates were renewed."""

    def __init__(
        self,
        stub: Callable[[grpc.aio.Channel], Stub],
        address: str,
        tls: ClientTls | None,
        name: str = "",
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        """As `open_channel`; a unix socket needs no TLS. Raises UserError."""
        self._make, self._address, self._name, self._options = stub, address, name, options
        self._tls = tls if tls is not None and tls.on and not address.startswith("unix:") else None
        self._open()

    def _open(self) -> None:
        self._stamps = stamps(self._tls) if self._tls is not None else ()
        self._channel = open_channel(self._address, self._tls, self._name, self._options)
        self.stub = self._make(self._channel)

    async def renew(self, grace_s: float) -> None:
        """For when a connection broke. Files that cannot be used are logged, and the old channel stays."""
        if self._tls is None or stamps(self._tls) in ((), self._stamps):
            return
        before = self._channel
        try:
            self._open()
        except UserError as error:
            log.error("certificate_unreadable", address=self._address, detail=str(error))
            return
        log.info("certificate_renewed", address=self._address)
        await before.close(grace=grace_s)

    async def close(self) -> None:
        await self._channel.close()


def stamps(tls: ClientTls) -> tuple[int, ...]:
    """Changes when one of the files does; empty while one is missing."""
    try:
        return tuple(Path(path).stat().st_mtime_ns for path in (tls.ca, tls.cert, tls.key))
    except OSError:
        return ()
