"""Whole runs of the command line in several processes: elastic, stopped, killed, refused."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dalle.metrics import read_metrics
from dalle.states import State, newest_state, state_folders
from tests.e2e.settings import DVAE, begin, dvae, options, prior

pytestmark = pytest.mark.distributed

STEPS = 12
OFTEN = options(batch_size=4, save_every=3, eval_every=6, log_every=1, micro_batch=2)
# No schedule may follow from `steps`, which is another one in each part of a run. The prior halves its step
# size when the loss, which is part of the state, stops falling: it does so at some of these steps. The dVAE's
# samples stay soft: at a temperature of 1/16 rounding errors become hundredths within these steps.
SOFT = options(tau_start=1.0, tau=0.5)
SETTINGS = {
    "dvae": OFTEN + SOFT + options(warmup=2, lr_steps=STEPS, beta_steps=STEPS, tau_steps=STEPS),
    "prior": OFTEN + options(warmup=2, lr_schedule="plateau", patience=2),
}
COMMANDS = {"dvae": dvae, "prior": prior}
NEAR = 5e-5  # what the order of additions makes of a loss that is logged with six digits
# The first update of AdamW divides each gradient by its own size: what is nothing but rounding, as where two
# biases cancel each other, becomes ±lr. So a run that begins in several processes strays further.
BEGUN_APART = 1e-3
ENDED = "from cli.main import main; main()"
SOON = 60.0  # seconds after which a run that lost a process hangs; it ends in about one


class Command:
    """`dalle` under way in as many processes as it is told."""

    def __init__(self, folder: Path, *arguments, launcher=(sys.executable, "-c", ENDED)):
        self.err = folder / f"err-{time.monotonic_ns()}"
        environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
        with self.err.open("wb") as file:
            self.process = subprocess.Popen(
                [*launcher, *map(str, arguments)], stdout=file, stderr=file, env=environ
            )

    @property
    def said(self) -> str:
        return self.err.read_text(errors="replace")

    def members(self) -> list[int]:
        """The processes that train, in the order of their start."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()] if children.exists() else []

    def wait_for(self, happened: Callable[[], bool], seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < end, self.said
            assert self.process.poll() is None, self.said
            time.sleep(0.01)

    def ends(self, seconds: float = 240.0) -> int:
        return self.process.wait(seconds)


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Command]]:
    """`start(*arguments)` starts a command, which ends with the test at the latest."""
    started = []

    def begin(*arguments, **more) -> Command:
        started.append(Command(tmp_path, *arguments, **more))
        return started[-1]

    yield begin
    for command in started:
        command.process.kill()  # its members end with it
        command.process.wait()


def losses(run: Path, stage: str) -> list[float]:
    return [line["loss"] for line in read_metrics(run / stage) if "loss" in line]


@pytest.fixture(scope="module")
def straight(dalle, tmp_path_factory) -> Path:
    """Both stages in one process, without a break."""
    run = tmp_path_factory.mktemp("straight") / "run"
    for stage, command in COMMANDS.items():
        done = dalle(*command(run, *SETTINGS[stage], steps=STEPS))
        assert done.code == 0, done.err
    return run


@pytest.mark.parametrize("stage", ["dvae", "prior"])
def test_1_2_4_and_1_processes_at_other_stages_make_the_curve_of_one(dalle, start, straight, tmp_path, stage):
    run = begin(straight, tmp_path, stage)
    for steps, processes, zero in ((3, 1, 0), (6, 2, 3), (9, 4, 2), (STEPS, 1, 1)):
        command = COMMANDS[stage](run, *SETTINGS[stage], "--zero", zero, steps=steps)
        if processes == 1:
            done = dalle(*command)
            assert done.code == 0, done.err
            continue
        several = start(*command, "--processes", processes)
        assert several.ends() == 0, several.said
        assert "Warning" not in several.said
        assert len(several.said.splitlines()) < 12, several.said  # one process speaks
    assert losses(run, stage) == pytest.approx(losses(straight, stage), rel=NEAR)
    assert len(losses(run, stage)) == STEPS
    heldout = [
        [line for line in read_metrics(r / stage) if "heldout_loss" in line][-1] for r in (run, straight)
    ]
    assert heldout[0]["heldout_loss"] == pytest.approx(heldout[1]["heldout_loss"], rel=NEAR)
    state = State(state_folders(run / stage / "state")[0])
    weights = {n: state.read("average", n) for n in state.names("average")}
    from safetensors.torch import load_file

    published = load_file(run / stage / "weights.safetensors")
    assert published.keys() == weights.keys()
    assert all(torch.equal(published[name], w) for name, w in weights.items())


def test_a_prior_that_is_partitioned_from_birth_grows_as_one_in_one_process(dalle, start, straight, tmp_path):
    alone, several = tmp_path / "alone", tmp_path / "several"
    done = dalle(*dvae(alone, *options(patch=2), steps=2))
    assert done.code == 0, done.err
    shutil.copytree(alone, several)
    growing = [*SETTINGS["prior"], "--grow-from", straight]
    done = dalle(*prior(alone, *growing, steps=3))
    assert done.code == 0, done.err
    command = start(*prior(several, *growing, "--processes", 2, "--zero", 3, steps=3))
    assert command.ends() == 0, command.said
    assert losses(several, "prior") == pytest.approx(losses(alone, "prior"), rel=BEGUN_APART)
    assert losses(alone, "prior")[0] < losses(straight, "prior")[0] - 0.1


