"""Priors on two machines of two processes, their gradients compressed between the machines."""

import pytest

from tests.distributed.compressed import CASES, STAGES, STEPS, course, run, session

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """All stages, in one start of 2 × 2 processes."""
    return run(2, 2, "stages", tmp_path_factory.mktemp("machines"))


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


def test_one_machine_goes_on_from_two_with_what_they_left_unsent(tmp_path, machines):
    legs = [(2, 2, 2), (1, 2, 3)]
    found = [run(m, p, "leg", tmp_path, zero, 2) for m, p, zero in legs]
    assert [leg["machines"] for leg in found] == [[2], [1]]
    losses = [loss for leg in found for loss in leg["loss"]]
    assert losses[:3] == pytest.approx(machines["compressed 2"]["loss"][:3], rel=1e-5)
    assert losses == pytest.approx(course(session(), 0, 4)["loss"], rel=0.05)
