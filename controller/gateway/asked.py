"""What a request asks for, read from its body: only what the gateway itself needs; the rest is the engine's to judge.

Both ways in (own HTTP server, Envoy) read requests here, so that they refuse and classify alike.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from controller.gateway.classify import PromptSize, output_limit, prompt_size
from controller.gateway.refusal import Refusal
from controller.predictor.features import prompt_texts, request_features
from controller.predictor.port import Features

# Text up to this length is counted whole (tokens.py), so that engines' counts of it teach something.
EXACT_CHARACTERS = 750
GENERATING = ("/v1/completions", "/v1/chat/completions")


@dataclass(frozen=True, slots=True)
class Asked:
    """`texts` are the prompt's, for counting tokens; `features` what predictors see (input tokens not yet counted)."""

    target: str  # one of GENERATING
    model: str
    prompt: PromptSize
    texts: tuple[str, ...]
    messages: int  # of a chat
    output_limit_tokens: int | None
    stream: bool
    usage_wanted: bool
    features: Features

    @property
    def chat(self) -> bool:
        return self.features.route == "chat"

    def briefly(self) -> Asked:
        """What is kept while the request runs: all but the text of a long prompt (megabytes for a thousand of them)."""
        return self if sum(map(len, self.texts)) <= EXACT_CHARACTERS else replace(self, texts=())


def read_request(target: str, body: bytes, served: Sequence[str], tenant: str = "") -> Asked:
    """Refusal says what is wrong with the body. `served`: models there are; empty while none are known."""
    try:
        parsed: Any = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal(400, "invalid_json", "The request body is not valid JSON.") from None
    if not isinstance(parsed, dict):
        raise Refusal(400, "invalid_json", "The request body must be a JSON object.")
    model = _model(parsed.get("model"), served)
    wanted = "messages" if target.endswith("/chat/completions") else "prompt"
    if wanted not in parsed:
        raise Refusal(400, "missing_field", f"{wanted} is required.", param=wanted)
    asked = {**parsed}
    asked.pop("prompt" if wanted == "messages" else "messages", None)
    try:
        size = prompt_size(asked)
        limit = output_limit(asked)
        texts = prompt_texts(asked)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "invalid_value", f"{str(error) or 'The prompt is nested too deeply'}.") from None
    stream = parsed.get("stream") or False
    if not isinstance(stream, bool):
        raise Refusal(400, "invalid_value", "stream must be true or false.", param="stream")
    options = parsed.get("stream_options")
    return Asked(
        target=target,
        model=model,
        prompt=size,
        texts=tuple(texts),
        messages=len(asked["messages"]) if wanted == "messages" else 0,
        output_limit_tokens=limit,
        stream=stream,
        usage_wanted=isinstance(options, dict) and options.get("include_usage") is True,
        features=request_features(asked, 0, limit, texts, model, tenant),
    )


def _model(name: object, served: Sequence[str]) -> str:
    if name is None and len(served) == 1:
        return served[0]
    if not isinstance(name, str) or not name:
        raise Refusal(400, "missing_field", "model is required.", param="model")
    if served and name not in served:
        message = f"The model {name[:100]!r} is not served here; served: {', '.join(served)}."
        raise Refusal(404, "model_not_found", message, param="model")
    return name
