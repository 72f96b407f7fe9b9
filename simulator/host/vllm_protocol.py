"""What a client says to the emulated engine and hears from it: bodies, errors and streamed chunks as real vLLM's.

Shapes and error texts are those recorded in tests/contract/vllm_http.json. Additions: every chunk that carries a token
has `emulated_at`, the instant (seconds since the epoch) at which the token left the emulated GPU; the first one also
`emulated_arrival_at`. A whole answer has both and `emulated_first_at`.
"""

from __future__ import annotations

import json
import math
import secrets
import time
import zlib
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from pydantic import BaseModel, NonNegativeInt, ValidationError

EMULATED_VERSION = "0.32.0"
FINGERPRINT = f"vllm-{EMULATED_VERSION}-emulated"
DONE = b"data: [DONE]\n\n"
_DEFAULT_COMPLETION_TOKENS = 16
_BYTES_PER_TOKEN = 4  # of English text; exact counts come with token-id prompts
_TEMPLATE_TOKENS = 4  # what a chat template puts around each message
# Length of an answer that may end by itself: median and spread of chat answers in the Azure trace of 2023.
_ANSWER_MEDIAN_TOKENS = 129
_ANSWER_LOG_SIGMA = 0.9
_WORDS = (" the", " load", " falls", " and", " rises", " while", " few", " tokens", " wait", " for", " power")


class ApiError(Exception):
    """An answer other than 200, in vLLM's shape."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = _json({"error": {"message": message, "type": kind, "param": param, "code": status}}).encode()


def engine_stopped() -> ApiError:
    """What real clients hear when the engine goes away under them."""
    return ApiError(500, "EngineCore encountered an issue: the engine is stopping.", "InternalServerError")


class StreamOptions(BaseModel):
    include_usage: bool = False


class _Request(BaseModel):
    """Fields that both endpoints share; others are ignored, as vLLM does."""

    model: str | None = None
    max_tokens: int | None = None
    n: int = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    priority: int = 0


class CompletionRequest(_Request):
    """/v1/completions"""

    prompt: str | list[NonNegativeInt] | list[str] | list[list[NonNegativeInt]] | None = None


class ContentPart(BaseModel):
    type: str
    text: str = ""


class Message(BaseModel):
    role: str
    content: str | list[ContentPart] | None = None


class ChatRequest(_Request):
    """/v1/chat/completions"""

    messages: list[Message]
    max_completion_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """A request understood: what the engine has to do, and how to answer."""

    chat: bool
    input_tokens: int
    output_tokens: int
    max_tokens: int
    finish_reason: str
    stream: bool
    include_usage: bool
    priority: int = 0


def parse(body: bytes, chat: bool, models: tuple[str, ...], max_model_len: int, by_priority: bool = False) -> Ask:
    """Raises ApiError as vLLM would answer."""
    kind: type[CompletionRequest | ChatRequest] = ChatRequest if chat else CompletionRequest
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise _invalid(error, body) from None
    if request.model is not None and request.model not in models:
        message = f"The model `{request.model}` does not exist. Valid aliases: {', '.join(models)}."
        raise ApiError(404, message, "NotFoundError", "model")
    if request.stream_options is not None and not request.stream:
        message = "Stream options can only be defined when `stream=True`. (parameter=stream_options)"
        raise ApiError(400, message, param="stream_options")
    if request.priority and not by_priority:
        raise ApiError(400, f"Got priority {request.priority} but Priority scheduling is not enabled.")
    if request.n != 1:
        raise ApiError(400, "The emulated engine gives one answer per request (n=1).", param="n")
    if isinstance(request, ChatRequest):
        prompt: Any = [message.model_dump() for message in request.messages]
        input_tokens = _chat_tokens(request)
        asked = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    else:
        prompt = _one_prompt(request)
        input_tokens = len(prompt) if isinstance(prompt, list) else _text_tokens(prompt)
        asked = request.max_tokens if request.max_tokens is not None else _DEFAULT_COMPLETION_TOKENS
    max_tokens = _max_tokens(input_tokens, asked, max_model_len)
    output_tokens = max_tokens if request.ignore_eos else min(max_tokens, _answer_tokens(prompt))
    return Ask(
        chat=chat,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        max_tokens=max_tokens,
        finish_reason="length" if output_tokens == max_tokens else "stop",
        stream=request.stream,
        include_usage=request.stream_options is not None and request.stream_options.include_usage,
        priority=request.priority,
    )


def _one_prompt(request: CompletionRequest) -> str | list[int]:
    prompt = request.prompt
    if prompt is None or prompt == "":
        message = "Either prompt or prompt_embeds must be provided and non-empty. (parameter=prompt)"
        raise ApiError(400, message, param="prompt")
    if isinstance(prompt, str):
        return prompt
    if not prompt:
        raise ApiError(400, "You must pass at least one prompt")
    first = prompt[0]
    if isinstance(first, int):
        return [token for token in prompt if isinstance(token, int)]
    if len(prompt) > 1:
        raise ApiError(400, "The emulated engine takes one prompt per request.", param="prompt")
    return first


def _chat_tokens(request: ChatRequest) -> int:
    if not request.messages:
        raise ApiError(400, "Cannot apply chat template to an empty conversation. Provide at least one message.")
    total = 0
    for message in request.messages:
        content = message.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        total += _text_tokens(text) + _TEMPLATE_TOKENS
    return total


def _text_tokens(text: str) -> int:
    return max(1, math.ceil(len(text.encode()) / _BYTES_PER_TOKEN))


def _max_tokens(input_tokens: int, asked: int | None, max_model_len: int) -> int:
    """What the client asked for, within what the context leaves."""
    if input_tokens > max_model_len:
        message = (
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt contains "
            f"{input_tokens} input tokens, which exceeds this limit even without any output tokens. Please reduce "
            f"the length of the input prompt. (parameter=input_tokens, value={input_tokens})"
        )
        raise ApiError(400, message, param="input_tokens")
    left = max_model_len - input_tokens
    max_tokens = left if asked is None else min(asked, left)
    if max_tokens < 1:
        message = f"max_tokens must be at least 1, got {max_tokens}. (parameter=max_tokens, value={max_tokens})"
        raise ApiError(400, message, param="max_tokens")
    return max_tokens


def _answer_tokens(prompt: object) -> int:
    """A length drawn from a log-normal by the prompt's hash: the same prompt always gets the same."""
    quantile = (zlib.crc32(repr(prompt).encode()) + 0.5) / 2**32
    return max(1, round(_ANSWER_MEDIAN_TOKENS * math.exp(_ANSWER_LOG_SIGMA * NormalDist().inv_cdf(quantile))))


