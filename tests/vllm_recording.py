"""What is asked of a real vLLM and of the emulated one, and how an answer is reduced to what must be the same.

`scripts/record-vllm` asks the real server and writes vllm_metrics.json and vllm_http.json; the contract tests ask the
emulator and compare. Standard library only: the recording script runs outside the project's environment.
"""

from __future__ import annotations

import http.client
import json
import re
from typing import Any

MODEL = "tiny"
MAX_MODEL_LEN = 2048

_PROMPT = {"model": MODEL, "prompt": [5, 6, 7, 8], "ignore_eos": True}
_CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "ignore_eos": True}
_USAGE = {"stream": True, "stream_options": {"include_usage": True}}
_COMPLETIONS, _CHATS = "/v1/completions", "/v1/chat/completions"

# By name: path and body; None asks with GET, bytes are sent as they are.
EXCHANGES: dict[str, tuple[str, Any]] = {
    "version": ("/version", None),
    "models": ("/v1/models", None),
    "completion": (_COMPLETIONS, _PROMPT | {"max_tokens": 3}),
    "completion streamed": (_COMPLETIONS, _PROMPT | {"max_tokens": 3, "stream": True}),
    "completion streamed with usage": (_COMPLETIONS, _PROMPT | {"max_tokens": 3} | _USAGE),
    "completion of one token": (_COMPLETIONS, _PROMPT | {"max_tokens": 1} | _USAGE),
    "completion of a text": (_COMPLETIONS, {"model": MODEL, "prompt": "hi", "max_tokens": 2, "ignore_eos": True}),
    "completion without model": (_COMPLETIONS, {"prompt": [5, 6], "max_tokens": 2, "ignore_eos": True, "x": 1}),
    "completion cut at the context": (_COMPLETIONS, _PROMPT | {"prompt": [5] * 2040, "max_tokens": 100}),
    "chat": (_CHATS, _CHAT | {"max_tokens": 3}),
    "chat streamed": (_CHATS, _CHAT | {"max_completion_tokens": 3, "stream": True}),
    "chat streamed with usage": (_CHATS, _CHAT | {"max_tokens": 3} | _USAGE),
    "unknown model": (_COMPLETIONS, _PROMPT | {"model": "nope"}),
    "broken JSON": (_COMPLETIONS, b'{"model":"tiny","prompt":"hello there","max_tokens":3'),
    "negative max_tokens": (_COMPLETIONS, _PROMPT | {"max_tokens": -3}),
    "no max_tokens left": (_COMPLETIONS, _PROMPT | {"max_tokens": 0}),
    "max_tokens of another type": (_COMPLETIONS, _PROMPT | {"max_tokens": "x"}),
    "no prompt": (_COMPLETIONS, {"model": MODEL, "max_tokens": 3}),
    "empty prompt": (_COMPLETIONS, _PROMPT | {"prompt": ""}),
    "no tokens": (_COMPLETIONS, _PROMPT | {"prompt": []}),
    "prompt too long": (_COMPLETIONS, _PROMPT | {"prompt": [5] * 2100, "max_tokens": 10}),
    "prompt fills the context": (_COMPLETIONS, _PROMPT | {"prompt": [5] * 2048, "max_tokens": 3}),
    "stream options without stream": (_COMPLETIONS, _PROMPT | {"stream_options": {"include_usage": True}}),
    "no messages": (_CHATS, {"model": MODEL, "max_tokens": 3}),
    "empty conversation": (_CHATS, {"model": MODEL, "messages": [], "max_tokens": 3}),
    "unknown path": ("/nothere", None),
    "wrong method": (_COMPLETIONS, None),
}

# Values that are the same in every answer and part of the contract; of others only the type is.
_LITERAL = ("object", "finish_reason", "role", "owned_by", "index", "max_model_len")
# The emulator's additions.
_VENDOR = re.compile(r"emulated_\w+")


def ask(port: int, path: str, body: Any) -> tuple[int, str, bytes]:
    """Status, content type and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        if body is None:
            connection.request("GET", path)
        else:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request("POST", path, data, {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.getheader("content-type", ""), answer.read()
    finally:
        connection.close()


def record(port: int, name: str) -> dict[str, Any]:
    """One exchange, reduced."""
    status, content_type, body = ask(port, *EXCHANGES[name])
    answer: Any = events(body) if content_type.startswith("text/event-stream") else json.loads(body)
    return {"status": status, "content_type": content_type, "answer": shape(answer) if status == 200 else answer}


def events(body: bytes) -> list[Any]:
    """The data of server-sent events; JSON where it is JSON."""
    texts = [part.strip().removeprefix("data: ") for part in body.decode().split("\n\n") if part.strip()]
    return [text if text == "[DONE]" else json.loads(text) for text in texts]


def shape(value: Any, key: str = "") -> Any:
    """Types instead of values, except where the value is part of the contract."""
    if isinstance(value, dict):
        return {name: shape(inner, name) for name, inner in value.items() if not _VENDOR.fullmatch(name)}
    if isinstance(value, list):
        return [shape(inner, key) for inner in value]
    if value is None or value == "[DONE]" or key in _LITERAL:
        return value
    return type(value).__name__


def metrics(page: str) -> dict[str, dict[str, Any]]:
    """Type, label names and bucket bounds of every metric that begins with `vllm:`."""
    types = dict(re.findall(r"^# TYPE (vllm:\S+) (\w+)$", page, re.MULTILINE))
    found: dict[str, dict[str, Any]] = {}
    for name, kind in sorted(types.items()):
        if name.endswith("_created"):
            continue  # the client library's own, about when a series began
        suffix = "_bucket" if kind == "histogram" else ""
        samples = re.findall(rf"^{re.escape(name)}{suffix}(?:\{{(.*)\}})? \S+$", page, re.MULTILINE)
        labels = dict(re.findall(r'(\w+)="([^"]*)"', samples[0])) if samples else {}
        found[name] = {"type": kind, "labels": sorted(set(labels) - {"le"})}
        if kind == "histogram":
            bounds = [re.findall(r'le="([^"]*)"', sample)[0] for sample in samples]
            found[name]["bounds"] = list(dict.fromkeys(bounds))
    return found
