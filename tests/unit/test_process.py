"""One process a run folder, and a stop that saves first."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dalle.errors import CheckpointError
from dalle.process import SAME, held, only_process, stop_signals, suit_computing
from dalle.threads import Threads

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from dalle.process import only_process
with only_process(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
STOP = """
import sys, time
import dalle.process
from dalle.process import stop_signals
dalle.process.SAME = 0.0  # a second signal is a second one, however soon
with stop_signals() as stopped:
    print("ready", flush=True)
    while not stopped() or "stubborn" in sys.argv:
        time.sleep(0.01)
    print("saved", flush=True)
"""
SPEAK = """
import signal, time
from dalle.console import say
from dalle.process import stop_signals
signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as a command has it
with stop_signals() as stopped:
    print("ready", flush=True)
    while not stopped():
        time.sleep(0.01)
    say("a step")
    print("saved", flush=True)
assert signal.getsignal(signal.SIGPIPE) == signal.SIG_DFL
say("stopped")
raise SystemExit(1)
"""


@contextmanager
def start(code: str, *args: object):
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_process_is_refused_and_a_killed_one_lets_go(tmp_path):
    folder = tmp_path / "new" / "dvae"
    with start(HOLD, folder) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=r"another process is training in .*dvae: wait for it"):
            only_process(folder).__enter__()
        assert held(folder)
        assert not held(tmp_path / "other")
        with only_process(tmp_path / "other"):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert not held(folder)
        with only_process(folder):
            pass


def test_a_folder_that_was_made_in_vain_goes_again(tmp_path):
    with pytest.raises(ZeroDivisionError), only_process(tmp_path / "run" / "dvae"):
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run").mkdir()
    with only_process(tmp_path / "run" / "dvae"):
        (tmp_path / "run" / "dvae" / "config.json").touch()
    with only_process(tmp_path / "run" / "prior"):
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["dvae"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python ≥ 3.12
def test_a_data_worker_that_outlives_the_run_does_not_hold_the_folder(tmp_path):
    pipe, other = os.pipe()
    with only_process(tmp_path):
        child = os.fork()
        if child == 0:
            os.close(other)
            os.read(pipe, 1)  # lives on after the parent has let go
            os._exit(0)
    try:
        with start(HOLD, tmp_path) as holder:
            assert holder.stdout.readline() == "held\n"
    finally:
        os.close(other)
        os.waitpid(child, 0)


def test_a_folder_that_cannot_be_written_or_locked_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write in .*file"):
        only_process(tmp_path / "file").__enter__()

    def refuse(*_args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(CheckpointError, match=r"cannot lock .*: No locks available"):
        only_process(tmp_path).__enter__()


@contextmanager
def handled(number, how):
    before = signal.signal(number, how)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_only_asks(number):
    with handled(number, signal.SIG_DFL):
        with stop_signals() as stopped:
            assert not stopped()
            signal.raise_signal(number)
            assert stopped()
        assert signal.getsignal(number) == signal.SIG_DFL


def test_a_terminal_that_closes_ends_nothing_under_nohup():
    with handled(signal.SIGHUP, signal.SIG_IGN), stop_signals() as stopped:
        signal.raise_signal(signal.SIGHUP)
        assert not stopped()


def test_a_signal_asks_even_when_nobody_can_be_told(monkeypatch):
    def gone(_text):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("dalle.process.say", gone)
    with stop_signals() as stopped:
        signal.raise_signal(signal.SIGTERM)
        assert stopped()


def test_a_run_whose_log_is_read_by_nobody_any_more_saves_all_the_same():
    """A Ctrl-C ends `tee`, too, to which the run writes."""
    with start(SPEAK) as process:
        assert process.stdout.readline() == "ready\n"
        process.stderr.close()
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "saved\n"
        assert process.wait(20) == 1


def test_outside_the_main_thread_there_are_no_signals():
    seen = []

    def enter():
        with stop_signals() as stopped:
            seen.append(stopped())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [False]


def test_the_first_signal_saves_and_is_announced():
    with start(STOP) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    assert out == "saved\n"
    assert "SIGTERM: finishing this step and saving; once more to stop at once" in err
    assert process.returncode == 0


def test_the_second_signal_stops_at_once():
    with start(STOP, "stubborn") as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        while "once more" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=20)
    assert out == ""
    assert process.returncode == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_follows_at_once_is_the_same_again(monkeypatch, number):
    """Launchers hand on what the terminal sent to all."""
    now, ends = [1000.0], []
    monkeypatch.setattr("dalle.process.time.monotonic", lambda: now[0])
    monkeypatch.setattr(os, "_exit", ends.append)
    with stop_signals() as stopped:
        for later, ended in ((0.0, []), (0.9 * SAME, []), (1.1 * SAME, [1])):
            now[0] = 1000.0 + later
            signal.raise_signal(number)
            assert stopped()
            assert ends == ended


def test_numbers_too_small_to_matter_are_0_in_training_and_in_its_threads():
    suit_computing()
    assert (torch.tensor(1e-30) * torch.tensor(1e-10)).item() == 0
    threads = Threads(2)
    products = threads.map(lambda x: x * 1e-10, [torch.tensor(1e-30), torch.tensor(1e-29)])
    assert [product.item() for product in products] == [0, 0]
