"""An engine process that speaks vLLM's command line, HTTP API and metrics, and computes on emulated GPUs.

`python -m simulator.host.vllm serve MODEL --tensor-parallel-size N --port P …`. Its step times and power come from
`simulator/physics.py`, its scheduling from `simulator/engine.py`, its GPUs from the host's state file. Like the real
one it binds its port at once, listens only when loaded, and ends in-flight requests with an error on SIGTERM.

Environment: CUDA_VISIBLE_DEVICES (UUIDs or indices), DYNAMOLLM_NVML_STATE (the host's state file),
DYNAMOLLM_EMULATED_START_S (seconds until loaded, default 60), DYNAMOLLM_PHYSICS
([FILE:]VARIANT[+legacy][+prefill-first]).
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from types import FrameType
from typing import Annotated

import typer
import uvicorn
import uvloop

from common.errors import UserError, exit_on_user_error
from common.logs import configure_logs, get_logger
from simulator.engine import DEFAULT_CHUNK_TOKENS, DEFAULT_MAX_RUNNING, Engine
from simulator.host.vllm_api import Api
from simulator.host.vllm_gpus import EXIT_START_FAILED, GpuGroup
from simulator.host.vllm_loop import RealTimeEngine
from simulator.host.vllm_metrics import EngineMetrics
from simulator.host.vllm_sleep import SleepMode
from simulator.physics import Physics

PROGRAM = "vllm"
DEV_MODE_VARIABLE = "VLLM_SERVER_DEV_MODE"
START_VARIABLE = "DYNAMOLLM_EMULATED_START_S"
PHYSICS_VARIABLE = "DYNAMOLLM_PHYSICS"
DEFAULT_START_S = 60.0
_MODEL_CONTEXT_TOKENS = 131_072  # of Llama-3.1-70B

log = get_logger(__name__)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class SchedulingPolicy(StrEnum):
    FCFS = "fcfs"
    PRIORITY = "priority"


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """The options that change what the emulated engine does."""

    model: str
    served_names: tuple[str, ...]
    host: str
    port: int
    tp: int
    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int | None
    gpu_memory_utilization: float
    uvicorn_log_level: str
    sleep_mode: bool
    by_priority: bool


@app.callback()
def _program() -> None:
    """vLLM's command line, as far as it matters to who operates engines; other options are refused."""


@app.command()
def serve(
    model: str,
    host: Annotated[str, typer.Option()] = "0.0.0.0",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    tensor_parallel_size: Annotated[int, typer.Option("--tensor-parallel-size", "-tp", min=1)] = 1,
    served_model_name: Annotated[list[str] | None, typer.Option()] = None,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1)] = DEFAULT_CHUNK_TOKENS,
    max_num_seqs: Annotated[int, typer.Option(min=1)] = DEFAULT_MAX_RUNNING,
    max_model_len: Annotated[str | None, typer.Option(help="Also 16k or auto.")] = None,
    gpu_memory_utilization: Annotated[float, typer.Option(min=0.01, max=1.0)] = 0.92,
    uvicorn_log_level: Annotated[str, typer.Option()] = "info",
    load_format: Annotated[str, typer.Option()] = "auto",
    dtype: Annotated[str, typer.Option()] = "auto",
    seed: Annotated[int, typer.Option()] = 0,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager/--no-enforce-eager")] = False,
    scheduling_policy: Annotated[SchedulingPolicy, typer.Option()] = SchedulingPolicy.FCFS,
    enable_sleep_mode: Annotated[bool, typer.Option("--enable-sleep-mode/--no-enable-sleep-mode")] = False,
    enable_chunked_prefill: Annotated[bool, typer.Option("--enable-chunked-prefill")] = True,
    no_enable_prefix_caching: Annotated[bool, typer.Option("--no-enable-prefix-caching")] = True,
    enable_log_requests: Annotated[bool, typer.Option("--enable-log-requests/--no-enable-log-requests")] = False,
    disable_log_stats: Annotated[bool, typer.Option("--disable-log-stats")] = False,
    disable_uvicorn_access_log: Annotated[
        bool, typer.Option("--disable-uvicorn-access-log/--no-disable-uvicorn-access-log")
    ] = True,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code/--no-trust-remote-code")] = False,
) -> None:
    """Serves MODEL until SIGTERM. Options beyond the engine's size and limits are taken and change nothing."""
    options = ServeOptions(
        model=model,
        served_names=tuple(served_model_name or [model]),
        host=host,
        port=port,
        tp=tensor_parallel_size,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        max_model_len=_length(max_model_len),
        gpu_memory_utilization=gpu_memory_utilization,
        uvicorn_log_level=uvicorn_log_level,
        sleep_mode=enable_sleep_mode and os.environ.get(DEV_MODE_VARIABLE) == "1",
        by_priority=scheduling_policy is SchedulingPolicy.PRIORITY,
    )
    raise SystemExit(run(options, time.monotonic()))