def test_a_stop_saves_once_ends_all_and_the_same_command_goes_on(start, straight, tmp_path):
    run, at = begin(straight, tmp_path, "prior"), 0
    rarely = [*OFTEN, *options(save_every=10_000), "--processes", 2, "--zero", 2]
    for number in (signal.SIGINT, signal.SIGTERM):
        command = start(*prior(run, *rarely, steps=5_000))
        command.wait_for(lambda before=at: last_step(run / "prior") > before)
        assert not at or f"going on from step {at}" in command.said
        members = command.members()
        assert len(members) == 2
        command.process.send_signal(number)
        assert command.ends(SOON) == 1, command.said
        assert command.said.count("finishing this step and saving") == 1
        saved = state_folders(run / "prior" / "state")[0]
        assert int(saved.name[5:]) > at
        at = int(saved.name[5:])
        assert f"stopped after step {at:,} of 5,000, saved" in command.said
        assert at == last_step(run / "prior")
        assert not any(Path(f"/proc/{pid}").exists() for pid in members)


def last_step(stage: Path) -> int:
    """The last update in metrics.jsonl."""
    return max((line["step"] for line in read_metrics(stage)), default=0)


def test_killed_at_random_moments_nothing_is_lost_but_the_steps_since_the_last_save(
    start, straight, tmp_path
):
    """A shortened version of benchmarks/kill.py."""
    moments, run = random.Random(5), begin(straight, tmp_path, "prior")
    states, before = run / "prior" / "state", []
    for kill in range(3):
        several = [*OFTEN, *options(save_every=1), "--processes", 2, "--zero", (3, 1, 2)[kill]]
        command = start(*prior(run, *several, steps=5_000))
        command.wait_for(lambda: "2 processes, ZeRO" in command.said)  # noqa: B023 (called at once)
        if kill:  # the first one may come before anything is saved
            command.wait_for(lambda: state_folders(states)[:1] > before[:1])  # noqa: B023
        time.sleep(moments.random() * 3)
        before = state_folders(states)
        members = command.members()
        assert len(members) == 2, command.said
        os.kill(members[moments.randrange(2)], signal.SIGKILL)
        assert command.ends(SOON) == 1
        assert "was killed (SIGKILL)" in command.said
        assert "the same command goes on from the last save" in command.said
        found, refused = newest_state(states)
        assert not refused
        if before:
            assert found is not None
            assert found.path >= before[0]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--processes", 3], "batch_size=4 is that of all 3 processes: it must be a multiple of"),
        (["--processes", 2, "--data", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_is_told_once_in_one_line(start, tmp_path, more, words):
    command = start(*dvae(tmp_path / "run", *OFTEN, *more))
    assert command.ends() == 2, command.said
    errors = [line for line in command.said.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, command.said
    assert words in errors[0]
    assert "Traceback" not in command.said


def test_several_processes_agree_on_how_many_updates_there_is_time_for(start, tmp_path):
    run = tmp_path / "run"
    in_time = ["train-dvae", "--preset", "tiny", "--run", run, "--minutes", 0.1, "--processes", 2]
    began = start(*in_time, *DVAE, *SETTINGS["dvae"])
    assert began.ends() == 0, began.said  # they would wait for each other for ever
    made = newest_state(run / "dvae" / "state")[0].values["step"]
    assert made == json.loads((run / "dvae" / "config.json").read_text())["training"]["steps"]
    assert made == read_metrics(run / "dvae")[-1]["step"] > 1


def test_pretended_machines_compress_what_they_exchange(start, straight, tmp_path):
    run = begin(straight, tmp_path, "prior")
    compressed = options(compression_rank=2, compression_start=2)
    command = start(*prior(run, *SETTINGS["prior"], *compressed, "--machines", 2, steps=4))
    assert command.ends() == 0, command.said
    assert "2 processes, ZeRO 1" in command.said
    lines = [line for line in read_metrics(run / "prior") if "loss" in line]
    assert [line["between_saved"] > 0 for line in lines] == [False, False, True, True]
    assert losses(run, "prior")[:2] == pytest.approx(losses(straight, "prior")[:2], rel=BEGUN_APART)


def test_torchrun_starts_the_same_run(start, straight, tmp_path):
    run = tmp_path / "run"
    program = tmp_path / "start.py"  # not dalle.py, which would hide the package
    program.write_text(ENDED)
    torchrun = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--standalone",
        "--",  # or it would take --run for one of its own
        str(program),
    )
    command = start(*dvae(run, *SETTINGS["dvae"], "--zero", 2, steps=STEPS), launcher=torchrun)
    assert command.ends() == 0, command.said
    assert losses(run, "dvae") == pytest.approx(losses(straight, "dvae"), rel=BEGUN_APART)
    assert json.loads((run / "dvae" / "config.json").read_text())["training"]["zero"] == 2
