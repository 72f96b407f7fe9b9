"""Where a study's jobs run: in processes of this machine, or on a Ray cluster when one is asked for.

A job is a plain function of picklable values, and what it returns depends on nothing else; so a study comes out the
same wherever and on however many workers it ran.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, Protocol

from common.errors import UserError

LOCAL = "local"


class Workers(Protocol):
    """The one thing that is asked of an executor."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]: ...


@contextmanager
def open_workers(processes: int, ray: str | None = None) -> Iterator[Workers]:
    """Processes here, or with `ray` the cluster at that address ("local": one of its own, of `processes` cores)."""
    if ray is not None:
        with _open_ray(processes, ray) as cluster:
            yield cluster
        return
    # Spawned, not forked: the caller may be a program with threads.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        try:
            yield pool
        except BaseException:
            # What has not begun must not keep the caller waiting.
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class RayWorkers:
    """Every job as a Ray task of one core. The project must be installed on all machines, at the same version, and
    trace files must lie under the same path."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        found: Future[Any] = self._ray.remote(num_cpus=1)(function).remote(*arguments).future()
        return found


@contextmanager
def _open_ray(processes: int, address: str) -> Iterator[RayWorkers]:
    try:
        import ray
    except ImportError:
        raise UserError(
            "--ray needs Ray, which is not installed.", "Install it (pip install 'dynamollm[ray]'), or leave --ray out."
        ) from None
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address == LOCAL:
            ray.init(num_cpus=processes, include_dashboard=False, **options)
        else:
            ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"--ray {address}: {error}", "Check that the cluster runs, or use --ray local.") from None
    try:
        yield RayWorkers(ray)
    finally:
        ray.shutdown()
