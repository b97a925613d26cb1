"""Several processes of one command: they end together, and the reason is told once."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cli.main import train_prior
from dalle.distributed import Topology, gpu_of, place, refuse_stale_addresses, with_machines
from dalle.errors import CheckpointError, ConfigError
from dalle.launch import LOST, _gpus_of, launch, launched

LAUNCH = """
import sys
from dalle.launch import launch
sys.exit(launch(3, ["-c", sys.argv[1]], program=[sys.executable]))
"""
on_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="launch() starts several processes on Linux only"
)
# The alarm ends a process that a failed test has left alone.
WAIT = """
import os, signal, sys, time
signal.alarm(60)
rank = int(os.environ['RANK'])
"""


@contextmanager
def start(program: str) -> Iterator[subprocess.Popen]:
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCH, WAIT + program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until_signals_are_handed_on(process: subprocess.Popen) -> None:
    """`launch` handles them once it has started all; until then a SIGTERM would end it."""
    end = time.monotonic() + 60
    while True:
        status = Path(f"/proc/{process.pid}/status").read_text()
        (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
        if int(caught, 16) >> (signal.SIGTERM - 1) & 1:
            return
        assert time.monotonic() < end
        time.sleep(0.005)


def result(program: str) -> tuple[int, str, str]:
    with start(program) as process:
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@on_linux
def test_only_the_first_process_is_heard_when_all_goes_well():
    program = "print(f'out {rank} of {os.environ[\"WORLD_SIZE\"]}'); print('err', rank, file=sys.stderr)"
    assert result(program) == (0, "out 0 of 3\n", "err 0\n")


@on_linux
def test_pretended_machines_run_so_many_processes_each(tmp_path):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    program = f"import os; print(*(os.environ[n] for n in {names}), file=open(os.environ['RANK'], 'w'))"
    code = (
        f"from dalle.launch import launch; launch(1, ['-c', {program!r}], ['{sys.executable}'], machines=2)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)
    assert [(tmp_path / rank).read_text().split() for rank in "01"] == [list("0201"), list("1201")]


@on_linux
def test_a_killed_process_ends_the_others_and_is_named():
    began = time.monotonic()
    code, _, err = result("os.kill(os.getpid(), 9) if rank == 2 else time.sleep(100)")
    assert code == 1
    assert err.startswith("error: process 2 of 3 was killed (SIGKILL), which ends the run")
    assert time.monotonic() - began < 50


@on_linux
@pytest.mark.parametrize("status", [1, 2])
def test_the_reason_of_a_process_that_fails_is_told(status):
    code, _, err = result(
        f"if rank == 1: print('error: bad', file=sys.stderr); sys.exit({status})\ntime.sleep(100)"
    )
    assert (code, err) == (status, "error: process 1 of 3: bad\n")


@on_linux
def test_an_error_of_all_is_told_by_the_first_alone():
    code, _, err = result("print('error: bad', file=sys.stderr); sys.exit(2)")
    assert (code, err) == (2, "error: bad\n")


@on_linux
def test_who_only_lost_the_others_is_not_the_reason():
    program = (
        f"if rank < 2: sys.exit({LOST})\ntime.sleep(1); print('error: bad', file=sys.stderr); sys.exit(2)"
    )
    code, _, err = result(program)
    assert (code, err) == (2, "error: process 2 of 3: bad\n")


@on_linux
def test_of_a_long_reason_the_end_is_told():
    program = "if rank == 1: print('x' * 5000 + 'why', file=sys.stderr); sys.exit(1)\ntime.sleep(100)"
    assert result(program) == (1, "", f"error: process 1 of 3: {'x' * 3997}why\n")


@on_linux
def test_the_cores_are_shared_out_among_the_processes_of_all_machines_unless_the_user_says_how(tmp_path):
    program = "import os; print(os.environ['OMP_NUM_THREADS'], file=open(os.environ['RANK'], 'w'))"
    code = (
        "import os; os.sched_getaffinity = lambda _: range(9)\n"
        f"from dalle.launch import launch; launch(2, ['-c', {program!r}], [{sys.executable!r}], machines=2)"
    )
    free = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    for own, expected in (({}, "2\n"), ({"OMP_NUM_THREADS": "5"}, "5\n")):
        environ = free | {"PYTHONPATH": os.pathsep.join(sys.path)} | own
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, check=True, timeout=60)
        assert [(tmp_path / str(rank)).read_text() for rank in range(4)] == [expected] * 4


@on_linux
def test_of_a_mistake_the_last_line_is_told():
    program = (
        "if rank == 1: print('warning: old\\nerror: bad', file=sys.stderr); sys.exit(2)\ntime.sleep(100)"
    )
    assert result(program) == (2, "", "error: process 1 of 3: bad\n")


@on_linux
def test_processes_that_wait_for_one_that_lost_contact_are_ended():
    began = time.monotonic()
    code, _, err = result(f"if rank == 1: sys.exit({LOST})\ntime.sleep(100)")
    assert code == 1
    assert err == f"error: process 1 of 3: ended with status {LOST} and said nothing\n"
    assert time.monotonic() - began < 50


@on_linux
def test_signals_are_afterwards_whose_they_were_before():
    code = (
        "import signal, sys; from dalle.launch import launch, stopping\n"
        "signal.signal(signal.SIGTERM, print)\n"
        "before = [*map(signal.getsignal, stopping())]; launch(2, ['-c', ''], [sys.executable])\n"
        "assert [*map(signal.getsignal, stopping())] == before"
    )
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environ, check=True, timeout=60)


STOPPABLE = """
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
open(f"ready-{rank}", "w").close()
if rank == 0:
    while not asked or not os.path.exists("ready-1") or not os.path.exists("ready-2"):
        time.sleep(0.01)
    time.sleep(0.5)
    print("saved", flush=True)
    sys.exit(1)
