"""A result of the ledger as one HTML page that stands alone: words first, then figures and tables.

`write_report` needs matplotlib (the `simulator` extra); the same result gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError


def write_report(result: Mapping[str, Any], file: Path) -> None:
    """Raises UserError where matplotlib is missing or the file cannot be written."""
    try:
        from simulator.report.page import page
    except ImportError as error:
        raise UserError(
            f"The report needs matplotlib ({error}).", "Install it: pip install 'dynamollm[simulator]'."
        ) from None
    try:
        file.write_text(page(result), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}.", "Name another folder with --out.") from None
