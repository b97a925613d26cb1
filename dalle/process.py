"""One process a run folder, and a stop that saves first."""

import ctypes
import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import torch

from dalle.console import say
from dalle.errors import CheckpointError
from dalle.launch import stopping

LOCK = ".lock"
SAME = 0.5  # seconds in which a second signal is the first one again


def suit_computing() -> None:
    """Settings of a command's process, and of its threads, that halve the time of a training step on a CPU.

    Numbers below 1e-38 become 0: sharp softmaxes are full of them, and each takes a hundred times as long as
    any other. And glibc keeps freed tensors for the next step instead of returning them to the system each
    time, or a tenth to a third of a step would be page faults, in drawing as in training; all threads share
    one heap, because those of threads are returned regardless. Without glibc it leaves out the latter.
    """
    torch.set_flush_denormal(True)
    mmap_max, trim_threshold, top_pad, arena_max = -4, -1, -2, -8  # numbers of mallopt(3)
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 64 * 2**20)
    mallopt(arena_max, 1)


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; the system lets go of it however the process ends.

    A record lock (lockf) rather than flock: forked data workers do not inherit it, so a killed run
    can be resumed at once. Folders that were made for it and are still empty go again.

    Raises:
        CheckpointError: another process trains there, or the folder cannot be written or locked.
    """
    made = [path for path in (folder, folder.parent) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a")
    except OSError as error:
        raise CheckpointError(
            f"cannot write in {folder}: {error.strerror}; permit it or use another --run"
        ) from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # POSIX leaves open which of the two
            raise CheckpointError(
                f"another process is training in {folder}: wait for it, stop it, or use another --run"
            ) from None
        except OSError as error:
            raise CheckpointError(
                f"cannot lock {folder}: {error.strerror}; put --run on a file system that knows locks"
            ) from error
        try:
            yield
        finally:
            if made and [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                with suppress(OSError):  # the parent holds something by now
                    for path in made:
                        path.rmdir()


def held(folder: Path) -> bool:
    """Does another process hold `folder` (see `only_process`)?"""
    try:
        with (folder / LOCK).open("rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # which needs no permission to write
    except (BlockingIOError, PermissionError) as error:
        return error.filename is None  # else it is the file that may not be read
    except OSError:  # never trained here, or a file system without locks
        return False
    return False


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Ctrl-C, SIGTERM and a closed terminal ask for a stop instead of making one; a second one stops at once.

    One that follows at once is the same again: launchers hand on what the terminal sent to all. A reader of
    what is said, such as `tee`, may end by the same Ctrl-C: that ends nothing here.

    Yields a function that says whether a stop was asked for.
    """
    asked = threading.Event()
    first = 0.0

    def ask(number: int, _: FrameType | None) -> None:
        nonlocal first
        if asked.is_set():
            if time.monotonic() < first + SAME:
                return
            os._exit(1)  # the state saved last is whole, whatever was under way
        first = time.monotonic()
        asked.set()
        with suppress(OSError, RuntimeError):  # the terminal may be gone, or in the midst of another line
            say(f"{signal.Signals(number).name}: finishing this step and saving; once more to stop at once")

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # only the main thread may handle signals
        return
    before = {s: signal.signal(s, ask) for s in stopping()}
    before[signal.SIGPIPE] = signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
