"""Batches of prepared samples: one endless stream that can be entered at any position."""

import time
import warnings
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dalle.data.order import shuffled
from dalle.data.source import BadSample, Sample, Source
from dalle.data.workers import read_ahead
from dalle.errors import DalleError, DataError

# One sample → its tensors, such as uint8 pixels `3 h w` and int64 tokens `t`; may raise `BadSample`.
Prepare: TypeAlias = Callable[[Sample, np.random.Generator], tuple[Tensor, ...]]

TRIES = 100  # bad samples in a row, after which the data is taken to be broken
# Positions from a bad sample to the one tried next. A prime, so that every sample of an epoch has its turn;
# far, so that a batch seldom holds a sample twice: as itself and in the place of a bad one.
LEAP = 1_000_000_007
# `some` takes AHEAD samples at a time. Once they take over SLOW seconds each, it reads with several threads:
# decoding large pictures lets other threads run, drawing scenes does not.
AHEAD, SLOW = 16, 1e-3


@dataclass
class Prepared:
    """A sample or a stack of them, what was skipped on the way, or the error that ended it."""

    tensors: tuple[Tensor, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    error: DalleError | None = None


class Loader:
    """Prepared samples in batches. The sample at position p is a function of (source, seed, p) alone.

    So a stream can be resumed at any sample, and is the same for any number of worker processes. A bad
    sample's place is taken by the next readable one of its epoch in steps of `LEAP` positions: among the
    shuffled, for bad ones often lie together. `skipped` grows by its key and the reason as batches are handed
    out.

    Args:
        prepare: gets all captions, and a generator of its own for every position. Must be picklable where
            worker processes are not forked.
        seed: ≥ 0, of the order and of what `prepare` draws.
        workers: processes that read ahead; 0 reads in this one.
        min_side: pixels; a picture with a shorter side is a bad sample.

    Raises `DataError` if the source is empty and, while reading, if there is nothing readable among
    `TRIES` samples.
    """

    def __init__(
        self,
        source: Source,
        prepare: Prepare,
        *,
        batch_size: int,
        seed: int,
        workers: int = 0,
        min_side: int = 0,
    ) -> None:
        if not len(source):
            raise DataError(f"{source.name}: no samples; give data that holds some")
        self.batch_size = batch_size
        self.workers = workers
        self.skipped = {bad.key: bad.reason for bad in getattr(source, "bad", [])}
        self._samples = _Samples(source, prepare, seed, min_side)

    def batches(self, start: int = 0, stride: int = 1) -> Generator[tuple[Tensor, ...], None, None]:
        """Batches without end, of the positions `start`, `start + stride`, …; closing it stops the workers.

        Process r of n enters at `start + r` with stride n: together they read what one would read alone.
        """
        positions = range(start, 2**62, stride)
        with closing(read_ahead(self._samples, positions, self.batch_size, _stack, self.workers)) as stream:
            for batch in stream:
                self.skipped |= batch.skipped
                if batch.error:
                    raise batch.error
                yield batch.tensors

    def some(self, n: int, each: Callable[[int], object] = lambda _: None) -> tuple[Tensor, ...]:
        """`n` ≥ 1 readable samples, stacked: the first in the loader's order; fewer if the source has fewer.

        Args:
            each: told how many are read, whenever one is.
        """
        rows: list[Prepared] = []
        place, length, slow = 0, len(self._samples.source), False
        # `decode` silences warnings too, but threads that do so at once would restore each other's filters.
        with warnings.catch_warnings(), ThreadPoolExecutor(torch.get_num_threads()) as threads:
            warnings.simplefilter("ignore")
            while len(rows) < n and place < length:
                places = range(place, min(length, place + min(AHEAD, n - len(rows))))
                began = time.perf_counter()
                for found in (threads.map if slow else map)(self._samples.attempt, places):
                    self.skipped |= found.skipped
                    if found.tensors:
                        rows.append(found)
                        each(len(rows))
                slow = slow or time.perf_counter() - began > SLOW * len(places)
                place = places.stop
        if not rows:
            raise _nothing_readable(self._samples.source, self.skipped)
        return _stack(rows).tensors


class _Samples(Dataset[Prepared]):
    """Position → one prepared sample."""

    def __init__(self, source: Source, prepare: Prepare, seed: int, min_side: int) -> None:
        self.source = source
        self.prepare = prepare
        self.seed = seed
        self.min_side = min_side

    def __getitem__(self, position: int) -> Prepared:
        length = len(self.source)
        epoch = position - position % length
        skipped: dict[str, str] = {}
        for step in range(min(TRIES, length)):
            place = (position + step * LEAP) % length
            try:
                return Prepared(self.read(self.index(epoch + place), self.rng(position)), skipped)
            except BadSample as bad:
                skipped[bad.key] = bad.reason
            except DalleError as error:
                # A value, because torch re-raises a worker's exception with its traceback as the message.
                return Prepared(skipped=skipped, error=error)
        return Prepared(skipped=skipped, error=_nothing_readable(self.source, skipped))

    def attempt(self, place: int) -> Prepared:
        """The sample at a place of the first epoch, prepared alike wherever it is; nothing if it is bad."""
        index = self.index(place)
        try:
            return Prepared(self.read(index, self.rng(index)))
        except BadSample as bad:
            return Prepared(skipped={bad.key: bad.reason})

    def index(self, position: int) -> int:
        return shuffled(position, len(self.source), self.seed)

    def read(self, index: int, rng: np.random.Generator) -> tuple[Tensor, ...]:
        sample = self.source[index]
        width, height = sample.image.size
        if min(width, height) < self.min_side:
            size = f"{width}×{height} pixels, smaller than image_size={self.min_side}"
            raise BadSample(sample.key, f"{size}; a dVAE with --set image_size=… could use it")
        return self.prepare(sample, rng)

    def rng(self, position: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, position))


def _stack(rows: list[Prepared]) -> Prepared:
    skipped = {key: reason for row in rows for key, reason in row.skipped.items()}
    error = next((row.error for row in rows if row.error), None)
    if error:
        return Prepared(skipped=skipped, error=error)
    columns = zip(*(row.tensors for row in rows), strict=True)
    return Prepared(tuple(torch.stack(column) for column in columns), skipped)


def _nothing_readable(source: Source, skipped: dict[str, str]) -> DataError:
    key, reason = next(iter(skipped.items()))
    return DataError(
        f"{source.name}: no readable picture among {len(skipped)} tries; the first, {key}: {reason}; "
        "mend it or take it away"
    )
