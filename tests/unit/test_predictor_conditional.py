"""Running distributions, oracles, and the choice between two predictors."""

from __future__ import annotations

import pytest

from controller.domain.classes import Bucket, ClassScheme
from controller.gateway.classify import Classifier
from controller.predictor.best import Best
from controller.predictor.conditional import Conditional
from controller.predictor.oracle import Oracle
from controller.predictor.port import Features, Prediction


def likely(prediction: Prediction) -> str:
    return "SML"[prediction.weights.index(max(prediction.weights))]


def test_what_a_request_says_of_itself_refines_what_is_known_of_its_input_bucket() -> None:
    predictor = Conditional()
    plain, json_mode = Features(100, "m", "chat"), Features(100, "m", "chat", json_mode=True)
    capped = Features(100, "m", "chat", limit_tokens=2000)
    for _ in range(200):
        predictor.observe(plain, 500)
        predictor.observe(json_mode, 40)
        predictor.observe(capped, 200)
    assert [likely(predictor.predict(each)) for each in (plain, json_mode, capped)] == ["L", "S", "M"]
    # What nothing is known of is taken for the average of its model and route.
    assert likely(predictor.predict(Features(100, "m", "chat", limit_tokens=2047))) == "M"  # the same power of two
    unknown = predictor.predict(Features(100, "other", "chat")).weights
    assert all(share == pytest.approx(1 / 3, abs=0.01) for share in unknown)


def test_a_tenant_seen_once_is_not_yet_believed() -> None:
    predictor = Conditional()
    for _ in range(300):
        predictor.observe(Features(100, "m", tenant="many"), 50)
    predictor.observe(Features(100, "m", tenant="new"), 1000)
    assert likely(predictor.predict(Features(100, "m", tenant="new"))) == "S"
    for _ in range(40):
        predictor.observe(Features(100, "m", tenant="new"), 1000)
    assert likely(predictor.predict(Features(100, "m", tenant="new"))) == "L"
    assert likely(predictor.predict(Features(100, "m", tenant="many"))) == "S"


def test_keys_that_clients_invent_are_bounded() -> None:
    predictor = Conditional(keys_per_level=50)
    for number in range(1000):
        predictor.observe(Features(100, "m", tenant=f"t{number}"), 50)
    assert max(len(level) for level in predictor._levels) <= 50


def test_low_confidence_goes_to_the_longest_output_possible() -> None:
    classifier = Classifier(quantile=0.5, predictor=Conditional(), min_confidence=0.6)
    for number in range(300):
        classifier.observe(100, (50, 200, 500)[number % 3], Features(100))
        classifier.observe(500, 50, Features(500))
    unsure, sure = classifier.classify(100, None, Features(100)), classifier.classify(500, None, Features(500))
    assert (str(unsure.routing), str(sure.routing)) == ("SL", "MS")
    assert unsure.confidence < 0.6 < sure.confidence
    assert str(classifier.classify(100, 200, Features(100)).routing) == "SM"  # and never beyond the stated limit


@pytest.mark.parametrize("accuracy", [1.0, 0.8, 0.6, 0.0])
def test_a_noisy_oracle_is_right_as_often_as_it_says(accuracy: float) -> None:
    oracle, wrong = Oracle(accuracy, seed=3), []
    for number in range(6000):
        tokens = (50, 200, 500)[number % 3]
        said = likely(oracle.predict(Features(100, truth_tokens=tokens)))
        if said != ClassScheme().output_bucket(tokens).value:
            wrong.append((ClassScheme().output_bucket(tokens).value, said))
    assert len(wrong) / 6000 == pytest.approx(1 - accuracy, abs=0.02)
    for true in "SML":
        others = [said for truth, said in wrong if truth == true]
        if others:
            assert others.count(min(set(others), key=others.count)) / len(others) > 0.45  # both errors alike


def test_an_oracle_tells_two_systems_the_same_and_needs_the_truth() -> None:
    first, second = Oracle(0.7, seed=1), Oracle(0.7, seed=1)
    features = [Features(100, truth_tokens=tokens) for tokens in range(1, 500, 7)]
    assert [first.predict(each) for each in features] == [second.predict(each) for each in features]
    with pytest.raises(ValueError, match="true output length"):
        first.predict(Features(100))
    with pytest.raises(ValueError, match="accuracy"):
        Oracle(1.5)


class Always:
    """Says one bucket, nearly surely."""

    def __init__(self, rank: int) -> None:
        self._weights = tuple(0.9 if rank == other else 0.05 for other in range(3))
        self.asked = 0

    def use_scheme(self, scheme: ClassScheme) -> None: ...

    def predict(self, features: Features) -> Prediction:
        self.asked += 1
        short, medium, long = self._weights
        return Prediction((short, medium, long), "always")

    def observe(self, features: Features, output_tokens: int, said: Prediction | None = None) -> None: ...


def test_what_was_said_when_a_request_came_is_scored_without_asking_again() -> None:
    first, second = Always(0), Always(2)
    best = Best(first, second)
    read = Features(100, text="x")
    said = best.predict(read)
    best.observe(read, 500, said)
    assert (first.asked, second.asked) == (1, 1)
    scores = best.scores[:]
    forgotten = Best(Always(0), Always(2))
    forgotten.observe(read, 500)
    assert scores == forgotten.scores


def test_the_predictor_that_has_been_right_is_asked_and_text_needs_text() -> None:
    best = Best(Always(0), Always(2))
    read = Features(100, text="x")
    assert likely(best.predict(read)) == "S"  # the first, until shown wrong
    for _ in range(50):
        best.observe(read, 500)
    assert likely(best.predict(read)) == "L"
    for _ in range(200):
        best.observe(read, 50)
    assert likely(best.predict(read)) == "S"
    assert likely(best.predict(Features(100))) == "L"
    assert Bucket.S.rank == 0
