"""From a request's body to what predictors see of it: the same for requests being served and for logged ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from controller.predictor.port import Features

# Of a prompt's last text (in a chat: what is being asked now) its beginning and end, of the first text its beginning:
# instructions stand there, and the time to look at a prompt is bounded.
HEAD_CHARACTERS = 1_500
TAIL_CHARACTERS = 500


def prompt_texts(body: Mapping[str, Any]) -> list[str]:
    """All text of `prompt` or `messages`, in order; token ids and images have none. Never fails."""
    texts: list[str] = []
    if isinstance(messages := body.get("messages"), list):
        for message in messages:
            content = message.get("content") if isinstance(message, dict) else None
            parts = content if isinstance(content, list) else [{"text": content}]
            texts += [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
        return texts
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    return [item for item in prompt if isinstance(item, str)] if isinstance(prompt, list) else []


def excerpt(texts: Sequence[str]) -> str:
    """What a text classifier reads of a prompt, of bounded length."""
    if not texts:
        return ""
    last = texts[-1]
    head = last[:HEAD_CHARACTERS]
    tail = last[max(HEAD_CHARACTERS, len(last) - TAIL_CHARACTERS) :]
    first = texts[0][:TAIL_CHARACTERS] if len(texts) > 1 else ""
    return "\n".join(part for part in (head, tail, first) if part)


def request_features(
    body: Mapping[str, Any],
    input_tokens: int,
    limit_tokens: int | None,
    texts: Sequence[str],
    model: str = "",
    tenant: str = "",
) -> Features:
    """`input_tokens`, `limit_tokens` and `texts` as the caller has found them in the body already."""
    form = body.get("response_format")
    return Features(
        input_tokens=input_tokens,
        model=model,
        route="chat" if "messages" in body else "completions",
        tenant=tenant,
        limit_tokens=limit_tokens,
        stops=bool(body.get("stop")),
        json_mode=bool(body.get("guided_json")) or (isinstance(form, dict) and form.get("type") not in (None, "text")),
        text=excerpt(texts),
    )
