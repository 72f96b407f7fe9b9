"""The profile as a value: canonical JSON, checksum, equivalent loads."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from common.errors import UserError
from controller.domain.classes import RequestClass
from controller.profile.table import Profile
from tests.synthetic_profile import synthetic_profile

SS, MM, LL = (RequestClass.parse(name) for name in ("SS", "MM", "LL"))


def test_round_trip_keeps_value_bytes_and_checksum() -> None:
    profile = synthetic_profile()
    text = profile.to_json()
    again = Profile.from_json(text)
    assert again == profile
    assert again.to_json() == text
    assert json.loads(text)["checksum"] == profile.checksum()


def test_whole_numbers_and_floats_make_one_profile() -> None:
    profile = synthetic_profile()
    whole = replace(profile, parked_w=72)
    assert whole.to_json() == replace(profile, parked_w=72.0).to_json()
    assert Profile.from_json(whole.to_json()).checksum() == whole.checksum()


def test_point_order_matters_to_nothing_but_content_does() -> None:
    profile = synthetic_profile()
    first = profile.points[0]
    changed = replace(profile, points=(replace(first, power_w=first.power_w + 1), *profile.points[1:]))
    assert changed.checksum() != profile.checksum()


def test_an_edited_file_is_refused() -> None:
    data = json.loads(synthetic_profile().to_json())
    data["points"][0]["power_w"] *= 0.5
    with pytest.raises(UserError, match="checksum"):
        Profile.from_json(json.dumps(data))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"schema": 99}', "not json"],
    ids=["empty", "list", "no schema", "other schema", "text"],
)
def test_what_is_no_profile_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(UserError, match="profile: "):
        Profile.from_json(text)


def test_a_missing_field_and_a_nan_are_refused() -> None:
    data = json.loads(synthetic_profile().to_json())
    del data["points"][3]["gap_p99_ms"]
    with pytest.raises(UserError, match="gap_p99_ms"):
        Profile.from_json(json.dumps(data))
    data = json.loads(synthetic_profile().to_json())
    data["parked_w"] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        Profile.from_json(json.dumps(data))


def test_the_calibration_mix_itself_is_worth_its_own_rate() -> None:
    profile = synthetic_profile()
    rates = {c: 6.0 * mix.share for c, mix in profile.mixes["short"].items()}
    assert profile.equivalent_rate("short", rates) == pytest.approx(6.0)


def test_larger_requests_weigh_more_and_live_means_override_the_mix() -> None:
    profile = synthetic_profile()
    assert profile.request_weight("all", SS) < profile.request_weight("all", MM) < profile.request_weight("all", LL)
    light = profile.equivalent_rate("all", {LL: 1.0})
    heavy = profile.equivalent_rate("all", {LL: 1.0}, {LL: (8000.0, 900.0)})
    assert heavy == pytest.approx(light * profile.work.of(8000, 900) / profile.work.of(2000, 150))


def test_a_class_outside_the_group_is_weighed_by_the_mix_that_knows_it() -> None:
    profile = synthetic_profile()
    spilled = profile.request_weight("long", SS)
    assert spilled == pytest.approx(profile.work.of(100, 150) / profile.mean_work_s("long"))
    assert 0 < spilled < 1