def _invalid(error: ValidationError, body: bytes) -> ApiError:
    """vLLM prints pydantic's errors as Python literals."""
    errors: list[dict[str, Any]] = []
    for item in error.errors(include_url=False, include_context=False):
        entry: dict[str, Any] = {"type": item["type"], "loc": item["loc"], "msg": item["msg"], "input": item["input"]}
        if item["type"] == "json_invalid":
            position, reason = _json_error(body)
            entry |= {"loc": (position,), "msg": "JSON decode error", "input": {}, "ctx": {"error": reason}}
        entry["loc"] = ".".join(["body", *map(str, entry["loc"])])
        if isinstance(entry["input"], dict | list):
            entry["input"] = f"<{type(entry['input']).__name__} of {len(entry['input'])} items>"
        errors.append(entry)
    plural = "" if len(errors) == 1 else "s"
    lines = "".join(f"\n  {entry}" for entry in errors)
    return ApiError(400, f"{len(errors)} validation error{plural}:{lines}", "Bad Request", errors[0]["loc"])


def _json_error(body: bytes) -> tuple[int, str]:
    """Where and why a body is not JSON."""
    try:
        json.loads(body)
    except json.JSONDecodeError as error:
        return error.pos, error.msg
    except UnicodeDecodeError as error:
        return error.start, error.reason
    return 0, "not JSON"  # pydantic is stricter than json, for example about depth


