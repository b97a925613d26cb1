"""The loop: what happens when, and that a stopped run goes on as if it had not been."""

import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dalle.budget import Budget
from dalle.checkpoint import load_weights
from dalle.data.loader import Loader
from dalle.data.source import BadSample, Sample
from dalle.distributed import ALONE
from dalle.engine import Engine
from dalle.errors import CheckpointError
from dalle.metrics import read_metrics
from dalle.noise import keyed
from dalle.optim import AdamW, Average
from dalle.process import only_process
from dalle.states import Saver, newest_state, state_folders
from dalle.training import Session, Training, _name_skipped, alone, fit

STEPS, BATCH = 8, 4
TIMES = {
    "seconds",
    "pictures_per_second",
    "tokens_per_second",
    "flops_per_second",
    "of_gemm_rate",
    "data_wait",
}


class Points:
    """Thirteen samples, of which number 7 cannot be read."""

    name = "points"

    def __len__(self):
        return 13

    def __getitem__(self, index):
        if index == 7:
            raise BadSample("7", "torn")
        return Sample(Image.new("RGB", (1, 1)), self.captions(index), str(index))

    def captions(self, index):
        return (f"number {index}",)


def prepare(sample: Sample, rng: np.random.Generator):
    x = torch.from_numpy(np.random.default_rng(int(sample.key)).normal(size=5)).float()
    x = x + 0.1 * torch.from_numpy(rng.normal(size=5)).float()
    return x, (x * torch.arange(5.0)).sum(0, keepdim=True)


class Regression:
    """A linear regression whose loss has noise, and whose step size depends on the losses before."""

    label, tokens_per_picture, flops_per_picture = "toy", 3, 24

    def __init__(self, folder: Path, config: Training, *, stop_at: int = 0, crash_at: int = 0):
        torch.manual_seed(config.seed)
        self.model = nn.Linear(5, 1)
        self.folder, self.config = folder, config
        self.stop_at, self.crash_at = stop_at, crash_at
        self.sum, self.events = 0.0, []
        optimizer = AdamW(self.model, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay)
        self.engine = Engine(
            self.model, optimizer, Average(self.model.parameters(), config.ema_decay, config.ema_every),
            clip=config.clip, precision="fp32",
        )  # fmt: skip
        self.loader = Loader(Points(), prepare, batch_size=config.pictures_at_once(1), seed=config.seed)

    def run(self, budget: Budget | None = None) -> bool:
        return fit(Session(self, self.engine, self.loader, self.folder, ALONE, budget))

    def begin(self, batches, run):
        assert len(batches) == 2

    def loss(self, batch, step, positions):
        x, y = batch
        assert len(x) == len(positions) == self.config.micro_batch
        assert positions.start // BATCH == step
        micro = positions.start % BATCH // len(positions)
        self.events.append(f"loss {step}.{micro}")
        if micro == 0 and step + 1 == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if micro == 0 and step + 1 == self.crash_at:
            raise ZeroDivisionError
        noise = torch.randn(x.shape, generator=keyed(x.device, self.config.seed, step, micro))
        loss = (self.model(x + 0.1 * noise) - y).square().mean()
        return loss, {"micro": torch.tensor(float(micro))}

    def lr(self, step):
        self.events.append(f"lr {step}")
        return 0.1 / (1 + self.sum)

    def after(self, loss):
        self.events.append("after")
        self.sum += loss

    def evaluate(self, step):
        self.events.append(f"evaluate {step}")
        assert not self.model.training
        assert torch.equal(self.model.weight, self.engine.average.weights[0])
        return {"heldout_loss": float(self.model.weight.sum())}

    def state(self):
        self.events.append("state")
        return {"sum": self.sum}

    def load(self, state):
        self.events.append("load")
        self.sum = state["sum"]


def config(**changes) -> Training:
    values = {
        "steps": STEPS, "batch_size": BATCH, "micro_batch": 2, "lr": 0.1, "beta1": 0.9, "beta2": 0.96,
        "weight_decay": 0.1, "clip": 1.0, "ema_decay": 0.9, "ema_every": 1, "seed": 3, "workers": 0,
        "log_every": 1, "eval_every": 4, "save_every": 3, "keep": 2,
    }  # fmt: skip
    return Training(**{**values, **changes})


def outcome(task: Regression) -> tuple[dict, list[dict]]:
    """All that training made: every tensor of the last state, its values, the published weights, the log."""
    state, refused = newest_state(task.folder / "state")
    assert not refused
    flat = {f"{file}:{name}": state.read(file, name) for file in state.files() for name in state.names(file)}
    published = nn.Linear(5, 1)
    load_weights(task.folder, published)
    flat |= {f"published:{name}": w for name, w in published.state_dict().items()}
    log = [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(task.folder)]
    return {"state": state.values, **flat}, log


