"""Who may send requests: API keys from a file of names and hashes, so that a copy of the file lets nobody in.

A line is `NAME SHA256`, as `dynamollm-gateway new-key NAME` prints it. The file is read again when it changes; while it
is broken, the keys that were read last stay in force. Without a file everybody may send.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from common.errors import UserError
from common.logs import get_logger
from controller.gateway.refusal import Refusal

_log = get_logger(__name__)
_LINE = re.compile(r"([A-Za-z0-9._-]{1,64})\s+([0-9a-f]{64})")
BEARER = "bearer "


def hash_of(key: str) -> str:
    """Keys are long and random, so one round is enough: there is nothing to guess."""
    return hashlib.sha256(key.encode(errors="replace")).hexdigest()


def is_line(text: str) -> bool:
    """Whether a line of the file would be taken."""
    return _LINE.fullmatch(text) is not None


class Access:
    """`path` None: open to all."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._names: dict[str, str] = {}
        self._changed_ns = 0
        if path is not None:
            self._changed_ns = _changed_ns(path)
            self._names = _read(path)

    @property
    def checks(self) -> bool:
        return self._path is not None

    def tenant(self, authorization: str, claimed: str = "") -> str:
        """Name of the key in an Authorization header; Refusal without a valid one. Where no keys are asked for,
        `claimed` (a header that a trusted proxy sets) is believed."""
        if self._path is None:
            return claimed[:64]
        if not authorization.lower().startswith(BEARER):
            raise Refusal(401, "missing_api_key", "An API key is needed: Authorization: Bearer KEY.")
        name = self._names.get(hash_of(authorization[len(BEARER) :].strip()))
        if name is None:
            raise Refusal(401, "invalid_api_key", "The API key is not known here.")
        return name

    def refresh(self) -> None:
        """Reads the file again when it has changed; to be called now and then."""
        if self._path is None:
            return
        try:
            changed_ns = _changed_ns(self._path)
            if changed_ns == self._changed_ns:
                return
            self._changed_ns = changed_ns
            self._names = _read(self._path)
        except UserError as error:
            _log.error("api_keys_not_read", reason=error.args[0], kept=len(self._names))
            return
        _log.info("api_keys_read", keys=len(self._names))


def _changed_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return -1


def _read(path: Path) -> dict[str, str]:
    """Names by hash."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(
            f"access.keys_file: {path} cannot be read: {reason}.", "Check its path, owner and mode."
        ) from None
    names: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise UserError(
                f"access.keys_file: {path}, line {number} is not NAME SHA256.",
                "Make lines with: dynamollm-gateway new-key NAME.",
            )
        names[match[2]] = match[1]
    return names
