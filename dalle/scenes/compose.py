"""Puts a scene together: which objects, where and how large. All are readable by construction."""

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

MARGIN = 0.03  # between an object's box and the border
GAP = 0.05  # between the boxes of two objects
SMALL, LARGE = 6 / 32, 10 / 32  # radii of an object alone; captions tell these two apart
BESIDE = COUNTED = SMALL
INNER, OUTER = 5 / 32, 12 / 32

FRAMES: tuple[Shape, ...] = ("circle", "square", "diamond", "ring")  # what another object fits inside
_BACKGROUNDS = tuple(BACKGROUNDS)


def compose(rng: Random, split: Split) -> Scene:
    """Choose a scene that `split` allows: 45 % one object, 35 % a pair, 20 % two to four equal objects."""
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
    if kind < 0.45:
        return _single(rng, TRAINED_PAIRS)
    return _pair(rng, held_out=False) if kind < 0.80 else _count(rng)


def _single(rng: Random, pairs: tuple[Pair, ...]) -> Scene:
    colour, shape = rng.choice(pairs)
    radius = rng.choice((SMALL, LARGE))
    x, y = _nameable(rng, radius), _nameable(rng, radius)
    return Scene(rng.choice(_BACKGROUNDS), (_object(shape, colour, (x, y, radius)),))


def _object(shape: Shape, colour: Colour, disc: Disc) -> Object:
    x, y, radius = (round(value * LATTICE) / LATTICE for value in disc)
    return Object(shape, colour, x, y, radius)


def _nameable(rng: Random, radius: float) -> float:
    """A coordinate plainly at the low side, in the middle or at the high side of the picture."""
    nearest = MARGIN + radius
    low = rng.uniform(nearest, min(nearest + 0.1, 0.38))
    return rng.choice((low, rng.uniform(0.46, 0.54), 1 - low))


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
    free = 0.5 - MARGIN - OUTER
    x, y = 0.5 + rng.uniform(-free, free), 0.5 + rng.uniform(-free, free)
    return (x, y, INNER), (x, y, OUTER)


def _beside(rng: Random, relation: Relation) -> tuple[Disc, Disc]:
    """Two objects as for "left of", then mirrored and turned into what was asked for."""
    slack = 1 - 2 * (MARGIN + 2 * BESIDE) - GAP
    a = MARGIN + BESIDE + slack * rng.uniform(0, 0.5)
    b = 1 - MARGIN - BESIDE - slack * rng.uniform(0, 0.5)
    level = rng.uniform(0.29, 0.71)  # with the next line, no nearer to the border than MARGIN
    c, d = level + rng.uniform(-0.06, 0.06), level + rng.uniform(-0.06, 0.06)
    if relation in ("right of", "below"):
        a, b = 1 - a, 1 - b
    if relation in ("above", "below"):
        return (c, a, BESIDE), (d, b, BESIDE)
    return (a, c, BESIDE), (b, d, BESIDE)


def _count(rng: Random) -> Scene:
    """Equal objects, each in a quarter of the picture of its own."""
    colour, shape = rng.choice(TRAINED_PAIRS)
    nearest, furthest = MARGIN + COUNTED, 0.5 - GAP / 2 - COUNTED
    quarters = rng.sample(tuple(product((False, True), repeat=2)), rng.choice((2, 3, 4)))
    objects = []
    for right, bottom in quarters:
        # In the far half the same span, mirrored, keeps the same distances to border and neighbour.
        x, y = rng.uniform(nearest, furthest), rng.uniform(nearest, furthest)
        objects.append(_object(shape, colour, (1 - x if right else x, 1 - y if bottom else y, COUNTED)))
    return Scene(rng.choice(_BACKGROUNDS), tuple(objects))
