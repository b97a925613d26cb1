"""Puts a scene together: which objects, where and how large. All are readable by construction."""

import math
from itertools import product
from random import Random

from dalle.scenes.facts import BACKGROUNDS, RELATIONS, Colour, Object, Relation, Scene, Shape
from dalle.scenes.splits import (
    HELD_OUT_PAIRS,
    LATTICE,
    TRAINED_PAIRS,
    Pair,
    Split,
    is_held_out,
    is_trained_picture,
)

Disc = tuple[float, float, float]  # x, y, radius

GAP = 0.05  # between the boxes of two objects, at least
SLANT = 1  # steps of the lattice by which objects side by side may lie higher or lower than each other
SMALL, LARGE = 6 / 32, 10 / 32  # radii of an object alone; captions tell these two apart
BESIDE = COUNTED = SMALL
INNER, OUTER = 5 / 32, 12 / 32

FRAMES: tuple[Shape, ...] = ("circle", "square", "diamond", "ring")  # what another object fits inside
_BACKGROUNDS = tuple(BACKGROUNDS)


def compose(rng: Random, split: Split) -> Scene:
    """Choose a scene that `split` allows: 40 % one object, 40 % a pair, 20 % two to four equal objects."""
    while True:
        scene = _any(rng, split)
        if is_trained_picture(scene) == (split == "train"):
            return scene


def _any(rng: Random, split: Split) -> Scene:
    if split == "pairs":
        return _single(rng, HELD_OUT_PAIRS)
    if split == "relations":
        return _pair(rng, held_out=True)
    kind = rng.random()
    if kind < 0.40:
        return _single(rng, TRAINED_PAIRS)
    return _pair(rng, held_out=False) if kind < 0.80 else _count(rng)


def _single(rng: Random, pairs: tuple[Pair, ...]) -> Scene:
    colour, shape = rng.choice(pairs)
    radius = rng.choice((SMALL, LARGE))
    x, y = _nameable(rng, radius), _nameable(rng, radius)
    return Scene(rng.choice(_BACKGROUNDS), (_object(shape, colour, (x, y, radius)),))


def _object(shape: Shape, colour: Colour, disc: Disc) -> Object:
    return Object(shape, colour, *disc)


def _within(rng: Random, low: float, high: float) -> float:
    """A coordinate between the two, on the lattice."""
    return rng.randint(math.ceil(low * LATTICE), math.floor(high * LATTICE)) / LATTICE


def _nameable(rng: Random, radius: float) -> float:
    """A coordinate plainly at the low side, in the middle or at the high side of the picture."""
    low = _within(rng, radius, 0.38)
    return rng.choice((low, 0.5, 1 - low))


def _pair(rng: Random, held_out: bool) -> Scene:
    relation = rng.choice(RELATIONS)
    while True:
        (colour, shape), (other_colour, other) = rng.choice(TRAINED_PAIRS), rng.choice(TRAINED_PAIRS)
        if is_held_out(shape, relation, other) != held_out or (colour, shape) == (other_colour, other):
            continue
        if relation != "inside" or (other in FRAMES and colour != other_colour):
            break
    first, second = _inside(rng) if relation == "inside" else _beside(rng, relation)
    objects = _object(shape, colour, first), _object(other, other_colour, second)
    return Scene(rng.choice(_BACKGROUNDS), objects, relation)


def _inside(rng: Random) -> tuple[Disc, Disc]:
    x, y = _within(rng, OUTER, 1 - OUTER), _within(rng, OUTER, 1 - OUTER)
    return (x, y, INNER), (x, y, OUTER)


def _beside(rng: Random, relation: Relation) -> tuple[Disc, Disc]:
    """Two objects as for "left of", then mirrored and turned into what was asked for."""
    apart = 2 * BESIDE + GAP
    while True:
        a, b = _within(rng, BESIDE, 0.5), _within(rng, 0.5, 1 - BESIDE)
        if b - a >= apart:
            break
    c = _within(rng, BESIDE, 1 - BESIDE)
    d = min(max(c + rng.randint(-SLANT, SLANT) / LATTICE, BESIDE), 1 - BESIDE)
    if relation in ("right of", "below"):
        a, b = b, a
    if relation in ("above", "below"):
        return (c, a, BESIDE), (d, b, BESIDE)
    return (a, c, BESIDE), (b, d, BESIDE)


def _count(rng: Random) -> Scene:
    """Equal objects, each in a quarter of the picture of its own."""
    colour, shape = rng.choice(TRAINED_PAIRS)
    furthest = 0.5 - GAP / 2 - COUNTED
    quarters = rng.sample(tuple(product((False, True), repeat=2)), rng.choice((2, 3, 4)))
    objects = []
    for right, bottom in quarters:
        # In the far half the same span, mirrored, keeps the same distances to border and neighbour.
        x, y = _within(rng, COUNTED, furthest), _within(rng, COUNTED, furthest)
        objects.append(_object(shape, colour, (1 - x if right else x, 1 - y if bottom else y, COUNTED)))
    return Scene(rng.choice(_BACKGROUNDS), tuple(objects))
