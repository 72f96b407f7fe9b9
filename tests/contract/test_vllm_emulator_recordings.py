"""The emulated engine against what a real vLLM showed and answered (scripts/record-vllm)."""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import vllm_recording as recording
from tests.vllm_emulator import Emulator

FOLDER = Path(__file__).parent
HTTP = json.loads((FOLDER / "vllm_http.json").read_text())
METRICS = json.loads((FOLDER / "vllm_metrics.json").read_text())
SIZE = ("--tensor-parallel-size", "4", "--max-model-len", str(recording.MAX_MODEL_LEN))


@pytest.fixture(scope="module")
def engine() -> Iterator[Emulator]:
    with Emulator(*SIZE) as emulator:
        yield emulator


@pytest.mark.parametrize("name", HTTP["exchanges"])
def test_answers_as_the_real_one(engine: Emulator, name: str) -> None:
    assert recording.record(engine.port, name) == HTTP["exchanges"][name]


def test_every_exchange_is_recorded() -> None:
    assert set(HTTP["exchanges"]) == set(recording.EXCHANGES)


@pytest.fixture(scope="module")
def shown(engine: Emulator) -> dict[str, dict[str, Any]]:
    engine.ask("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 3, "ignore_eos": True})
    return recording.metrics(recording.ask(engine.port, "/metrics", None)[2].decode())


def test_shows_no_metric_that_the_real_one_does_not(shown: dict[str, dict[str, Any]]) -> None:
    assert set(shown) <= set(METRICS["metrics"])


@pytest.mark.parametrize("name", sorted(METRICS["metrics"]))
def test_metrics_have_the_type_labels_and_bounds_of_the_real_ones(shown: dict[str, dict[str, Any]], name: str) -> None:
    real = METRICS["metrics"][name]
    if name not in shown:
        assert name.removeprefix("vllm:") not in NEEDED
        return
    if name == "vllm:cache_config_info":  # the emulator fills in what the twin has a value for
        assert set(shown[name].pop("labels")) <= set(real["labels"])
        assert shown[name].items() <= real.items()
    else:
        assert shown[name] == real


NEEDED = {
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total"),
    *("prompt_tokens_total", "generation_tokens_total", "request_success_total", "iteration_tokens_total"),
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds"),
    *("e2e_request_latency_seconds", "request_queue_time_seconds", "request_prompt_tokens"),
}


def test_needed_metrics_are_all_in_the_recording() -> None:
    assert {f"vllm:{name}" for name in NEEDED} <= set(METRICS["metrics"])


def test_the_metrics_page_is_prometheus_text_of_the_version_asked_for(engine: Emulator) -> None:
    content_type = recording.ask(engine.port, "/metrics", None)[1]
    assert content_type.startswith("text/plain; version=")


def test_life_cycle_is_that_of_the_real_one() -> None:
    facts = HTTP["lifecycle"]
    with Emulator(*SIZE, start_s=2.0, wait=False) as emulator:
        refused = not emulator.healthy()
        emulator.wait_until_healthy()
        assert refused == facts["refuses_connections_before_ready"]
        emulator.process.send_signal(signal.SIGTERM)
        assert emulator.end()[0] == facts["sigterm_exit_code"]


def test_a_client_that_leaves_takes_its_request_along(engine: Emulator) -> None:
    assert HTTP["lifecycle"]["client_gone_frees_the_request_within_s"] == 1
    connection, response = engine.open_stream()
    engine.wait_for("num_requests_running", 1)
    finished = engine.metric("request_success_total")
    connection.close()
    response.close()
    engine.wait_for("num_requests_running", 0)
    assert engine.metric("kv_cache_usage_perc") == 0
    assert engine.metric("request_success_total") == finished  # as the real one: an abort by the client is no success


@pytest.mark.parametrize(
    ("option", "fact"),
    [("--no-such-option", "unknown_option_exit_code"), ("--disable-log-requests", "no_longer_an_option_exit_code")],
)
def test_options_that_the_real_one_refuses_are_refused(option: str, fact: str) -> None:
    with Emulator(*SIZE, option, wait=False) as emulator:
        code, said = emulator.end()
    assert code == HTTP["lifecycle"][fact]
    assert f"No such option: {option}" in said
    assert "Traceback" not in said


def test_a_port_in_use_is_told_at_once_in_one_line() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with Emulator(*SIZE, port=port, start_s=60, wait=False) as emulator:
            code, said = emulator.end()
    assert code == HTTP["lifecycle"]["port_in_use_exit_code"]
    assert re.fullmatch(rf"vllm: cannot listen on 127.0.0.1:{port}: Address already in use\. .*--port\.\n", said)


def test_streams_in_flight_end_with_an_error_on_sigterm() -> None:
    with Emulator(*SIZE) as emulator:
        _, response = emulator.open_stream()
        emulator.process.send_signal(signal.SIGTERM)
        *_, failure, done = recording.events(response.read())
        code, _ = emulator.end()
    assert (failure["error"]["type"], failure["error"]["code"], done) == ("InternalServerError", 500, "[DONE]")
    assert code == 0


def test_requests_without_stream_get_an_error_on_sigterm() -> None:
    import concurrent.futures

    with Emulator(*SIZE) as emulator, concurrent.futures.ThreadPoolExecutor() as threads:
        body = {"prompt": [1], "max_tokens": 2000, "ignore_eos": True}
        waiting = threads.submit(recording.ask, emulator.port, "/v1/completions", body)
        emulator.wait_for("num_requests_running", 1)
        emulator.process.send_signal(signal.SIGTERM)
        status, _, answer = waiting.result()
    assert status == 500
    assert json.loads(answer)["error"]["type"] == "InternalServerError"


def test_the_official_client_library_understands_it(engine: Emulator) -> None:
    from openai import NotFoundError, OpenAI

    with OpenAI(base_url=f"http://127.0.0.1:{engine.port}/v1", api_key="none") as client:
        chunks = list(
            client.chat.completions.create(
                model=recording.MODEL,
                messages=[{"role": "user", "content": "Say something."}],
                max_completion_tokens=7,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
        )
        text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        assert len(text.split()) == 7
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 7
        whole = client.completions.create(model=recording.MODEL, prompt="Say more.", max_tokens=5)
        assert whole.usage is not None
        assert 1 <= whole.usage.completion_tokens <= 5
        with pytest.raises(NotFoundError):
            client.completions.create(model="nope", prompt="x")