def assert_same(a, b):
    (tensors_a, log_a), (tensors_b, log_b) = a, b
    assert log_a == log_b
    assert tensors_a.keys() == tensors_b.keys()
    for name, value in tensors_a.items():
        same = value == tensors_b[name] if name == "state" else torch.equal(value, tensors_b[name])
        assert same, name


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _handle: None)  # slow, and nobody cuts the power here


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    task = Regression(tmp_path_factory.mktemp("whole"), config())
    assert task.run()
    return outcome(task)


def test_things_happen_in_order(tmp_path):
    task = Regression(tmp_path, config(steps=3, eval_every=2, save_every=2))
    assert task.run()
    step = ["loss {0}.0", "loss {0}.1", "lr {0}", "after"]
    first, second, third = ([event.format(n) for event in step] for n in range(3))
    saved = ["state"]
    assert task.events == [
        *first, *second, *saved, "evaluate 2",
        *third, *saved, "evaluate 3",
    ]  # fmt: skip


@pytest.mark.parametrize("save_every", [2, 3])
@pytest.mark.parametrize("stop_at", range(1, STEPS))
def test_a_run_stopped_at_any_step_ends_as_an_uninterrupted_one(
    tmp_path, capsys, uninterrupted, stop_at, save_every
):
    stopped = Regression(tmp_path, config(save_every=save_every), stop_at=stop_at)
    assert not stopped.run()
    err = capsys.readouterr().err
    assert f"stopped after step {stop_at} of {STEPS}, saved; the same command goes on from there" in err
    assert newest_state(tmp_path / "state")[0].values["step"] == stop_at
    resumed = Regression(tmp_path, config(save_every=save_every))
    assert resumed.run()
    assert f"toy: going on from step {stop_at} in {tmp_path}" in capsys.readouterr().err
    owed = ["evaluate 4"] if stop_at == 4 else []  # the stop did not wait for it
    assert f"evaluate {stop_at}" not in stopped.events
    assert resumed.events[: 2 + len(owed)] == ["load", *owed, f"loss {stop_at}.0"]
    assert_same(outcome(resumed), uninterrupted)


@pytest.mark.parametrize("crash_at", range(1, STEPS + 1))
def test_a_run_that_died_at_any_step_ends_as_an_uninterrupted_one(tmp_path, uninterrupted, crash_at):
    died = Regression(tmp_path, config(), crash_at=crash_at)
    with pytest.raises(ZeroDivisionError):
        died.run()
    resumed = Regression(tmp_path, config())
    assert resumed.run()
    saved = (crash_at - 1) // 3 * 3
    assert f"loss {saved}.0" in resumed.events[:2]
    assert_same(outcome(resumed), uninterrupted)