while not asked:
    time.sleep(0.01)
open(f"asked-{rank}", "w").close()
time.sleep(100)
"""
STUBBORN = """
signal.signal(signal.SIGINT, lambda *_: print("asked", flush=True))
print(os.getpid(), flush=True)
while True:
    time.sleep(0.01)
"""


@on_linux
def test_a_signal_goes_to_the_first_process_alone_which_ends_in_peace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    with start(STOPPABLE) as process:
        wait_until_signals_are_handed_on(process)
        while not (tmp_path / "ready-0").exists():
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (1, "saved\n", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ready-0", "ready-1", "ready-2"]


@on_linux
def test_a_second_signal_ends_all_at_once():
    with start(STUBBORN) as process:
        pid = int(process.stdout.readline())
        wait_until_signals_are_handed_on(process)
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 1
        assert process.stderr.read() == ""
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_elsewhere_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="--processes 3: several processes need Linux; leave it out"):
        launch(3, [])


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
DEEPSPEED = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
SLURM = {
    "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
}  # fmt: skip


@pytest.mark.parametrize("environ", [TORCHRUN, DEEPSPEED, SLURM])
def test_every_launcher_tells_the_place(environ):
    assert launched(environ)
    assert place(environ) == (3, 8, 1, 2)


def test_alone_nothing_is_launched():
    assert not launched({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"})  # a batch script outside of srun
    assert not launched({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"})  # `srun --gpus=4 --pty bash`


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK"])
def test_a_place_that_is_not_told_is_asked_for(missing):
    with pytest.raises(ConfigError, match=f"none of {missing}, SLURM"):
        place({name: value for name, value in TORCHRUN.items() if name != missing})


@pytest.mark.parametrize(
    ("local_rank", "gpus", "environ", "gpu"),
    [(1, 2, TORCHRUN, 1), (1, 2, SLURM, 1), (1, 1, SLURM, 0), (0, 1, TORCHRUN, 0), (1, 8, DEEPSPEED, 1)],
)
def test_a_process_takes_the_gpu_of_its_number_or_the_one_that_slurm_shows_it(local_rank, gpus, environ, gpu):
    assert gpu_of(local_rank, 2, gpus, environ) == gpu


def test_more_processes_than_gpus_are_refused():
    with pytest.raises(ConfigError, match="2 processes on a machine of 1 GPUs: start at most 1"):
        gpu_of(1, 2, 1, TORCHRUN)
    with pytest.raises(ConfigError, match="4 processes on a machine of 2 GPUs: start at most 2"):
        gpu_of(3, 4, 2, SLURM)


def test_a_group_that_torchrun_started_again_beside_its_old_store_is_refused():
    again = {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with pytest.raises(ConfigError, match="set it, or leave --max-restarts out"):
        refuse_stale_addresses(again)
    for fine in ("TORCHELASTIC_RESTART_COUNT", "0"), ("TORCHELASTIC_USE_AGENT_STORE", "False"):
        refuse_stale_addresses(again | dict([fine]))
    refuse_stale_addresses({})


@pytest.mark.parametrize("sizes", [[2, 2, 1], [2, 2, 2]])
def test_machines_of_unequally_many_processes_have_no_groups(sizes, monkeypatch):
    monkeypatch.setattr(Topology, "sum", lambda *_: torch.tensor([sizes, [0, 1, 0]]).t())
    for rank, size in enumerate(sizes):
        here = with_machines(Topology(rank, 3, rank % 2, size))
        assert (here.machines, here.within, here.between) == (3, None, None)


def test_processes_that_are_not_numbered_machine_by_machine_are_refused(monkeypatch):
    monkeypatch.setattr(Topology, "sum", lambda *_: torch.tensor([[2, 2, 2, 2], [0, 0, 1, 1]]).t())
    with pytest.raises(ConfigError, match="start them with srun --distribution=block"):
        with_machines(Topology(0, 4, 0, 2))


def test_a_process_has_its_gpu_before_anything_is_put_onto_one(monkeypatch):
    order = []

    @contextmanager
    def joined(_asked):
        order.append("joined")
        yield

    def codec_of(_run):
        order.append("dVAE")
        raise CheckpointError("that will do")

    monkeypatch.setattr("dalle.distributed.joined", joined)
    monkeypatch.setattr("dalle.pipeline.codec_of", codec_of)
    with pytest.raises(CheckpointError, match="that will do"):
        train_prior()
    assert order == ["joined", "dVAE"]


def test_pretended_machines_have_gpus_of_their_own(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in _gpus_of(2, 2)] == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,3,1")
    assert [each["CUDA_VISIBLE_DEVICES"] for each in _gpus_of(2, 2)] == ["7,5", "3,1"]
    with pytest.raises(ConfigError, match="--machines 3 of 2 processes need as many GPUs; there are 4"):
        _gpus_of(3, 2)


def test_without_gpus_machines_are_left_as_they_are(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert _gpus_of(2, 2) == [{}, {}]
