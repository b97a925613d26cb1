"""Which samples are trained on and which are held out."""

from hashlib import blake2b
from typing import Literal, Protocol, TypeAlias

import numpy as np

from dalle.data.source import BadSample, Sample, Source
from dalle.errors import DataError

Split: TypeAlias = Literal["train", "heldout"]
HELDOUT_SEED = 0  # chooses the held-out pictures to measure on: the same for runs of other seeds


class Subset:
    """Some of the samples of a source, by number."""

    def __init__(self, source: Source, indices: np.ndarray, name: str) -> None:
        self.name = name
        self.source = source
        self.indices = indices
        self.bad: list[BadSample] = getattr(source, "bad", [])  # what a source of archives lost on opening

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.source[int(self.indices[index])]

    def captions(self, index: int) -> tuple[str, ...]:
        return self.source.captions(int(self.indices[index]))


class KeyedSource(Source, Protocol):
    """A source that knows the keys of its samples without reading them."""

    keys: list[str]


def subset(source: KeyedSource, split: Split, heldout: float) -> Subset:
    """The samples of a split.

    If the source marks some as held out, that decides. Otherwise the hash of its key does, for each sample by
    itself: about the fraction `heldout` goes to the held-out split whatever the order, and a sample keeps its
    split when others come or go. Of two or more samples at least one goes to each split.

    Raises `DataError` if the split holds nothing.
    """
    marks = getattr(source, "held_out", None)
    held_out = marks if marks is not None and marks.any() else _draw(source.keys, heldout)
    indices = np.flatnonzero(held_out if split == "heldout" else ~held_out)
    if not len(indices):
        raise DataError(
            f"{source.name}: none of {len(source)} samples is in the {split} split; give more pictures, or a "
            'column `split` with "train" in some rows and another word in others'
        )
    return Subset(source, indices, source.name if split == "train" else f"{source.name}, held out")


def _draw(keys: list[str], fraction: float) -> np.ndarray:
    digests = (blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest() for key in keys)
    values = np.frombuffer(b"".join(digests), dtype=">u8")
    held_out = values < fraction * 2**64
    if len(keys) > 1:
        held_out[values.argmin()], held_out[values.argmax()] = True, False
    return held_out
