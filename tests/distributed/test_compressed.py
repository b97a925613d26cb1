"""Priors on two machines of two processes, their gradients compressed between the machines."""

import pytest

from tests.distributed.compressed import CASES, STAGES, STEPS, course, session

pytestmark = pytest.mark.distributed

TEAM = "tests.distributed.compressed"


@pytest.fixture(scope="module")
def found(teams):
    """All stages, in one start of 2 × 2 processes."""
    return teams(TEAM, "stages+alike", local=2, machines=2)


@pytest.fixture(scope="module")
def machines(found):
    return found["stages"]


@pytest.fixture(scope="module")
def alone():
    """One process that averages nothing."""
    return course(session(), 0, STEPS)


@pytest.mark.parametrize("zero", STAGES)
def test_machines_that_average_in_full_train_as_one_process(machines, alone, zero):
    found = machines[f"full {zero}"]
    assert found["loss"] == pytest.approx(alone["loss"], rel=2e-6)
    assert found["grad_norm"] == pytest.approx(alone["grad_norm"], rel=4e-5)
    assert set(found["between_saved"]) == {0.0}


@pytest.mark.parametrize(("kind", "zero"), [case for case in CASES if case[0] != "full"])
def test_after_the_start_the_bytes_are_those_of_the_formula(machines, kind, zero):
    found = machines[f"{kind} {zero}"]
    assert found["between_saved"][0] == 0.0
    assert set(found["between_bytes"][1:]) == {float(found["bytes"])}
    assert found["between_saved"][-1] > (0.75 if kind == "fp32" else 0.85)


@pytest.mark.parametrize(("kind", "zero"), CASES)
def test_machines_hold_the_same_bits_and_a_save_would_find_one_that_is_not(machines, kind, zero):
    assert machines[f"{kind} {zero}"]["same"]


@pytest.mark.parametrize("zero", STAGES)
def test_machines_begin_with_the_weights_of_the_first(found, zero):
    assert found["alike"][str(zero)]


@pytest.mark.parametrize("zero", STAGES)
def test_compressed_gradients_train_and_resemble_the_true_ones(machines, alone, zero):
    found = machines[f"compressed {zero}"]
    assert found["loss"][:2] == pytest.approx(alone["loss"][:2], rel=2e-6)  # the first update is in full
    assert found["loss"][2:] != pytest.approx(alone["loss"][2:], rel=1e-5)
    assert found["loss"] == pytest.approx(alone["loss"], rel=0.05)
    cosines = [c for c in found["between_cosine"] if c is not None]
    assert len(cosines) == STEPS // 3
    assert all(0.4 < c < 0.95 for c in cosines), cosines
    assert [s is not None for s in found["between_plain_seconds"]] == [False, False, True] * (STEPS // 3)


@pytest.mark.parametrize("zero", STAGES)
def test_moments_in_16_bits_work_at_every_stage(machines, zero):
    packed, plain = machines[f"packed {zero}"], machines[f"compressed {zero}"]
    assert packed["moments"] == "torch.uint16"
    # Adam's first updates divide by moments of a few steps: a rounding there is a difference of ±lr.
    assert packed["loss"] == pytest.approx(plain["loss"], rel=2e-2)


def relay(teams, folder, legs, kind):
    """Losses of a run in legs of two updates each, on these (machines, processes, ZeRO stage)."""
    found = [teams(TEAM, "leg", folder, zero, 2, kind, local=p, machines=m)["leg"] for m, p, zero in legs]
    assert [leg["machines"] for leg in found] == [[m] for m, _, _ in legs]
    return [loss for leg in found for loss in leg["loss"]]


# Two machines of two processes, one of two, four of one. A save fails where machines differ in one bit.
CHAIN = [(2, 2, 2), (1, 2, 3), (4, 1, 1)]


def test_other_numbers_of_machines_that_average_in_full_make_the_curve_of_one_process(tmp_path, teams, alone):
    assert relay(teams, tmp_path, CHAIN, "full") == pytest.approx(alone["loss"], rel=2e-6)


def test_other_numbers_of_machines_go_on_with_what_was_left_unsent(tmp_path, teams, machines, alone):
    losses = relay(teams, tmp_path, CHAIN, "compressed")
    assert losses[:3] == pytest.approx(machines["compressed 2"]["loss"][:3], rel=1e-5)
    # From there the courses part: one machine adds all that is left, and four cut no matrix in two.
    assert losses == pytest.approx(alone["loss"], rel=0.02)


def test_four_machines_go_on_as_two_would_but_for_rounding(tmp_path, teams, machines):
    """Where nothing is partitioned, an update depends on the mean of the error sums alone."""
    losses = relay(teams, tmp_path, [(2, 2, 0), (4, 1, 0), (2, 2, 0)], "fp32")
    assert losses == pytest.approx(machines["fp32 0"]["loss"], rel=1e-5)
    assert losses[3:] != pytest.approx(machines["full 0"]["loss"][3:], rel=1e-4)
