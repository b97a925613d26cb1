"""Worker processes that read ahead, and that neither die too early nor stay behind."""

import atexit
import signal
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader, Dataset

Stacked = TypeVar("Stacked")

# Seconds between a SIGTERM and the end of a worker that its parent has not stopped by then: the parent ends
# its update and may save first. A worker without a parent ends by itself within seconds.
GRACE = 600

# torch prints it with paths of its own; more readers than cores may be just what slow disks need.
warnings.filterwarnings("ignore", "This DataLoader will create")

_open: WeakSet[Generator[Any, None, None]] = WeakSet()


def read_ahead(
    samples: Dataset[Any],
    positions: Iterable[int],
    batch_size: int,
    stack: Callable[[list[Any]], Stacked],
    workers: int,
) -> Generator[Stacked, None, None]:
    """`stack` of every `batch_size` samples at `positions`, in order, prepared by `workers` processes.

    With 0 workers they are prepared here. The processes end when the generator is closed or fails, and at
    the latest with this process.
    """
    stream = _read(
        DataLoader(
            samples,
            batch_size=batch_size,
            sampler=positions,
            collate_fn=stack,
            num_workers=workers,  # torch limits each to one thread
            worker_init_fn=_outlive_signals,
            generator=torch.Generator(),  # its own: the default one would be advanced by every start
        )
    )
    _open.add(stream)
    return stream


def _read(loader: DataLoader[Any]) -> Generator[Any, None, None]:
    try:
        yield from loader
    except BaseException as error:
        # torch stops the workers when nothing holds its iterator; after an error, the traceback does.
        traceback.clear_frames(error.__traceback__)
        raise


@atexit.register  # runs before multiprocessing's, which was registered earlier and would wait for them
def _close() -> None:
    for stream in list(_open):
        stream.close()


def _outlive_signals(worker: int) -> None:
    # A terminal's Ctrl-C, its closing and a scheduler's SIGTERM reach the workers too. The parent saves, then
    # stops them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))  # the alarm ends the process
