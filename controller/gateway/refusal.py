"""An answer of our own in place of an engine's, in OpenAI's form: raised anywhere, sent by whoever faces the client."""

from __future__ import annotations

import json
from math import ceil


class Refusal(Exception):
    """`code` is one of OpenAI's or an Outcome."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> bytes:
        return error_body(self.status, self.code, self.message, self.param)


def too_late(retry_after_s: float) -> Refusal:
    """By the emergency ladder: for a request whose first token can no longer come in time."""
    return Refusal(
        503,
        "too_late",
        "The service is overloaded: the first token can no longer come in time.",
        retry_after_s=max(1, ceil(retry_after_s)),
    )


def error_body(status: int, code: str, message: str, param: str | None = None) -> bytes:
    """An error as OpenAI's clients understand it."""
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode()