@pytest.mark.parametrize("fail_at", [4, STEPS])
def test_what_an_evaluation_fails_on_costs_no_update(tmp_path, monkeypatch, uninterrupted, fail_at):
    evaluate = Regression.evaluate

    def fail(self, step):
        if step == fail_at:
            raise RuntimeError("out of memory")
        return evaluate(self, step)

    monkeypatch.setattr(Regression, "evaluate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        Regression(tmp_path, config(save_every=4)).run()
    monkeypatch.setattr(Regression, "evaluate", evaluate)
    resumed = Regression(tmp_path, config(save_every=4))
    assert resumed.run()
    assert resumed.events[:2] == ["load", f"evaluate {fail_at}"]
    assert_same(outcome(resumed), uninterrupted)


def test_lost_or_damaged_weights_come_back_from_the_state(tmp_path, capfd):
    assert Regression(tmp_path, config()).run()
    weights = tmp_path / "weights.safetensors"
    before = weights.read_bytes()
    capfd.readouterr()
    for damage in (weights.unlink, lambda: weights.write_bytes(before[:-1]), lambda: None):
        damage()
        damaged = not weights.exists() or weights.read_bytes() != before
        assert Regression(tmp_path, config()).run()
        assert weights.read_bytes() == before
        assert ("written anew from the training state" in capfd.readouterr().err) == damaged


def test_a_run_whose_last_updates_changed_nothing_says_so(tmp_path, capfd):
    for name in ("nan", "fine"):
        (tmp_path / name).mkdir()
    task = Regression(tmp_path / "nan", config())
    task.loss = lambda *_: (task.model.weight.sum() * math.nan, {"micro": torch.zeros(())})
    assert task.run()
    assert f"the gradient of the last {STEPS} updates was not finite" in capfd.readouterr().err
    assert Regression(tmp_path / "fine", config()).run()
    assert "not finite" not in capfd.readouterr().err


def test_a_run_that_is_lengthened_ends_as_one_of_that_length(tmp_path, uninterrupted):
    assert Regression(tmp_path, config(steps=5, eval_every=9)).run()
    task = Regression(tmp_path, config())
    assert task.run()
    assert_same((outcome(task)[0], []), (uninterrupted[0], []))


def test_the_log_has_a_line_every_so_many_steps_and_at_the_end(tmp_path):
    Regression(tmp_path, config(steps=7, log_every=3, eval_every=4)).run()
    lines = read_metrics(tmp_path)
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [3, 6, 7]
    assert set(training[0]) == {"step", "loss", "micro", "lr", "grad_norm", "dropped_updates", *TIMES}
    assert all(line["micro"] == 0.5 for line in training)  # the mean of micro-batches 0 and 1
    assert [line["step"] for line in lines if "heldout_loss" in line] == [4, 7]
    assert [line["step"] for line in lines] == [3, 4, 6, 7, 7]


def test_the_gradient_of_an_update_is_the_mean_of_its_micro_batches(tmp_path):
    task = Regression(tmp_path, config(steps=1))
    task.loss = lambda *_: (task.model.weight.sum() + task.model.bias.sum(), {"micro": torch.zeros(())})
    assert task.run()
    assert read_metrics(tmp_path)[0]["grad_norm"] == pytest.approx(6**0.5)


def test_lines_hold_means_over_their_window(tmp_path, uninterrupted):
    task = Regression(tmp_path, config(log_every=4))
    task.run()
    single = [line["loss"] for line in uninterrupted[1] if "loss" in line]
    means = [line["loss"] for line in outcome(task)[1] if "loss" in line]
    assert means == pytest.approx([sum(single[:4]) / 4, sum(single[4:]) / 4], rel=1e-5)


def test_rates_count_neither_saving_nor_evaluating(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("dalle.console.time", SimpleNamespace(monotonic=lambda: now[0]))

    def taking(seconds, of):
        def later(*arguments):
            now[0] += seconds
            return of(*arguments)

        return later

    for name, seconds in (("loss", 1), ("state", 100), ("evaluate", 1000)):
        monkeypatch.setattr(Regression, name, taking(seconds, getattr(Regression, name)))
    often = config(steps=6, eval_every=2, save_every=1)
    assert not Regression(tmp_path, often, stop_at=4).run()
    assert Regression(tmp_path, often).run()
    lines = [line for line in read_metrics(tmp_path) if "loss" in line]
    assert [line["seconds"] for line in lines] == [2] * 6  # two micro-batches
    assert [line["pictures_per_second"] for line in lines] == [2] * 6


class Slow:
    """A loader whose batches take so many seconds each."""

    def __init__(self, loader, now, seconds=3.0):
        self.loader, self.now, self.seconds, self.skipped = loader, now, seconds, {}

    def batches(self, start, stride):
        for batch in self.loader.batches(start, stride):
            self.now[0] += self.seconds
            yield batch


def test_what_is_waited_for_and_how_fast_it_goes_is_told(tmp_path, monkeypatch, capsys):
    now, loss = [0.0], Regression.loss
    for module in ("dalle.console", "dalle.training"):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("dalle.training.gemm_rate", lambda *_: 24.0)

    def in_a_second(*arguments):
        now[0] += 1
        return loss(*arguments)

    monkeypatch.setattr(Regression, "loss", in_a_second)
    task = Regression(tmp_path, config(steps=2))
    task.loader = Slow(task.loader, now)
    assert task.run()
    lines = [line for line in read_metrics(tmp_path) if "loss" in line]
    assert [line["data_wait"] for line in lines] == [0.75] * 2
    # Four pictures in eight seconds, of three tokens and 24 operations each
    assert "0.125 steps/s · 0 s left · tokens/s 2 · of GEMM rate 50%" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "warned"), [(3, True), (0.5, False)])
def test_training_that_waits_for_its_pictures_says_so_once(tmp_path, monkeypatch, capsys, seconds, warned):
    now, loss = [0.0], Regression.loss
    for module in ("dalle.console", "dalle.training"):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("dalle.training.SETTLED", 2)

    def in_a_second(*arguments):
        now[0] += 1
        return loss(*arguments)

    monkeypatch.setattr(Regression, "loss", in_a_second)
    task = Regression(tmp_path, config(steps=3))
    task.loader = Slow(task.loader, now, seconds)
    assert task.run()
    assert "waiting" not in capsys.readouterr().err  # the first updates wait for the readers to start
    task = Regression(tmp_path, config(steps=12))
    task.loader = Slow(task.loader, now, seconds)
    assert task.run()
    expected = "toy: 75% of the time is spent waiting for pictures: --set workers=…"
    assert capsys.readouterr().err.count(expected) == warned


