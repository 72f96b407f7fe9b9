"""Errors that are meant for people: what is wrong, where, and what to do.

Command-line programs run their main function under `exit_on_user_error`: a `UserError` becomes one line on
stderr and exit code 2 (bad input) or the code it names; anything else is a defect and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_BAD_INPUT = 2
EXIT_UNAVAILABLE = 3
EXIT_ALREADY_RUNNING = 4


class UserError(Exception):
    """Something the person at the terminal can mend.

    `message` is one sentence that says what is wrong and where; `hint` says what to do.
    """

    def __init__(self, message: str, hint: str = "", exit_code: int = EXIT_BAD_INPUT) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


@contextmanager
def exit_on_user_error(program: str) -> Iterator[None]:
    """Turns a `UserError` into one line on stderr and its exit code."""
    try:
        yield
    except UserError as error:
        print(f"{program}: {error}", file=sys.stderr)  # noqa: T201 - the one place that speaks to the terminal
        raise SystemExit(error.exit_code) from None
