"""A result of the ledger as one HTML page that stands alone: words first, then figures and tables.

`write_report` needs matplotlib (the `simulator` extra); the same result gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError


def write_report(result: Mapping[str, Any], file: Path) -> None:
    """Raises UserError where matplotlib is missing or the file cannot be written."""
    text = page_maker()(result)
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}.", "Name another folder with --out.") from None


def page_maker() -> Callable[[Mapping[str, Any]], str]:
    """What makes the page; to be asked for before minutes of work. Raises UserError where matplotlib is missing."""
    try:
        from simulator.report.page import page
    except ImportError as error:
        raise UserError(
            f"The report needs matplotlib ({error}).",
            "Install it (pip install 'dynamollm[simulator]'), or leave --out out.",
        ) from None
    return page
