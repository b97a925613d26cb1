"""A run that is to end in time: it does, whatever the machine's rate, and its schedules end with it."""

import json
import time

import pytest

from dalle.budget import Budget, lasting, record
from dalle.checkpoint import write_json
from dalle.config import to_json
from dalle.metrics import read_metrics
from dalle.schedules import cosine
from dalle.states import newest_state
from dalle.training import REFIT
from stage1_dvae.config import PRESETS
from tests.unit.test_training import Regression, config


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when a test says so."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr("dalle.training.gemm_rate", lambda *_: 1e9)
    monkeypatch.setattr("os.fsync", lambda _handle: None)
    return now


class Timed(Regression):
    """Each update takes as long as the test says; the step size is a cosine over all of them."""

    def __init__(self, folder, clock, seconds_of, **changes):
        super().__init__(folder, config(eval_every=10_000, save_every=25, **changes))
        self.clock, self.seconds_of, self.lrs = clock, seconds_of, []
        self.began, self.halfway = clock[0], []
        write_json(folder / "config.json", {"format": 1, "training": to_json(self.config)})

    def begin(self, batches, run):
        self.clock[0] += self.seconds_of(len(self.lrs))

    def lr(self, step):
        self.lrs.append(cosine(step, self.config.steps, 0.1, 0.0))
        if self.clock[0] >= self.began + 120:
            self.halfway.append(self.lrs[-1])
        return self.lrs[-1]

    def run_for(self, minutes):
        return super().run(Budget(minutes, self.config, ()))


RATES = {
    "steady": lambda n: 1.0,
    "slower by half": lambda n: 1.0 if n < 60 else 2.0,
    "three times as slow in the middle": lambda n: 3.0 if 40 < n < 80 else 1.0,
    "three times as fast at the end": lambda n: 1.5 if n < 100 else 0.5,
    "slow to begin": lambda n: 20.0 if n == 0 else 1.0,
}


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("guess", [3, 5000])
def test_a_run_ends_in_time_and_its_schedule_with_it(tmp_path, clock, rate, guess):
    task = Timed(tmp_path, clock, RATES[rate], steps=guess)
    assert task.run_for(4.0)
    slowest = max(map(RATES[rate], range(1, 400)))
    assert -REFIT * slowest < clock[0] - task.began - 240 <= slowest
    assert len(task.lrs) == task.config.steps
    assert task.lrs[-1] < 0.1 * 0.01
    assert task.halfway[0] == pytest.approx(0.05, abs=0.01)  # at half of the time, whatever was made of it


def test_what_it_was_fitted_to_is_saved_with_it(tmp_path, clock):
    task = Timed(tmp_path, clock, RATES["steady"], steps=50)
    assert task.run_for(2.0)
    made = json.loads((tmp_path / "config.json").read_text())["training"]["steps"]
    assert made == newest_state(tmp_path / "state")[0].values["step"] == read_metrics(tmp_path)[-1]["step"]
    assert made == pytest.approx(120, abs=1)


def test_a_stopped_one_goes_on_to_the_end_that_it_had_then(tmp_path, clock):
    task = Timed(tmp_path, clock, RATES["steady"], steps=50)
    task.stop_at = 30
    assert not task.run_for(2.0)
    saved = json.loads((tmp_path / "config.json").read_text())["training"]["steps"]
    assert saved == pytest.approx(120, abs=1)
    again = Timed(tmp_path, clock, RATES["steady"], steps=saved)
    assert again.run()
    assert len(again.lrs) == saved - 30


def test_a_continued_one_looks_at_its_own_rate_every_so_many_updates(tmp_path, clock, monkeypatch):
    """Not after its first one, which is slow: what is fitted to that would end at once."""
    task = Timed(tmp_path, clock, RATES["steady"], steps=50)
    task.stop_at = 29
    assert not task.run_for(2.0)
    looked, steps = [], Budget.steps
    monkeypatch.setattr(
        Budget, "steps", lambda self, made, rate: looked.append(made) or steps(self, made, rate)
    )
    assert Timed(tmp_path, clock, RATES["steady"], steps=120).run_for(0.5)
    assert looked[:2] == [29 + REFIT, 29 + 2 * REFIT]


def test_what_config_json_says_beside_stays_when_the_time_is_fitted(tmp_path):
    write_json(tmp_path / "config.json", {"format": 1, "data": "scenes", "training": {}})
    record(tmp_path, config(steps=7))
    found = json.loads((tmp_path / "config.json").read_text())
    assert found == {"format": 1, "data": "scenes", "training": to_json(config(steps=7))}


def test_a_finished_one_trains_on_for_a_time(tmp_path, clock):
    assert Timed(tmp_path, clock, RATES["steady"], steps=20).run()
    task = Timed(tmp_path, clock, RATES["steady"], steps=20)
    assert task.run_for(1.0)
    assert task.config.steps == pytest.approx(80, abs=1)


def test_without_time_a_run_still_saves_what_it_made(tmp_path, clock):
    task = Timed(tmp_path, clock, lambda n: 100.0, steps=50)
    assert task.run_for(1.0)
    assert newest_state(tmp_path / "state")[0].values["step"] == 1


def test_spans_keep_their_share_and_nothing_else_changes():
    training = PRESETS["paper"][1]
    shorter = lasting(training, training.steps // 1000, ("tau_steps", "beta_steps"))
    assert (shorter.steps, shorter.tau_steps, shorter.beta_steps) == (3000, 150, 5)
    assert lasting(shorter, training.steps, ("tau_steps", "beta_steps")) == training


def test_time_over_is_no_time_left(clock):
    budget = Budget(1.0, config(), ())
    assert budget.left == 60
    assert budget.steps(made=7, rate=2.0) == 127
    clock[0] += 61
    assert budget.left == 0
    assert budget.steps(made=7, rate=2.0) == 7
