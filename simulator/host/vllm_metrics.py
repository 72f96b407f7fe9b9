"""The /metrics page of the emulated engine: names, types, labels and buckets of a real vLLM.

tests/contract/vllm_metrics.json holds what a real server showed; a test compares. Gauges and counters are read from
the engine when the page is asked for, histograms are filled by the real-time loop.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from simulator.engine import Engine
from simulator.iteration import EngineRequest

_TTFT_S = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
_GAP_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_ITERATION_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_FINISHED_REASONS = ("stop", "length", "abort", "error", "repetition")
BLOCK_TOKENS = 16


class Histogram:
    """Counts by upper bound (inclusive), not cumulative; the last is without bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(float(bound) for bound in bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Adds the same value `count` times."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count

    def cumulative(self) -> Iterator[tuple[str, float]]:
        """Pairs of `le` label and count, as the text format has them."""
        total = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            total += count
            yield "+Inf" if bound == float("inf") else str(bound), total


@dataclass(slots=True)
class _Histograms:
    """By the name of the metric without its prefix."""

    token_bounds: Sequence[int]
    request_prompt_tokens: Histogram = field(init=False)
    request_generation_tokens: Histogram = field(init=False)
    request_params_max_tokens: Histogram = field(init=False)
    iteration_tokens_total: Histogram = field(default_factory=lambda: Histogram(_ITERATION_TOKENS))
    time_to_first_token_seconds: Histogram = field(default_factory=lambda: Histogram(_TTFT_S))
    inter_token_latency_seconds: Histogram = field(default_factory=lambda: Histogram(_GAP_S))
    request_time_per_output_token_seconds: Histogram = field(default_factory=lambda: Histogram(_GAP_S))
    e2e_request_latency_seconds: Histogram = field(default_factory=lambda: Histogram(_REQUEST_S))
    request_queue_time_seconds: Histogram = field(default_factory=lambda: Histogram(_REQUEST_S))
    request_inference_time_seconds: Histogram = field(default_factory=lambda: Histogram(_REQUEST_S))
    request_prefill_time_seconds: Histogram = field(default_factory=lambda: Histogram(_REQUEST_S))
    request_decode_time_seconds: Histogram = field(default_factory=lambda: Histogram(_REQUEST_S))

    def __post_init__(self) -> None:
        self.request_prompt_tokens = Histogram(self.token_bounds)
        self.request_generation_tokens = Histogram(self.token_bounds)
        self.request_params_max_tokens = Histogram(self.token_bounds)


_HISTOGRAM_HELP = {
    "request_prompt_tokens": "Number of prefill tokens processed.",
    "request_generation_tokens": "Number of generation tokens processed.",
    "request_params_max_tokens": "Histogram of the max_tokens request parameter.",
    "iteration_tokens_total": "Histogram of number of tokens per engine_step.",
    "time_to_first_token_seconds": "Histogram of time to first token in seconds.",
    "inter_token_latency_seconds": "Histogram of inter-token latency in seconds.",
    "request_time_per_output_token_seconds": "Histogram of time_per_output_token_seconds per request.",
    "e2e_request_latency_seconds": "Histogram of e2e request latency in seconds.",
    "request_queue_time_seconds": "Histogram of time spent in WAITING phase for request.",
    "request_inference_time_seconds": "Histogram of time spent in RUNNING phase for request.",
    "request_prefill_time_seconds": "Histogram of time spent in PREFILL phase for request.",
    "request_decode_time_seconds": "Histogram of time spent in DECODE phase for request.",
}


class EngineMetrics(Collector):
    """What one engine shows; `page` renders it."""

    def __init__(self, engine: Engine, model_name: str, max_model_len: int, utilisation: float) -> None:
        self._engine = engine
        self._labels = {"engine": "0", "model_name": model_name}
        self._utilisation = utilisation
        self.histograms = _Histograms(one_two_five(max_model_len))
        self.finished = dict.fromkeys(_FINISHED_REASONS, 0)
        self.queued_outside = 0  # requests that came after the iteration under way began
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def request_finished(self, request: EngineRequest, reason: str, max_tokens: int) -> None:
        """Counts a request whose last token is out."""
        self.finished[reason] += 1
        if request.scheduled_s is None or request.first_token_s is None or request.finished_s is None:
            raise ValueError(f"request {request.request_id} has not finished")
        decode_s = request.finished_s - request.first_token_s
        h = self.histograms
        h.request_prompt_tokens.observe(request.input_tokens)
        h.request_generation_tokens.observe(request.output_tokens)
        h.request_params_max_tokens.observe(max_tokens)
        h.request_time_per_output_token_seconds.observe(decode_s / max(1, request.output_tokens - 1))
        h.e2e_request_latency_seconds.observe(request.finished_s - request.arrived_s)
        h.request_queue_time_seconds.observe(request.scheduled_s - request.arrived_s)
        h.request_inference_time_seconds.observe(request.finished_s - request.scheduled_s)
        h.request_prefill_time_seconds.observe(request.first_token_s - request.scheduled_s)
        h.request_decode_time_seconds.observe(decode_s)

    def page(self, accept: str) -> tuple[bytes, str]:
        """The page and its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def collect(self) -> Iterable[Metric]:
        """For the registry."""
        engine, counters = self._engine, self._engine.counters
        waiting = engine.waiting + self.queued_outside
        yield self._gauge("num_requests_running", "Number of requests in model execution batches.", engine.running)
        yield self._gauge("num_requests_waiting", "Number of requests waiting to be processed.", waiting)
        reasons = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason",
            "Number of waiting requests by reason.",
            labels=[*self._labels, "reason"],
        )
        for reason, count in (("capacity", waiting), ("deferred", 0)):
            reasons.add_metric([*self._labels.values(), reason], count)
        yield reasons
        yield self._gauge("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", engine.kv_usage_ratio)
        yield self._counter("num_preemptions", "Cumulative number of preemption from the engine.", counters.preemptions)
        yield self._counter("prompt_tokens", "Number of prefill tokens processed.", counters.prompt_tokens)
        yield self._counter("generation_tokens", "Number of generation tokens processed.", counters.generation_tokens)
        success = CounterMetricFamily(
            "vllm:request_success",
            "Count of successfully processed requests.",
            labels=["engine", "finished_reason", "model_name"],
        )
        for reason, count in self.finished.items():
            success.add_metric([self._labels["engine"], reason, self._labels["model_name"]], count)
        yield success
        for name, text in _HISTOGRAM_HELP.items():
            histogram: Histogram = getattr(self.histograms, name)
            family = HistogramMetricFamily(f"vllm:{name}", text, labels=list(self._labels))
            family.add_metric(list(self._labels.values()), list(histogram.cumulative()), histogram.sum)
            yield family
        yield self._cache_config()

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(f"vllm:{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _cache_config(self) -> GaugeMetricFamily:
        """Only the labels that the twin has a value for; a real page has more."""
        labels = {
            "block_size": str(BLOCK_TOKENS),
            "enable_prefix_caching": "False",
            "engine": self._labels["engine"],
            "gpu_memory_utilization": str(self._utilisation),
            "num_gpu_blocks": str(self._engine.kv_capacity_tokens // BLOCK_TOKENS),
        }
        text = "Information of the LLMEngine CacheConfig"
        family = GaugeMetricFamily("vllm:cache_config_info", text, labels=list(labels))
        family.add_metric(list(labels.values()), 1)
        return family


def one_two_five(most: int) -> list[int]:
    """1, 2, 5, 10, 20, … up to `most`: vLLM's bounds for token counts."""
    bounds: list[int] = []
    power = 1
    while True:
        for mantissa in (1, 2, 5):
            if mantissa * power > most:
                return bounds
            bounds.append(mantissa * power)
        power *= 10
