"""A training that was killed, or stopped, ends as if it had not been."""

import fcntl
import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from dalle.metrics import read_metrics
from dalle.states import State, state_folders
from tests.e2e.settings import begin, dvae, options, prior

STEPS = 60
LAST = f"step-{STEPS:08d}"
OFTEN = options(save_every=2, eval_every=10, log_every=1)
# Measured by a clock, or over a window of recent updates that begins anew with the process.
PASSING = (
    "seconds", "pictures_per_second", "tokens_per_second", "flops_per_second", "of_gemm_rate", "data_wait",
    "codebook_usage", "codebook_perplexity",
)  # fmt: skip
COMMANDS = {"dvae": dvae, "prior": prior}
ENDLESS = 10**6  # updates; a stop comes before, however slowly
# With these no schedule follows from the number of updates.
SCHEDULES = {
    "dvae": options(warmup=2, lr_steps=STEPS, beta_steps=STEPS, tau_steps=STEPS),
    "prior": options(warmup=2, lr_schedule="plateau", patience=2),
}


def result(folder: Path, last: str = LAST) -> dict[str, object]:
    """All that a finished run holds, but for what passes with the process."""
    files = {path.name: path.read_bytes() for path in sorted((folder / "state" / last).iterdir())}
    lines = [{k: v for k, v in line.items() if k not in PASSING} for line in read_metrics(folder)]
    drawn = {path.name: path.read_bytes() for path in (folder / "pictures").iterdir()}
    weights = (folder / "weights.safetensors").read_bytes()
    return {**files, "weights of the model": weights, "metrics": lines, **drawn}


