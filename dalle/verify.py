"""Does a training state hold all that the run depends on? Tried out: `dalle verify-resume`."""

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from dalle.console import Stopwatch, say
from dalle.errors import CheckpointError
from dalle.metrics import Window
from dalle.process import held
from dalle.states import Saver, State, state_folders
from dalle.training import Session, resume, stream, update

UPDATES = 3
CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def _deterministic() -> Iterator[None]:
    """Have a GPU, too, give the same bits each time; an operation that cannot, warns."""
    before, workspace = torch.get_deterministic_debug_mode(), os.environ.get(CUBLAS)
    torch.set_deterministic_debug_mode("warn")
    os.environ.setdefault(CUBLAS, ":4096:8")  # without it torch would warn of every matrix product
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        if workspace is None:
            del os.environ[CUBLAS]


@_deterministic()
def verify_resume(prepare: Callable[[], Session]) -> str | None:
    """Make three updates from a run's newest state twice: in one go, and stopped after the first.

    The stopped one is saved, and loaded by a session that knows nothing of it. Nothing in the run folder
    changes.

    Args:
        prepare: builds a session of the run anew at each call.

    Returns:
        The first tensor that is not bit for bit the same at the end, or None.

    Raises:
        CheckpointError: the run has no training state, or is being trained.
    """
    first = prepare()
    if not state_folders(first.folder / "state"):
        raise CheckpointError(f"{first.folder} has no training state: train it first")
    if held(first.folder):
        raise CheckpointError(f"{first.folder} is being trained: wait until that has ended, then verify it")
    say(f"{first.task.label}: {UPDATES} updates in one go, then with a stop after the first")
    with tempfile.TemporaryDirectory(prefix="dalle-verify-") as name:
        straight, stopped = Path(name) / "straight", Path(name) / "stopped"
        begun = resume(first)
        _train(first, begun, begun + UPDATES, straight)
        del first  # a GPU has room for one
        second = prepare()
        resume(second)
        _train(second, begun, begun + 1, stopped)
        del second
        third = prepare()._replace(folder=stopped)
        resume(third)
        _train(third, begun + 1, begun + UPDATES, stopped)
        return first_difference(*(State(state_folders(f / "state")[0]) for f in (straight, stopped)))


def _train(session: Session, start: int, stop: int, folder: Path) -> None:
    window = Window(session.task.tokens_per_picture, Stopwatch(), session.task.flops_per_picture, math.inf)
    with closing(stream(session, start)) as batches:
        for step in range(start, stop):
            update(session, batches, step, window)
    saver = Saver(folder, UPDATES)
    saver.save(stop, session.engine.state(), {"task": session.task.state()})
    saver.wait()


def first_difference(a: State, b: State) -> str | None:
    """The name of the first tensor or value in which two states differ; None where they are the same."""
    for file in sorted({*a.files(), *b.files()}):
        for name in sorted(a.names(file) ^ b.names(file)):
            return f"{file}: {name} (only in one)"
        for name in sorted(a.names(file)):
            if (place := _differ(a.read(file, name), b.read(file, name))) is not None:
                return f"{file}: {name} {place}"
    for name in sorted({*a.values, *b.values}):
        if repr(a.values.get(name)) != repr(b.values.get(name)):
            return f"{name}: {a.values.get(name)!r} against {b.values.get(name)!r}"
    return None


def _differ(a: Tensor, b: Tensor) -> str | None:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"({a.dtype}, {tuple(a.shape)} against {b.dtype}, {tuple(b.shape)})"
    same = a.reshape(-1).view(torch.uint8) == b.reshape(-1).view(torch.uint8)
    if bool(same.all()):
        return None
    number = int((~same).nonzero()[0]) // a.element_size()
    x, y = a.reshape(-1)[number].item(), b.reshape(-1)[number].item()
    return f"(number {number:,} of {a.numel():,}: {x:.9g} against {y:.9g})"
