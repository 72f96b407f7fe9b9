"""Where a study's jobs run: in processes of this machine, or on a Ray cluster when one is asked for.

A job is a plain function of picklable values, and what it returns depends on nothing else; so a study comes out the
same wherever and on however many workers it ran.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
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
    with open_processes(processes) as pool:
        yield pool


@contextmanager
def open_processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes that live no longer than the caller's interest in them, or the caller."""
    others = set(active_children())
    # Spawned, not forked: the caller may be a program with threads.
    with ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        try:
            yield pool
        except BaseException:
            # Neither what has not begun nor what runs must keep the caller waiting.
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(active_children()) - others:
                process.terminate()
            raise


def end_with_parent() -> None:
    """In a worker process: Ctrl-C ends it at once, and so does the end of its parent, however that came about."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_wait_for_parent, name="wait-for-parent", daemon=True).start()


def _wait_for_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


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
