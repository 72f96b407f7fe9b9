"""What the physics must do whatever its parameters: clocks, caps, variants, parameter files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from simulator.physics import Physics
from simulator.physics_parameters import DATA_FOLDER, read_file

PHYSICS = Physics.load()
LEGACY = Physics.load(legacy=True)
TPS = st.sampled_from(PHYSICS.tps)
CLOCKS = st.sampled_from(PHYSICS.clocks_mhz)
PREFILLS = st.lists(st.tuples(st.integers(1, 2048), st.integers(0, 8192)), max_size=3)


@given(TPS, CLOCKS, CLOCKS, st.integers(1, 256), st.integers(1, 4096), PREFILLS)
def test_a_lower_clock_is_never_faster_and_never_draws_more(tp, one_mhz, other_mhz, batch, context, prefill):
    low, high = sorted((one_mhz, other_mhz))
    slow_s, slow_w = PHYSICS.iteration(tp, low, batch, batch * context, prefill)
    fast_s, fast_w = PHYSICS.iteration(tp, high, batch, batch * context, prefill)
    assert slow_s >= fast_s * (1 - 1e-12)
    assert slow_w <= fast_w * (1 + 1e-12)


@given(TPS, CLOCKS, st.integers(1, 256), st.integers(1, 4096), PREFILLS)
def test_power_lies_between_idle_and_the_boards_limit(tp, mhz, batch, context, prefill):
    _, watts = PHYSICS.iteration(tp, mhz, batch, batch * context, prefill)
    assert PHYSICS.idle_w(mhz, context=True) < watts <= 700


@pytest.mark.parametrize("tp", PHYSICS.tps)
def test_a_lock_really_slows_prefill_more_than_decode(tp):
    def slowdown(batch, context, prefill):
        slow, _ = PHYSICS.iteration(tp, 800, batch, context, prefill)
        fast, _ = PHYSICS.iteration(tp, 1980, batch, context, prefill)
        return slow / fast

    assert slowdown(0, 0, [(2048, 0)]) > 1.5
    assert 1.01 < slowdown(16, 16_000, []) < 1.12


def test_locks_above_the_knee_change_prefill_little():
    knee, _ = PHYSICS.iteration(4, 1440, 0, 0, [(2048, 0)])
    full, _ = PHYSICS.iteration(4, 1980, 0, 0, [(2048, 0)])
    assert knee / full < 1.01


@given(TPS, CLOCKS, st.floats(210, 700), st.integers(0, 128), PREFILLS)
def test_a_power_limit_gives_the_highest_clock_that_keeps_it(tp, lock_mhz, limit_w, batch, prefill):
    prefill = prefill or [(512, 0)]
    mhz = PHYSICS.effective_mhz(tp, lock_mhz, limit_w, batch, batch * 800, prefill)
    assert mhz <= lock_mhz
    seconds, watts = PHYSICS.iteration(tp, lock_mhz, batch, batch * 800, prefill, power_limit_w=limit_w)
    assert (seconds, watts) == PHYSICS.iteration(tp, mhz, batch, batch * 800, prefill)
    if mhz > PHYSICS.clocks_mhz[0]:
        assert watts <= limit_w
    if mhz < lock_mhz:
        assert PHYSICS.iteration(tp, mhz + 15, batch, batch * 800, prefill)[1] > limit_w


def test_a_power_limit_slows_a_heavy_iteration_and_leaves_a_light_one():
    heavy = (4, 1980, 0, 0, [(2048, 0)])
    light = (4, 1980, 1, 500)
    assert PHYSICS.iteration(*heavy, power_limit_w=400)[0] > 1.5 * PHYSICS.iteration(*heavy)[0]
    assert PHYSICS.iteration(*light, power_limit_w=450) == PHYSICS.iteration(*light)


@given(TPS, CLOCKS, st.integers(1, 256), st.integers(0, 400_000), st.sampled_from([PHYSICS, LEGACY]))
def test_the_decode_line_is_the_iteration(tp, mhz, batch, context, physics):
    line = physics.decode_line(tp, mhz, batch, context)
    seconds, watts = physics.iteration(tp, mhz, batch, context)
    assert line.seconds + line.seconds_per_context_token * context == pytest.approx(seconds, rel=1e-9)
    assert line.joules + line.joules_per_context_token * context == pytest.approx(seconds * watts, rel=1e-9)
    assert context <= line.up_to_context_tokens


def test_variants_agree_at_full_clock_and_part_at_low_clocks():
    low = {v: Physics.load(variant=v).iteration(4, 800, 16, 16_000)[1] for v in ("pessimistic", "base", "optimistic")}
    full = {v: Physics.load(variant=v).iteration(4, 1980, 16, 16_000)[1] for v in low}
    assert max(full.values()) / min(full.values()) < 1.02
    assert low["pessimistic"] > 1.05 * low["base"] > 1.1 * low["optimistic"]


def test_kv_capacity_and_unknown_tp():
    assert [PHYSICS.kv_capacity_tokens(tp) for tp in (2, 4, 8)] == [29_000, 490_000, 1_400_000]
    with pytest.raises(UserError, match="tensor parallelism 3"):
        PHYSICS.kv_capacity_tokens(3)
    with pytest.raises(UserError, match="tensor parallelism 16"):
        PHYSICS.iteration(16, 1980, 1, 100)


def test_no_work_is_an_error():
    with pytest.raises(ValueError, match="at least one token"):
        PHYSICS.iteration(4, 1980, 0, 0)


def own_file(folder: Path, **values: object) -> Path:
    data = json.loads((DATA_FOLDER / "h100_llama70b.json").read_text())
    for name, value in values.items():
        data["parameters"].setdefault(name, {"basis": "assumed", "source": "test"})["value"] = value
    path = folder / "own.json"
    path.write_text(json.dumps(data))
    return path


def test_changing_a_parameter_file_changes_the_results(tmp_path: Path):
    own = Physics.from_text(str(own_file(tmp_path, hbm_w=300.0, host_ms=1.2)))
    seconds, watts = PHYSICS.iteration(4, 1980, 8, 4000)
    assert own.iteration(4, 1980, 8, 4000)[0] == pytest.approx(seconds + 0.001)
    assert own.iteration(4, 1980, 8, 4000)[1] > watts + 50


def test_text_names_file_variant_and_mode(tmp_path: Path):
    path = own_file(tmp_path)
    assert Physics.from_text("").variant == "base"
    assert Physics.from_text("optimistic").variant == "optimistic"
    both = Physics.from_text(f"{path}:pessimistic+legacy")
    assert (both.variant, both.legacy) == ("pessimistic", True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hopeful", "no physics variant 'hopeful'"),
        ("base+modern", "unknown engine mode 'modern'"),
        ("/nowhere/at_all.json", "cannot read physics parameters"),
    ],
)
def test_bad_text_gets_one_clear_line(text, message):
    with pytest.raises(UserError, match=message):
        Physics.from_text(text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hbm_bytes_per_s": 0}, "hbm_bytes_per_s: .*greater than 0"),
        ({"busy_w": "much"}, "busy_w"),
        ({"no_such_parameter": 1}, "no_such_parameter"),
        ({"allreduce_us": {"2": 6}}, "same tensor parallelisms"),
        ({"gemm": {"tokens": [1, 8, 4], "ms": {"2": [1, 2, 3]}}}, "tokens must rise"),
    ],
)
def test_bad_parameter_files_are_refused_by_name(tmp_path: Path, values, message):
    with pytest.raises(UserError, match=message):
        Physics.load(path=own_file(tmp_path, **values))


def test_every_parameter_states_basis_and_source():
    for name, quantity in read_file(DATA_FOLDER / "h100_llama70b.json").parameters.items():
        assert len(quantity.source) > 10, name
