"""`verify_resume` says identical where it is so, and names what is not."""

import os

import pytest
import torch

from dalle.distributed import ALONE, Part
from dalle.errors import CheckpointError
from dalle.states import State, write_state
from dalle.training import Session
from dalle.verify import first_difference, verify_resume
from tests.unit.test_training import Regression, config


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _handle: None)


def sessions(folder, task=Regression):
    def prepare():
        one = task(folder, config(steps=5))
        return Session(one, one.engine, one.loader, folder, ALONE)

    return prepare


def test_a_run_that_is_resumed_exactly_is_identical_and_left_alone(tmp_path):
    assert Regression(tmp_path, config(steps=5)).run()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert verify_resume(sessions(tmp_path)) is None
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_run_that_is_being_trained_is_not_verified(tmp_path, monkeypatch):
    assert Regression(tmp_path, config(steps=5)).run()
    monkeypatch.setattr("dalle.verify.held", lambda folder: folder == tmp_path)
    with pytest.raises(CheckpointError, match="is being trained: wait until that has ended"):
        verify_resume(sessions(tmp_path))


def test_it_asks_for_deterministic_operations_while_it_lasts(tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert Regression(tmp_path, config(steps=5)).run()
    prepare, seen = sessions(tmp_path), []

    def setting():
        return torch.get_deterministic_debug_mode(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")

    def look():
        seen.append(setting())
        return prepare()

    assert verify_resume(look) is None
    assert seen == 3 * [(1, ":4096:8")]
    assert setting() == (0, None)


class Forgetful(Regression):
    """Its step size depends on the losses before, which it does not save."""

    def state(self):
        return {"sum": 0.0}


def test_what_a_task_forgets_shows_in_a_tensor(tmp_path):
    assert Forgetful(tmp_path, config(steps=5)).run()
    assert verify_resume(sessions(tmp_path, Forgetful)).startswith("average: bias (number 0 of 1: ")


def test_moments_that_are_not_saved_show(tmp_path, monkeypatch):
    assert Regression(tmp_path, config(steps=5)).run()
    prepare = sessions(tmp_path)

    def without_moments():
        session = prepare()
        monkeypatch.setattr(session.engine.optimizer, "load_moments", list)
        return session

    found = verify_resume(without_moments)
    assert found is not None
    assert found.startswith("average: ")


def test_a_run_without_a_state_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="has no training state: train it first"):
        verify_resume(sessions(tmp_path))


@pytest.mark.parametrize(
    ("tensors", "values", "expected"),
    [
        ({"w": torch.tensor([1.0, 2.0])}, {}, None),
        ({"w": torch.tensor([1.0, 2.5])}, {}, "weights: w (number 1 of 2: 2 against 2.5)"),
        ({"w": torch.tensor([1.0])}, {}, "weights: w (torch.float32, (2,) against torch.float32, (1,))"),
        ({"w": torch.tensor([1.0, 2.0]), "b": torch.ones(1)}, {}, "weights: b (only in one)"),
        ({"w": torch.tensor([1.0, 2.0])}, {"more": 3}, "more: None against 3"),
    ],
)
def test_the_first_difference_is_named(tmp_path, tensors, values, expected):
    def state(name, tensors, values):
        parts = {"weights": {n: Part(tuple(t.shape), 0, t) for n, t in tensors.items()}}
        return State(write_state(tmp_path / name, 1, parts, values, 1))

    one = state("a", {"w": torch.tensor([1.0, 2.0])}, {})
    assert first_difference(one, state("b", tensors, values)) == expected


def test_not_a_number_is_equal_to_itself_and_zero_has_a_sign(tmp_path):
    def state(name, *numbers):
        values = torch.tensor(numbers)
        return State(write_state(tmp_path / name, 1, {"weights": {"w": Part((2,), 0, values)}}, {}, 1))

    assert first_difference(state("a", 0.0, float("nan")), state("b", 0.0, float("nan"))) is None
    assert first_difference(state("c", 0.0, 1.0), state("d", -0.0, 1.0)) is not None
