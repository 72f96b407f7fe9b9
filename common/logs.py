"""Structured logs on stderr: one line an event, key=value for people or JSON for collectors."""

from __future__ import annotations

import logging
import sys
from typing import Literal, cast

import structlog

Logger = structlog.stdlib.BoundLogger


def configure_logs(part: str, form: Literal["text", "json"] = "text", level: str = "info") -> None:
    """Sets up logging of one process; `part` stands in every line."""
    renderer: structlog.typing.Processor
    if form == "json":
        renderer = structlog.processors.JSONRenderer()
    elif sys.stderr.isatty():
        renderer = structlog.dev.ConsoleRenderer(pad_event_to=0)
    else:  # a journal or a file: logfmt, which also costs a third of the above
        renderer = structlog.processors.LogfmtRenderer(key_order=("timestamp", "level", "event"), drop_missing=True)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(part=part)


def get_logger(name: str) -> Logger:
    """A logger that carries its module's name."""
    return cast(Logger, structlog.get_logger(module=name))
