"""Several processes at every ZeRO stage train as one does. `make test-distributed` runs these."""

import math

import pytest

from tests.distributed.team import COURSES, SICK, SICK_STEP, STAGES, STEPS, curve, halved, key, session, train
from tests.distributed.warm import SLURM

pytestmark = pytest.mark.distributed

TEAM = "tests.distributed.team"
PRECISIONS = ("fp32", "bf16", "fp16")
# Relative differences of losses that the order of additions explains: in fp32 only sums over processes and
# micro-batches are ordered otherwise; in 16 bits a batch cut in other parts rounds otherwise too.
TOLERANCE = {"fp32": 2e-6, "bf16": 2e-3, "fp16": 2e-4}
SCALED = [f"layers.{i}.{branch}" for i in range(3) for branch in ("attention", "mlp")]


@pytest.fixture(scope="module")
def alone():
    """One process without DeepSpeed."""
    return {precision: curve(precision=precision) for precision in PRECISIONS}


@pytest.fixture(scope="module", params=[2, 4])
def team(request, teams):
    """All that is asked of so many processes, in one start of them."""
    return teams(TEAM, "matrix+sick", local=request.param)


def test_losses_and_norms_are_those_of_one_process(team, alone):
    for parts, precision in COURSES:
        expected, near = alone[precision], TOLERANCE[precision]
        for zero in STAGES:
            found, where = team["matrix"][key(zero, parts, precision)], (zero, parts, precision)
            assert found["loss"] == pytest.approx(expected["loss"], rel=near), where
            assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=20 * near), where
            assert found["heldout"] == pytest.approx(expected["heldout"], rel=near), where
            assert found["after"] == pytest.approx(expected["after"], rel=near), where
            assert found["log2_scales"] == expected["log2_scales"]


def test_the_losses_would_tell_a_wrong_gradient(alone):
    """Gradients that are clipped at another norm, which Adam nearly forgives, are far outside of it."""
    one = session(clip=None)
    other = [line["loss"] for line in train(one, 0, STEPS)]
    assert max(abs(a / b - 1) for a, b in zip(other, alone["fp32"]["loss"], strict=True)) > 1e-4


def test_an_infinity_in_one_process_shrinks_one_scale_everywhere_and_the_run_goes_on(team):
    expected = curve(precision="fp16", sick=True)
    place = SCALED.index(SICK)
    for zero in STAGES:
        found = team["sick"][str(zero)]
        assert found["dropped_updates"] == [float(step == SICK_STEP) for step in range(STEPS)], zero
        for step, scales in enumerate(found["log2_scales"], 1):
            grown = [13 + step / 1000] * len(SCALED)
            if step > SICK_STEP:
                grown[place] = 13 + (step - 1) / 1000 - 0.5
            assert scales == pytest.approx(grown, abs=1e-9), zero
        assert [counts[place] for counts in found["overflows"]] == [0, 0, 1, 1]
        assert sum(map(sum, found["overflows"])) == 2
        assert not math.isfinite(found["grad_norm"][SICK_STEP])
        assert found["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE["fp16"]), zero
        assert found["after"] == pytest.approx(expected["after"], rel=TOLERANCE["fp16"]), zero


@pytest.fixture(scope="module")
def two(teams):
    return teams(TEAM, "born+alike+refused+offloaded+muon+halved+gathered", local=2)


def test_slurm_starts_the_same(teams, two):
    assert teams(TEAM, "born", local=2, names=SLURM)["born"] == two["born"]


@pytest.mark.parametrize("zero", STAGES)
def test_the_weights_at_the_start_are_those_of_one_process_bit_for_bit(two, zero):
    assert two["born"][str(zero)] == []


def test_without_zero_all_begin_with_the_weights_of_the_first(two):
    """What each finds by itself, clusters of patches say, may differ in the last bits between machines."""
    first, second = two["alike"]
    assert first == second


@pytest.mark.parametrize("zero", STAGES)
def test_the_state_of_another_model_is_refused(two, zero):
    assert two["refused"][str(zero)][0].startswith("holds no ")


@pytest.mark.parametrize("zero", STAGES)
def test_an_infinity_is_told_alike_by_all_processes_wherever_it_lies(two, zero):
    first, second = two["refused"][str(zero)][1:]
    assert "first in start_of_text" in first
    assert first == second == two["refused"]["0"][1]


@pytest.mark.parametrize(("work", "changes"), [("relay", {}), ("relay_with_muon", {"optimizer": "muon"})])
def test_a_state_passes_from_stage_to_stage_bit_for_bit_and_the_losses_go_on(teams, tmp_path, work, changes):
    relay = teams(TEAM, work, tmp_path, local=2)[work]
    assert relay["differ"] == {
        "turn 1, into 0": [], "turn 2, into 3": [], "turn 3, into 1": [], "turn 4, into 3": [],
    }  # fmt: skip
    losses = [line["loss"] for line in train(session(precision="fp16", **changes), 0, 10)]
    assert relay["losses"] == pytest.approx(losses, rel=TOLERANCE["fp16"])


@pytest.mark.parametrize("zero", STAGES)
def test_matrices_are_orthogonalised_whole(two, alone, zero):
    found, expected = two["muon"][str(zero)], curve(optimizer="muon")
    for name in ("loss", "heldout", "after"):
        assert found[name] == pytest.approx(expected[name], rel=TOLERANCE["fp32"])
    assert found["after"] != pytest.approx(alone["fp32"]["after"], rel=1e-4)  # AdamW goes elsewhere


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_an_optimizer_in_main_memory_makes_the_same_updates(two, alone, zero):
    found, expected = two["offloaded"][str(zero)], alone["fp32"]
    for name in ("loss", "heldout", "after"):
        assert found[name] == pytest.approx(expected[name], rel=TOLERANCE["fp32"])


def test_weights_in_fp16_stay_the_same_in_every_process(two):
    found, expected = two["halved"], halved()
    assert found["halved"] == expected["halved"] > 0
    assert found["loss"] == pytest.approx(expected["loss"], rel=5e-3)  # some are rounded the other way
    first, second = found["sums"]
    assert first == second


def test_a_layer_is_whole_only_while_it_runs(two):
    """In the forward pass, and again from the last to the first where the backward pass recomputes."""
    order = [0, 1, 2, 2, 1, 0]
    assert two["gathered"] == [[f"layers.{layer}"] for layer in order]
