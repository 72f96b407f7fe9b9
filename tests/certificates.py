"""Certificates for tests, made with the openssl command: one authority, servers and clients by name."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Pair:
    """A private key and its certificate."""

    key: Path
    cert: Path


class Authority:
    """Signs what it is asked to."""

    def __init__(self, directory: Path, name: str = "test-ca") -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self.pair = Pair(directory / f"{name}.key", directory / f"{name}.pem")
        _openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
            "-subj", f"/CN={name}", "-keyout", str(self.pair.key), "-out", str(self.pair.cert),
        )  # fmt: skip

    def issue(self, name: str, alternative: str = "") -> Pair:
        """A certificate for `name`; `alternative` as openssl spells it: "IP:127.0.0.1", "URI:spiffe://x/y"."""
        pair = Pair(self._directory / f"{name}.key", self._directory / f"{name}.pem")
        request = self._directory / f"{name}.csr"
        _openssl(
            "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", f"/CN={name}",
            "-keyout", str(pair.key), "-out", str(request),
        )  # fmt: skip
        extensions = self._directory / f"{name}.ext"
        extensions.write_text(f"subjectAltName={alternative}\n" if alternative else "basicConstraints=CA:FALSE\n")
        _openssl(
            "x509", "-req", "-in", str(request), "-CA", str(self.pair.cert), "-CAkey", str(self.pair.key),
            "-CAcreateserial", "-days", "2", "-extfile", str(extensions), "-out", str(pair.cert),
        )  # fmt: skip
        return pair


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)