def test_the_time_left_is_said_once_the_rate_has_settled_of_a_continued_run_too(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("dalle.training.SETTLED", 2)
    for stop_at in (3, 0):
        Regression(tmp_path, config(), stop_at=stop_at).run()
        assert capsys.readouterr().err.count("for the remaining steps") == 1


def test_a_finished_run_says_so_and_does_nothing(tmp_path, capsys):
    Regression(tmp_path, config(steps=2)).run()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    capsys.readouterr()
    task = Regression(tmp_path, config(steps=2))
    assert task.run()
    assert f"toy: {tmp_path} has its 2 steps already; a larger --steps trains on" in capsys.readouterr().err
    assert task.events == ["load"]
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_only_so_many_states_are_kept(tmp_path):
    Regression(tmp_path, config(save_every=1, keep=3)).run()
    assert [path.name for path in state_folders(tmp_path / "state")] == [
        f"step-0000000{n}" for n in (8, 7, 6)
    ]


def test_a_run_whose_weights_could_not_be_written_is_not_taken_for_finished(tmp_path, monkeypatch):
    task = Regression(tmp_path, config(steps=2))

    copyfile = shutil.copyfile

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(CheckpointError, match="No space left"):
        task.run()
    monkeypatch.setattr(shutil, "copyfile", copyfile)
    assert not state_folders(tmp_path / "state")
    again = Regression(tmp_path, config(steps=2))
    assert again.run()
    assert (tmp_path / "weights.safetensors").exists()


def test_a_run_that_could_not_save_stops_rather_than_train_on_for_nothing(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    save = Saver.save

    def save_and_fail(saver, *state):
        save(saver, *state)
        saver._thread.join()  # known before the next update begins

    monkeypatch.setattr(Saver, "save", save_and_fail)
    task = Regression(tmp_path, config(save_every=3))
    with pytest.raises(CheckpointError, match="No space left"):
        task.run()
    assert task.events.count("after") == 3
    assert not list((tmp_path / "state").iterdir())


def test_a_harmed_state_is_named_and_the_one_before_taken(tmp_path, capsys, uninterrupted):
    Regression(tmp_path, config(), stop_at=7).run()
    newest = state_folders(tmp_path / "state")[0]
    (newest / "weights.safetensors").write_bytes(b"")
    capsys.readouterr()
    task = Regression(tmp_path, config())
    assert task.run()
    err = capsys.readouterr().err
    assert f"warning: {newest / 'weights.safetensors'} is not what was saved" in err
    assert "going on from step 6" in err
    assert_same(outcome(task), uninterrupted)


def test_states_of_which_none_is_whole_are_not_overwritten_by_a_new_start(tmp_path):
    Regression(tmp_path, config(), stop_at=1).run()
    (state_folders(tmp_path / "state")[0] / "state.json").unlink()
    task = Regression(tmp_path, config())
    with pytest.raises(CheckpointError, match=r"no training state in .* is whole; delete .* to start anew"):
        task.run()
    assert task.events == []


@pytest.mark.parametrize(("steps", "copies"), [(2, 0), (3, 1), (7, 2)])
def test_updates_are_counted_from_1_for_the_average(tmp_path, monkeypatch, steps, copies):
    task, seen = Regression(tmp_path, config(steps=steps, ema_every=3)), []
    update = task.engine.average.update

    def watch(parameters, step):
        before = task.engine.average.weights[0].clone()
        update(parameters, step)
        seen.append(not torch.equal(before, task.engine.average.weights[0]))

    monkeypatch.setattr(task.engine.average, "update", watch)
    task.run()
    assert [step for step, moved in enumerate(seen, 1) if moved] == [3, 6][:copies]


def test_skipped_pictures_are_named_once(tmp_path, capsys):
    Regression(tmp_path, config()).run()
    err = capsys.readouterr().err
    assert err.count("skipped 7: torn") == 1
    assert "1 pictures were skipped" in err


def test_of_what_all_processes_skipped_ten_are_named_and_all_counted(capsys):
    _name_skipped([{f"{process}.{n}": "torn" for n in range(6)} for process in range(2)])
    err = capsys.readouterr().err
    assert err.count(": torn") == 10
    assert "skipped 1.3: torn" in err
    assert "12 pictures were skipped" in err


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python ≥ 3.12
def test_the_folder_is_held_while_training_and_free_afterwards(tmp_path, monkeypatch):
    task, held = Regression(tmp_path, config(steps=1)), []

    def look(self):
        # this process holds the lock, so only another one can tell
        if (pid := os.fork()) == 0:
            try:
                with only_process(tmp_path):
                    os._exit(0)
            except CheckpointError:
                os._exit(7)
        held.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        return {}

    monkeypatch.setattr(Regression, "state", look)
    with alone(tmp_path, ALONE):
        task.run()
    look(task)
    assert held == [7, 0]
