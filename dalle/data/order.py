"""One seeded order of the samples, epoch after epoch, computed for any position without a list."""

from functools import lru_cache

import numpy as np

ROUNDS = 6


def shuffled(position: int, length: int, seed: int) -> int:
    """The index, 0 ≤ index < length, of the sample at `position` ≥ 0 of an endless shuffled stream.

    Each epoch of `length` positions holds every index once, in an order of its own. Memory is constant and
    nothing is remembered, so the place of a reader in the stream is one number.

    A Feistel network permutes the smallest power of four that holds `length`; an image outside the range is
    permuted again until it falls inside (cycle walking), which keeps the map one-to-one.
    Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002.
    """
    epoch, index = divmod(position, length)
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    keys = _keys(seed, epoch)
    index = _feistel(index, half, keys)
    while index >= length:
        index = _feistel(index, half, keys)
    return index


def _feistel(value: int, half: int, keys: tuple[int, ...]) -> int:
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << half | right


def _mix(value: int) -> int:
    """Spread the bits of a number below 2⁶⁴: the finalizer of SplitMix64 (Steele et al., 2014)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


@lru_cache(maxsize=16)
def _keys(seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(np.random.SeedSequence((seed, epoch)).generate_state(ROUNDS, np.uint64).tolist())