class Answer:
    """Writes the answer to one request; chunks are byte templates made once."""

    def __init__(self, ask: Ask, model: str) -> None:
        self.arrival_s = 0.0  # set when the engine has taken the request
        self._ask = ask
        self._request_id = f"{'chatcmpl' if ask.chat else 'cmpl'}-{secrets.token_hex(8)}"
        self._head = {
            "id": self._request_id,
            "object": "chat.completion.chunk" if ask.chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        if ask.chat:
            choice = '{"index":0,"delta":{"content":"%s"},"logprobs":null,"finish_reason":%s%s,"token_ids":null}'
            extra = ("", ',"stop_reason":null')
        else:
            choice = (
                '{"index":0,"text":"%s","logprobs":null,"finish_reason":%s%s,"prompt_token_ids":null,"token_ids":null}'
            )
            extra = (',"stop_reason":null', ',"stop_reason":null')
        prefix = "data: " + _json(self._head)[:-1].replace("%", "%%") + ',"choices":['
        self._chunk = prefix + choice % ("%s", "null", extra[0]) + '],"emulated_at":%.6f}\n\n'
        self._last = prefix + choice % ("%s", f'"{ask.finish_reason}"', extra[1]) + ']%s,"emulated_at":%.6f}\n\n'

    @property
    def request_id(self) -> str:
        return self._request_id

    def chunk(self, at_s: float, index: int, last: bool) -> bytes:
        """The event of one token, with what goes before the first and after the last."""
        word = _WORDS[index % len(_WORDS)]
        if not last:
            text = self._chunk % (word, at_s)
        else:
            fingerprint = "" if self._ask.include_usage else f',"system_fingerprint":"{FINGERPRINT}"'
            text = self._last % (word, fingerprint, at_s)
        if index == 0:
            text = f'{text[:-3]},"emulated_arrival_at":{self.arrival_s:.6f}}}\n\n'
            if self._ask.chat:
                text = self._role_event() + text
        if not last:
            return text.encode()
        if self._ask.include_usage:
            tail: dict[str, Any] = {
                **self._head,
                "choices": [],
                "usage": self._usage(),
                "system_fingerprint": FINGERPRINT,
            }
            text += f"data: {_json(tail)}\n\n"
        return text.encode() + DONE

    def whole(self, first_s: float, last_s: float) -> bytes:
        """The answer of a request that did not stream."""
        text = "".join(_WORDS[index % len(_WORDS)] for index in range(self._ask.output_tokens))
        choice: dict[str, Any] = {"index": 0}
        if self._ask.chat:
            nothing = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "reasoning"))
            choice["message"] = {"role": "assistant", "content": text, **nothing}
        else:
            choice["text"] = text
        choice |= {"logprobs": None, "finish_reason": self._ask.finish_reason, "stop_reason": None, "token_ids": None}
        answer: dict[str, Any] = {**self._head, "choices": [choice], "service_tier": None}
        if self._ask.chat:
            answer["object"] = "chat.completion"
        else:
            choice |= {"prompt_logprobs": None, "prompt_token_ids": None}
        choice["routed_experts"] = None
        usage = self._usage() | {"prompt_tokens_details": None, "completion_tokens_details": None}
        answer |= {"system_fingerprint": FINGERPRINT, "usage": usage}
        if self._ask.chat:
            answer |= dict.fromkeys(("prompt_logprobs", "prompt_token_ids", "prompt_text"))
        answer |= dict.fromkeys(("kv_transfer_params", "ec_transfer_params", "metrics"))
        stamps = {"emulated_arrival_at": self.arrival_s, "emulated_first_at": first_s, "emulated_at": last_s}
        return _json(answer | {name: round(value, 6) for name, value in stamps.items()}).encode()

    def _role_event(self) -> str:
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        event = {**self._head, "choices": [choice], "prompt_token_ids": None, "prompt_text": None}
        return f"data: {_json(event)}\n\n"

    def _usage(self) -> dict[str, Any]:
        ask = self._ask
        return {
            "prompt_tokens": ask.input_tokens,
            "total_tokens": ask.input_tokens + ask.output_tokens,
            "completion_tokens": ask.output_tokens,
        }


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