def run(options: ServeOptions, started_s: float) -> int:
    """Binds, loads, serves; the exit code of the process. Raises UserError for what the operator can mend."""
    physics = Physics.from_text(os.environ.get(PHYSICS_VARIABLE, ""))
    gpus = GpuGroup.from_environment(physics, options.tp, os.environ)
    try:
        max_model_len = _context_length(options, physics)
        start_s = _start_seconds()
        try:
            engine = Engine(
                physics,
                options.tp,
                options.max_num_batched_tokens,
                options.max_num_seqs,
                by_priority=options.by_priority,
            )
        except ValueError:
            raise UserError(
                f"--max-num-batched-tokens ({options.max_num_batched_tokens}) is smaller than --max-num-seqs "
                f"({options.max_num_seqs}).",
                "Every sequence needs one token per iteration.",
                EXIT_START_FAILED,
            ) from None
        with _bind(options.host, options.port) as listener:
            port = listener.getsockname()[1]
            gpus.load(options.gpu_memory_utilization)
            log.info("loading", model=options.model, tp=options.tp, physics=physics.variant, seconds=start_s)
            return uvloop.run(_main(options, physics, engine, gpus, max_model_len, listener, port, started_s + start_s))
    finally:
        gpus.release()


async def _main(
    options: ServeOptions,
    physics: Physics,
    engine: Engine,
    gpus: GpuGroup,
    max_model_len: int,
    listener: socket.socket,
    port: int,
    ready_s: float,
) -> int:
    if not await _load_until(ready_s):
        return 0
    gpus.rest()
    metrics = EngineMetrics(engine, options.served_names[0], max_model_len, options.gpu_memory_utilization)
    real_time = RealTimeEngine(engine, gpus, metrics)
    weight_bytes = int(physics.parameters.weight_bytes)
    sleep = SleepMode(real_time, gpus, weight_bytes, os.environ) if options.sleep_mode else None
    api = Api(real_time, metrics, options.served_names, options.model, max_model_len, sleep)
    config = uvicorn.Config(
        api,
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        log_level=options.uvicorn_log_level,
    )
    server = _Server(config, real_time)
    try:
        listener.listen(config.backlog)
    except OSError as error:
        raise _port_taken(options.host, port, error) from None
    compute = asyncio.create_task(real_time.run())
    compute.add_done_callback(lambda _: setattr(server, "should_exit", True))
    log.info("ready", port=port, models=list(options.served_names), max_model_len=max_model_len)
    await server.serve(sockets=[listener])
    await compute  # raises what broke the engine, if anything did
    log.info("stopped", finished=engine.counters.finished, aborted=engine.counters.aborted)
    return 0


class _Server(uvicorn.Server):
    """Ends the engine before the connections: its clients hear an error instead of silence."""

    def __init__(self, config: uvicorn.Config, engine: RealTimeEngine) -> None:
        super().__init__(config)
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._engine.stop()
        self.should_exit = True


async def _load_until(ready_s: float) -> bool:
    """Waits for the end of the emulated start; False when SIGTERM or SIGINT came first."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, ready_s - time.monotonic())):
                await stop.wait()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
    return not stop.is_set()


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: connections are refused until the model is loaded, as with vLLM."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise _port_taken(host, port, error) from None
    return listener


def _port_taken(host: str, port: int, error: OSError) -> UserError:
    return UserError(
        f"cannot listen on {host}:{port}: {error.strerror}.",
        "Stop who holds the port, or choose another with --port.",
        EXIT_START_FAILED,
    )


def _context_length(options: ServeOptions, physics: Physics) -> int:
    """What was asked for, else all that the model and the KV cache of this size can hold."""
    capacity = physics.kv_capacity_tokens(options.tp)
    if options.max_model_len is None:
        return min(_MODEL_CONTEXT_TOKENS, capacity)
    if options.max_model_len > capacity:
        raise UserError(
            f"--max-model-len {options.max_model_len} is larger than the KV cache of {capacity} tokens at "
            f"tensor parallelism {options.tp}.",
            "Lower it, or use more GPUs.",
            EXIT_START_FAILED,
        )
    return options.max_model_len


def _length(text: str | None) -> int | None:
    """vLLM's lengths: 4096, 4k (thousands), 4K (1024s), auto."""
    if text is None or text in ("auto", "-1"):
        return None
    match = re.fullmatch(r"(\d+)([kKmM]?)", text)
    factor = {"": 1, "k": 1000, "K": 1024, "m": 1_000_000, "M": 1024**2}
    if match is None or int(match[1]) == 0:
        raise UserError(f"--max-model-len {text}: not a number of tokens.", "Say for example 16384, 16k or auto.")
    return int(match[1]) * factor[match[2]]


def _start_seconds() -> float:
    text = os.environ.get(START_VARIABLE, "")
    try:
        seconds = float(text) if text else DEFAULT_START_S
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 86_400:
        raise UserError(f"{START_VARIABLE}={text}: not a number of seconds.", "Say for example 60.")
    return seconds


def main() -> None:
    """The process's entry."""
    configure_logs("engine")
    # vLLM takes --max_num_seqs for --max-num-seqs.
    arguments = [re.sub(r"^--[^=]+", lambda m: m[0].replace("_", "-"), argument) for argument in sys.argv[1:]]
    with exit_on_user_error(PROGRAM):
        app(args=arguments, prog_name=PROGRAM)


if __name__ == "__main__":
    main()
