"""An engine's command line: vLLM's `serve`, on this node's terms. Also its port, and what a specification must be."""

from __future__ import annotations

import re
import socket
from collections.abc import Set
from contextlib import suppress

from nodeagent.config import EngineConfig
from nodeagent.engine.records import Spec
from nodeagent.errors import Invalid, Precondition

_VLLM_MEMORY_SHARE = 0.92
"""vLLM's default since 0.32 (0.90 before); an engine takes it whole, whatever its weights need."""


def check_spec(spec: Spec) -> None:
    """Raises Invalid for a specification nobody could start."""
    if not re.fullmatch(r"[a-z0-9-]{1,63}", spec.instance_id):
        raise Invalid(f"instance_id {spec.instance_id!r} is not of [a-z0-9-]{{1,63}}")
    # A model that looks like an option would become one on the command line.
    if not spec.model or spec.model.startswith("-") or len(spec.model) > 1024 or "\0" in spec.model:
        raise Invalid("model is not a model's name")
    if not spec.gpu_uuids:
        raise Invalid("gpu_uuids is empty")
    if len(set(spec.gpu_uuids)) != len(spec.gpu_uuids):
        raise Invalid("gpu_uuids names a GPU twice")


def command_line(spec: Spec, port: int, config: EngineConfig) -> tuple[str, ...]:
    """`COMMAND serve MODEL --tensor-parallel-size N --host H --port P ARGS`."""
    path = config.model_paths.get(spec.model)
    return (
        *config.command,
        *("serve", path or spec.model),
        *(("--served-model-name", spec.model) if path else ()),
        *("--tensor-parallel-size", str(len(spec.gpu_uuids))),
        *("--host", config.listen_host),
        *("--port", str(port)),
        *(("--enable-sleep-mode",) if config.sleep_mode else ()),
        *config.args,
    )


def environment(spec: Spec, config: EngineConfig) -> dict[str, str]:
    """What an engine is told by its environment."""
    dev_mode = {"VLLM_SERVER_DEV_MODE": "1"} if config.sleep_mode else {}
    return dev_mode | config.env | {"CUDA_VISIBLE_DEVICES": ",".join(spec.gpu_uuids)}


def memory_share(config: EngineConfig) -> float:
    """The share of each GPU's memory that an engine takes: its --gpu-memory-utilization."""
    share = _VLLM_MEMORY_SHARE
    for index, argument in enumerate(config.args):
        name, _, value = argument.replace("_", "-").partition("=")
        if name == "--gpu-memory-utilization":
            text = value or "".join(config.args[index + 1 : index + 2])
            with suppress(ValueError):
                share = float(text)
    return share


def free_port(in_use: Set[int], config: EngineConfig) -> int:
    """A port that can be bound now; raises Precondition when the configured range has none left."""
    if config.first_port == 0:
        return _bindable(config.listen_host, 0)
    for port in range(config.first_port, config.first_port + config.port_count):
        if port not in in_use and _bindable(config.listen_host, port):
            return port
    last = config.first_port + config.port_count - 1
    raise Precondition(f"no free port from {config.first_port} to {last} for another engine")


def _bindable(host: str, port: int) -> int:
    """The port (for 0, the one the kernel chose), or 0 if it cannot be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return 0
        return int(probe.getsockname()[1])
