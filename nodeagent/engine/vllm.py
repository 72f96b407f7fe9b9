"""Talks to a vLLM server: health, warm-up request, and the few metric series the agent needs.

The metrics page of a busy engine has hundreds of lines; only the needed ones are parsed. Names are those of vLLM's V1
engine; series of several engine cores behind one server are added up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import httpx


@dataclass(frozen=True, slots=True)
class Histogram:
    """Cumulative: counts[i] values were at most bounds[i]; the last count has no bound."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float


@dataclass(frozen=True, slots=True)
class EngineReading:
    """One look at an engine's metrics page."""

    running: float
    waiting: float
    kv_cache_usage_ratio: float | None = None
    prompt_tokens_total: float | None = None
    generation_tokens_total: float | None = None
    ttft_seconds: Histogram | None = None
    token_gap_seconds: Histogram | None = None
    tbt_seconds: Histogram | None = None
    """Mean time between tokens of each finished request."""

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return self.running == 0 and self.waiting == 0


class EngineSilent(Exception):
    """The engine did not answer, or not as a vLLM does; the message says how."""


_TTFT = "time_to_first_token_seconds"
_GAP = "inter_token_latency_seconds"
_TBT = "request_time_per_output_token_seconds"
_LINE = re.compile(
    rb"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc|prompt_tokens_total|generation_tokens_total"
    rb"|(?:time_to_first_token_seconds|inter_token_latency_seconds|request_time_per_output_token_seconds)"
    rb"_(?:bucket|sum))"
    rb"(?:\{([^\n]*)\})? ([^\s]+)",
    re.MULTILINE,
)
_BOUND = re.compile(rb'(?:^|,)le="([^"]+)"')


def parse_metrics(page: bytes) -> EngineReading:
    """The reading of a metrics page; raises EngineSilent if it is not one of vLLM's."""
    values: dict[str, list[float]] = {}
    buckets: dict[str, dict[float, float]] = {_TTFT: {}, _GAP: {}, _TBT: {}}
    for name_bytes, labels, text in _LINE.findall(page):
        name, value = name_bytes.decode(), float(text)
        if not name.endswith("_bucket"):
            values.setdefault(name, []).append(value)
        elif (bound := _BOUND.search(labels)) is not None:
            series = buckets[name.removesuffix("_bucket")]
            limit = float(bound[1])
            series[limit] = series.get(limit, 0.0) + value
    if "num_requests_running" not in values or "num_requests_waiting" not in values:
        raise EngineSilent("its metrics page has no vllm:num_requests_running and vllm:num_requests_waiting")
    usage = values.get("kv_cache_usage_perc")
    return EngineReading(
        running=sum(values["num_requests_running"]),
        waiting=sum(values["num_requests_waiting"]),
        kv_cache_usage_ratio=sum(usage) / len(usage) if usage else None,
        prompt_tokens_total=_total(values, "prompt_tokens_total"),
        generation_tokens_total=_total(values, "generation_tokens_total"),
        ttft_seconds=_histogram(buckets[_TTFT], _total(values, f"{_TTFT}_sum")),
        token_gap_seconds=_histogram(buckets[_GAP], _total(values, f"{_GAP}_sum")),
        tbt_seconds=_histogram(buckets[_TBT], _total(values, f"{_TBT}_sum")),
    )


def _total(values: Mapping[str, list[float]], name: str) -> float | None:
    return sum(values[name]) if name in values else None


def _histogram(series: Mapping[float, float], total: float | None) -> Histogram | None:
    if not series or max(series) != float("inf"):
        return None
    bounds = sorted(series)
    return Histogram(_shared(tuple(bounds[:-1])), tuple(int(series[bound]) for bound in bounds), total or 0.0)


@lru_cache(maxsize=64)
def _shared(bounds: tuple[float, ...]) -> tuple[float, ...]:
    """The same object for the same bounds: the history of samples would hold hundreds of copies."""
    return bounds


class VllmClient:
    """HTTP to the engines of this node."""

    def __init__(self) -> None:
        # No proxies from the environment: engines are on this machine.
        self._http = httpx.AsyncClient(trust_env=False, limits=httpx.Limits(max_connections=64))

    async def close(self) -> None:
        await self._http.aclose()

    async def healthy(self, url: str, timeout_s: float) -> bool:
        """Whether /health says so."""
        try:
            return (await self._http.get(f"{url}/health", timeout=timeout_s)).status_code == 200
        except httpx.HTTPError:
            return False

    async def scrape(self, url: str, timeout_s: float) -> EngineReading:
        """Reads /metrics; raises EngineSilent."""
        try:
            response = await self._http.get(f"{url}/metrics", timeout=timeout_s)
        except httpx.HTTPError as error:
            raise EngineSilent(f"no answer from {url}/metrics: {type(error).__name__}") from None
        if response.status_code != 200:
            raise EngineSilent(f"{url}/metrics answers {response.status_code}")
        try:
            return parse_metrics(response.content)
        except ValueError:
            raise EngineSilent(f"{url}/metrics is not readable") from None

    async def warm_up(self, url: str, model: str, tokens: int, timeout_s: float) -> None:
        """One short completion, so that the first user does not pay for what is done lazily; raises EngineSilent."""
        body = {"model": model, "prompt": "Warm-up.", "max_tokens": tokens, "temperature": 0}
        try:
            response = await self._http.post(f"{url}/v1/completions", json=body, timeout=timeout_s)
        except httpx.HTTPError as error:
            raise EngineSilent(f"the warm-up request failed: {type(error).__name__}") from None
        if response.status_code != 200:
            raise EngineSilent(f"the warm-up request was answered {response.status_code}: {response.text[:200]}")

    # Sleep mode (development endpoints of vLLM, there only when the engine was started with them)

    async def sleep(self, url: str, timeout_s: float) -> None:
        """Moves the weights to host memory. It waits for work rather than ending it; raises EngineSilent."""
        await self._post(f"{url}/sleep?level=1&mode=wait", "the engine does not fall asleep", timeout_s)

    async def wake_up(self, url: str, timeout_s: float) -> None:
        """Takes the weights back; raises EngineSilent."""
        await self._post(f"{url}/wake_up", "the engine does not wake up", timeout_s)

    async def sleeping(self, url: str, timeout_s: float) -> bool:
        """Whether it sleeps; raises EngineSilent when it does not say."""
        try:
            response = await self._http.get(f"{url}/is_sleeping", timeout=timeout_s)
            answer = response.json()["is_sleeping"] if response.status_code == 200 else None
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise EngineSilent(f"{url}/is_sleeping gives no answer: {type(error).__name__}") from None
        if not isinstance(answer, bool):
            raise EngineSilent(f"{url}/is_sleeping answers {response.status_code}")
        return answer

    async def _post(self, url: str, trouble: str, timeout_s: float) -> None:
        try:
            response = await self._http.post(url, timeout=timeout_s)
        except httpx.HTTPError as error:
            raise EngineSilent(f"{trouble}: {type(error).__name__}") from None
        if response.status_code != 200:
            raise EngineSilent(f"{trouble}: answered {response.status_code}: {response.text[:200]}")