def assert_same(one: dict[str, object], other: dict[str, object]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


@pytest.fixture(scope="module")
def straight(dalle, tmp_path_factory) -> Path:
    """Both stages, trained without a break."""
    run = tmp_path_factory.mktemp("straight") / "run"
    for command in COMMANDS.values():
        done = dalle(*command(run, *OFTEN, steps=STEPS))
        assert done.code == 0, done.err
    return run


@pytest.mark.parametrize("stage", ["dvae", "prior"])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(dalle, straight, tmp_path, stage):
    run = begin(straight, tmp_path, stage)
    arguments = COMMANDS[stage](run, *OFTEN, steps=STEPS)
    moments, ends = random.Random(2), []
    while not ends or ends[-1] != 0:
        command = dalle.start(*arguments)
        if len(ends) < 6:
            # Its first seconds are always the same, so wait for them; then anything may be under way.
            if moments.random() < 0.8:
                command.wait_for(
                    "going on from step" if state_folders(run / stage / "state") else " · cpu fp32"
                )
            time.sleep(moments.random() ** 2 * 0.8)
            command.signal(signal.SIGKILL)
        ends.append(command.done().code)
        assert ends[-1] in (0, -signal.SIGKILL)
        for path in state_folders(run / stage / "state"):
            State(path)  # what is there is whole
    assert -signal.SIGKILL in ends
    assert_same(result(run / stage), result(straight / stage))
    assert not list(run.rglob("*.partial"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("stage", ["dvae", "prior"])
def test_a_stop_saves_first_and_the_run_goes_on_as_if_unbroken(dalle, straight, tmp_path, stage, number):
    run = begin(straight, tmp_path, stage)
    rarely = [*options(save_every=ENDLESS, eval_every=10, log_every=1), *SCHEDULES[stage]]
    command = dalle.start(*COMMANDS[stage](run, *rarely, steps=ENDLESS))
    command.wait_for(" · cpu fp32")
    metrics = run / stage / "metrics.jsonl"
    while not metrics.exists() or not metrics.read_text():
        time.sleep(0.002)
    command.signal(number)
    done = command.done()
    assert "finishing this step and saving" in done.err
    assert "Traceback" not in done.err
    (saved,) = state_folders(run / stage / "state")
    step = json.loads((saved / "state.json").read_text())["step"]
    assert step >= 1
    assert done.code == 1
    assert f"stopped after step {step:,} of {ENDLESS:,}, saved; the same command goes on" in done.err
    assert (run / stage / "weights.safetensors").is_file()

    later = step + 5
    done = dalle(*COMMANDS[stage](run, *rarely, steps=later))
    assert done.code == 0, done.err
    assert f"going on from step {step:,} in" in done.err
    unbroken = begin(straight, tmp_path / "unbroken", stage)
    assert dalle(*COMMANDS[stage](unbroken, *rarely, steps=later)).code == 0
    assert_same(*(result(one / stage, f"step-{later:08d}") for one in (run, unbroken)))


def test_more_steps_on_a_finished_run_train_on(dalle, straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight / "dvae", run / "dvae")
    done = dalle("train-dvae", "--run", run, "--steps", STEPS + 2)
    assert done.code == 0, done.err
    assert f"going on from step {STEPS}" in done.err
    assert read_metrics(run / "dvae")[-1]["step"] == STEPS + 2


def test_a_damaged_newest_state_is_told_and_the_one_before_it_used(dalle, straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight / "dvae", run / "dvae")
    damaged = run / "dvae" / "state" / LAST / "moments.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    done = dalle(*dvae(run, *OFTEN, steps=STEPS))
    assert done.code == 0, done.err
    assert "moments.safetensors is not what was saved" in done.err
    assert f"going on from step {STEPS - 2}" in done.err
    assert_same(result(run / "dvae"), result(straight / "dvae"))


def test_two_processes_do_not_train_in_one_folder(dalle, tmp_path):
    run = tmp_path / "run"
    assert dalle(*dvae(run, steps=1)).code == 0
    with (run / "dvae" / ".lock").open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        before = (run / "dvae" / "config.json").read_bytes()
        done = dalle(*dvae(run, steps=2))
    assert done.code == 2
    assert "error: another process is training in" in done.err
    # the other's, which says what its weights are
    assert (run / "dvae" / "config.json").read_bytes() == before


def test_a_stage_is_not_built_on_one_that_is_being_trained(dalle, straight, tmp_path):
    """The other would save another dVAE in its end, and no prior fits that."""
    run = begin(straight, tmp_path, "prior")
    with (run / "dvae" / ".lock").open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        done = dalle(*prior(run, steps=1))
        assert done.code == 2
        assert "dvae is being trained: wait until that has ended" in done.err
        assert not (run / "prior").exists()
    (run / "prior").mkdir()
    with (run / "prior" / ".lock").open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        done = dalle("train-dvae", "--run", run, "--steps", STEPS + 2)
    assert done.code == 2
    assert "prior is being trained on this dVAE: wait for it" in done.err


def test_a_prior_on_a_dvae_that_was_stopped_is_warned_of(dalle, straight, tmp_path):
    run = begin(straight, tmp_path, "prior")
    shutil.rmtree(run / "dvae" / "state" / LAST)
    done = dalle(*prior(run, steps=1))
    assert done.code == 0, done.err
    assert f"dvae was stopped after {STEPS - 2} of {STEPS} steps, and is used as it is" in done.err
    assert "dvae was stopped" not in dalle(*prior(run, steps=2)).err  # no longer news


def test_a_damaged_training_section_of_the_dvae_is_told_in_one_line(dalle, straight, tmp_path):
    run = begin(straight, tmp_path, "prior")
    path = run / "dvae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"training": 3}))
    done = dalle(*prior(run, steps=1))
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert str(path) in done.err
    assert "\n" not in done.err.strip()


def test_verifying_a_resume_writes_nothing_into_the_run(dalle, straight):
    def found():
        return {path: path.stat().st_mtime_ns for path in straight.rglob("*")}

    before = found()
    done = dalle("verify-resume", straight)
    assert done.code == 0, done.err
    assert found() == before
