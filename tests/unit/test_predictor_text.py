"""The text classifier: learns what can be learnt, says how sure it is, reads its file and no other."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from controller.domain.classes import ClassScheme
from controller.predictor.features import excerpt, prompt_texts
from controller.predictor.port import Features
from controller.predictor.text import BINS, TextModel, TextPredictor, bin_of, bucket_shares, hashed, words_of
from controller.predictor.train import read_pairs, train

FILLER = [f"word{number}" for number in range(24)]
ASKS = {"classify this": 4, "translate the sentence": 60, "summarise the text": 180, "write a long essay about": 900}


def write_log(path: Path, count: int, noise: float = 0.1) -> None:
    draw = random.Random(5)
    with path.open("w") as file:
        for _ in range(count):
            ask, tokens = draw.choice(list(ASKS.items()))
            if draw.random() < noise:
                tokens = draw.choice(list(ASKS.values()))
            words = draw.choices(FILLER, k=draw.randrange(5, 200))
            tokens = max(1, round(tokens * draw.lognormvariate(0, 0.2)))
            file.write(json.dumps({"prompt": f"{ask} {' '.join(words)}", "output_tokens": tokens}) + "\n")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    log = tmp_path_factory.mktemp("log") / "log.jsonl"
    write_log(log, 1500)
    return train(read_pairs(log))


def test_it_learns_what_the_words_tell_and_states_the_confidence_it_has(model: TextModel) -> None:
    assert model.facts["accuracy"] > 0.85
    assert model.facts["accuracy"] > model.facts["accuracy_of_always_the_commonest"] + 0.2
    assert model.facts["stated_confidence"] == pytest.approx(model.facts["accuracy"], abs=0.12)
    predictor = TextPredictor(model)
    for ask, tokens in ASKS.items():
        weights = predictor.predict(Features(50, text=f"{ask} the of a to", route="completions")).weights
        assert np.argmax(weights) == ClassScheme().output_bucket(tokens).rank
        assert sum(weights) == pytest.approx(1.0)


def test_the_same_log_gives_the_same_model_and_a_saved_one_says_the_same(tmp_path: Path, model: TextModel) -> None:
    model.save(tmp_path / "p.npz")
    again = TextModel.load(tmp_path / "p.npz")
    features = Features(50, text="write a long essay about the of", route="completions")
    assert np.array_equal(again.distribution(features), model.distribution(features))
    assert again.facts == model.facts
    log = tmp_path / "log.jsonl"
    write_log(log, 300)
    assert np.array_equal(train(read_pairs(log)).weights, train(read_pairs(log)).weights)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "…",
        "One two_3, TWO!",
        "tab\tand\x1cmore\x7f",
        "naïve “café”—ÉTÉ İ",
        "ΟΔΟΣ.Α Σ",
        "漢字、かな x",
        "\ud800a",
        "a " * 999,
    ],
)
def test_words_are_found_in_any_script(text: str) -> None:
    assert [word.decode() for word in words_of(text)] == re.findall(r"\w+", text.lower())


def test_each_word_and_pair_counts_once() -> None:
    once, twice = (hashed(Features(50, text=text)) for text in ("go on go on", "go on go on go on go on"))
    assert np.all(np.diff(once) > 0)
    assert len(once) == len(hashed(Features(50, text=""))) + 4  # two words, two pairs
    assert len(twice) == len(once)


def test_any_cut_points_are_served_by_one_model() -> None:
    shares = bucket_shares((100, 350))
    assert shares[bin_of(99)].tolist() == [1, 0, 0]
    assert shares[bin_of(100)].tolist() == [0, 1, 0]
    assert shares[bin_of(350)].tolist() == [0, 0, 1]
    within = bucket_shares((120, 1_000_000))[bin_of(120)]
    assert 0 < within[0] < 1
    assert bucket_shares((50, 60)).sum(axis=1) == pytest.approx(np.ones(BINS))


def test_an_excerpt_is_bounded_and_keeps_what_is_asked() -> None:
    texts = prompt_texts(
        {"messages": [{"role": "system", "content": "S" * 9000}, {"role": "user", "content": "A" + "b" * 9000 + "Z"}]}
    )
    cut = excerpt(texts)
    assert len(cut) < 3000
    assert cut.startswith("A")
    assert "Z" in cut
    assert cut.endswith("S")
    assert excerpt(["short"]) == "short"
    assert excerpt([]) == ""
    assert prompt_texts({"prompt": ["a", [1, 2], "b"]}) == ["a", "b"]
    assert prompt_texts({"messages": [1, {"content": [{"text": 5}, {"text": "x"}]}]}) == ["x"]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "line 2: not JSON"),
        ('{"output_tokens": 5}', "line 2: neither prompt nor messages"),
        ('{"prompt": "x"}', "line 2: output_tokens must be"),
        ('{"prompt": "x", "output_tokens": true}', "line 2: output_tokens must be"),
    ],
)
def test_lines_that_are_no_pairs_are_named(tmp_path: Path, line: str, what: str) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"prompt": "x", "output_tokens": 5}\n' + line + "\n")
    with pytest.raises(UserError, match=what):
        read_pairs(log)


def test_too_few_pairs_and_files_that_are_no_model_are_refused(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    write_log(log, 50)
    with pytest.raises(UserError, match="too few"):
        train(read_pairs(log))
    with pytest.raises(UserError, match="no output-length predictor"):
        TextModel.load(log)
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(UserError, match="no output-length predictor"):
        TextModel.load(tmp_path / "other.npz")
    with pytest.raises(UserError, match="No such file"):
        TextModel.load(tmp_path / "none.npz")
