"""Classification: exact for token ids, calibrated for text; outputs by experience, erring upwards, never by a leak."""

from __future__ import annotations

from collections import Counter

import pytest

from controller.domain.classes import ClassScheme
from controller.gateway.classify import Classifier, PromptSize, TokenEstimator, output_limit, prompt_size


@pytest.mark.parametrize(
    ("body", "size"),
    [
        ({"prompt": [1, 2, 3]}, PromptSize(tokens=3)),
        ({"prompt": "four"}, PromptSize(text_bytes=4)),
        ({"prompt": "ä"}, PromptSize(text_bytes=2)),
        ({"prompt": ["one", "two"]}, PromptSize(text_bytes=6)),
        ({"prompt": [[1, 2], [3]]}, PromptSize(tokens=3)),
        ({"prompt": "\ud800"}, PromptSize(text_bytes=1)),
        ({"messages": [{"role": "user", "content": "hello"}]}, PromptSize(tokens=4, text_bytes=5)),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image_url"}]}]},
            PromptSize(tokens=4, text_bytes=2),
        ),
        ({"messages": [{"role": "assistant", "content": None}]}, PromptSize(tokens=4)),
    ],
)
def test_prompt_size(body: dict[str, object], size: PromptSize) -> None:
    assert prompt_size(body) == size


@pytest.mark.parametrize(
    "body",
    [{}, {"prompt": []}, {"prompt": 5}, {"prompt": [{}]}, {"messages": []}, {"messages": "x"}, {"messages": [1]}],
)
def test_prompts_that_are_none_are_refused(body: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"prompt must|messages must"):
        prompt_size(body)


@pytest.mark.parametrize(
    ("body", "limit"),
    [
        ({}, None),
        ({"max_tokens": None}, None),
        ({"max_tokens": 7}, 7),
        ({"max_tokens": 70, "max_completion_tokens": 7}, 7),
        ({"max_tokens": 7, "ignore_eos": True}, None),
        ({"max_tokens": 7, "ignore_eos": False}, 7),
    ],
)
def test_output_limit_is_believed_unless_it_is_a_benchmarks_true_length(
    body: dict[str, object], limit: int | None
) -> None:
    assert output_limit(body) == limit


@pytest.mark.parametrize("limit", [0, -1, 1.5, "7", True])
def test_output_limits_that_are_none_are_refused_even_with_ignore_eos(limit: object) -> None:
    with pytest.raises(ValueError, match="max_tokens"):
        output_limit({"max_tokens": limit, "ignore_eos": True})


def test_text_is_estimated_with_the_ratio_learnt_per_model() -> None:
    estimator = TokenEstimator()
    prompt = PromptSize(text_bytes=3000)
    assert estimator.input_tokens("m", prompt) == 750
    for _ in range(200):
        estimator.calibrate("m", prompt, 1500)
    assert estimator.input_tokens("m", prompt) == pytest.approx(1500, rel=0.01)
    assert estimator.input_tokens("other", prompt) == 750
    for _ in range(200):
        estimator.calibrate("m", PromptSize(text_bytes=100_000), 1)  # absurd: bounded
    assert estimator.input_tokens("m", prompt) >= 3000 / 16
    assert estimator.input_tokens("m", PromptSize(tokens=77)) == 77
    assert estimator.input_tokens("m", PromptSize()) == 1


def test_without_experience_the_longest_output_is_assumed() -> None:
    assert str(Classifier().classify(100).routing) == "SL"


def test_routing_takes_a_quantile_of_what_the_same_input_bucket_had() -> None:
    classifier = Classifier(quantile=0.8)
    for number in range(1000):
        classifier.observe(100, 50 if number % 10 else 200)  # 90 % short
        classifier.observe(2000, 50 if number % 2 else 400)  # half long
    assert str(classifier.classify(100).routing) == "SS"
    assert str(classifier.classify(2000).routing) == "LL"
    assert str(classifier.classify(500).routing) == "ML"
    assert str(Classifier(quantile=0.2).classify(500).routing) == "MS"


def test_a_stated_limit_caps_the_output_bucket() -> None:
    classifier = Classifier()
    for limit, routed in ((99, "LS"), (100, "LM"), (349, "LM"), (350, "LL")):
        got = classifier.classify(2000, limit)
        assert str(got.routing) == routed
        assert got.load.output.rank <= got.routing.output.rank


def test_arrivals_are_dealt_in_proportion_to_what_came_true() -> None:
    """A quantile alone would report every arrival as long; the planner needs the mix."""
    classifier = Classifier(quantile=0.8)
    for number in range(1000):
        classifier.observe(2000, (50, 50, 200, 400)[number % 4])
    dealt = Counter(str(classifier.classify(2000).load) for _ in range(400))
    assert dealt == {"LS": pytest.approx(200, abs=4), "LM": pytest.approx(100, abs=4), "LL": pytest.approx(100, abs=4)}


def test_experience_follows_a_drifting_mix() -> None:
    classifier = Classifier(quantile=0.8)
    for _ in range(20_000):
        classifier.observe(100, 400)
    assert str(classifier.classify(100).routing) == "SL"
    for _ in range(15_000):
        classifier.observe(100, 10)
    assert str(classifier.classify(100).routing) == "SS"


def test_new_cut_points_start_anew() -> None:
    classifier = Classifier(quantile=0.5)
    for _ in range(50):
        classifier.observe(100, 10)
    classifier.use_scheme(ClassScheme((50, 150), (5, 20)))
    assert str(classifier.classify(100).routing) == "MM"  # middle bucket of an even prior
    assert str(classifier.classify(200, 3).routing) == "LS"


def test_the_same_requests_in_the_same_order_are_classified_alike() -> None:
    def run() -> list[str]:
        classifier, out = Classifier(), []
        for number in range(300):
            got = classifier.classify(number * 7 % 2000)
            out.append(f"{got.routing}{got.load}")
            classifier.observe(number * 7 % 2000, number * 13 % 500)
        return out

    assert run() == run()


def test_the_quantile_must_be_one() -> None:
    with pytest.raises(ValueError, match="quantile"):
        Classifier(quantile=1.0)
