"""Puts a scene together: which objects, where and how large. All are readable by construction."""

import math
from itertools import product
from random import Random

from dalle.scenes.facts import (
    BACKGROUNDS,
    COLOURS,
    CONTRAST,
    RELATIONS,
    Colour,
    Object,
    Relation,
    Scene,
    Shape,
)
from dalle.scenes.splits import (
    CELLS,
    HELD_OUT_PAIRS,
    TRAINED_PAIRS,
    Pair,
    Split,
    is_held_out,
    is_trained_picture,
)

Disc = tuple[float, float, float]  # x, y, radius

# Lengths are in cells. Radii are odd halves and objects stand in the middle of a cell, so that their boxes
# are whole cells: where a code stands for a cell, an object has the same codes wherever it is.
MIDDLE = CELLS / 2
GAP = 0.5  # between the boxes of two objects, at least
SLANT = 1  # by which objects side by side may lie higher or lower than each other
AT_THE_SIDE = 3.0  # from the border: an object alone is nearer than this, or in the middle
SMALL, LARGE = 1.5, 2.5  # radii of an object alone; captions tell these two apart
OUTER = 3.5  # of an object that holds another; all others are small

FRAMES: tuple[Shape, ...] = ("circle", "square", "diamond", "ring")  # what another object fits inside
_BACKGROUNDS = tuple(BACKGROUNDS)

# Colours that backgrounds have, too, are harder to learn on objects; seldom ones leave minutes of training
# enough to learn the others (docs/demo.md).
MUTED = 0.05
_MUTED = tuple(pair for pair in TRAINED_PAIRS if pair[0] in BACKGROUNDS)
_VIVID = tuple(pair for pair in TRAINED_PAIRS if pair[0] not in BACKGROUNDS)


def compose(rng: Random, split: Split) -> Scene:
    """Choose a scene that `split` allows: 50 % one object, 30 % a pair, 20 % two to four equal objects."""
    while True:
        scene = _any(rng, split)
        if is_trained_picture(scene) == (split == "train") and _stands_out(scene):
            return scene


def _stands_out(scene: Scene) -> bool:
    """Whether every object differs from the background, and from the one that it lies inside of."""
    first, *others = (COLOURS[thing.colour] for thing in scene.objects)
    pairs = [(colour, BACKGROUNDS[scene.background]) for colour in (first, *others)]
    if scene.relation == "inside":
        pairs.append((first, others[0]))
    return all(math.dist(one, other) >= CONTRAST for one, other in pairs)


def _any(rng: Random, split: Split) -> Scene:
    if split == "pairs":
        return _single(rng, rng.choice(HELD_OUT_PAIRS))
    if split == "relations":
        return _pair(rng, held_out=True)
    kind = rng.random()
    if kind < 0.50:
        return _single(rng, _trained_pair(rng))
    return _pair(rng, held_out=False) if kind < 0.80 else _count(rng)


def _trained_pair(rng: Random) -> Pair:
    """A colour and a shape; a muted colour less often than `MUTED`, since some stand out from nothing."""
    return rng.choice(_MUTED if rng.random() < MUTED else _VIVID)


def _single(rng: Random, pair: Pair) -> Scene:
    colour, shape = pair
    radius = rng.choice((SMALL, LARGE))
    x, y = _nameable(rng, radius), _nameable(rng, radius)
    return Scene(rng.choice(_BACKGROUNDS), (_object(shape, colour, (x, y, radius)),))


def _object(shape: Shape, colour: Colour, disc: Disc) -> Object:
    x, y, radius = disc
    return Object(shape, colour, x / CELLS, y / CELLS, radius / CELLS)


def _within(rng: Random, low: float, high: float) -> float:
    """The middle of a cell between the two."""
    return rng.randint(math.ceil(low - 0.5), math.floor(high - 0.5)) + 0.5


def _nameable(rng: Random, radius: float) -> float:
    """A coordinate plainly at the low side, in the middle or at the high side of the picture."""
    low = _within(rng, radius, AT_THE_SIDE)
    return rng.choice((low, MIDDLE, CELLS - low))


def _pair(rng: Random, held_out: bool) -> Scene:
    relation = rng.choice(RELATIONS)
    while True:
        (colour, shape), (other_colour, other) = _trained_pair(rng), _trained_pair(rng)
        if is_held_out(shape, relation, other) != held_out or (colour, shape) == (other_colour, other):
            continue
        if relation != "inside" or other in FRAMES:
            break
    first, second = _inside(rng) if relation == "inside" else _beside(rng, relation)
    objects = _object(shape, colour, first), _object(other, other_colour, second)
    return Scene(rng.choice(_BACKGROUNDS), objects, relation)


def _inside(rng: Random) -> tuple[Disc, Disc]:
    x, y = _within(rng, OUTER, CELLS - OUTER), _within(rng, OUTER, CELLS - OUTER)
    return (x, y, SMALL), (x, y, OUTER)


def _beside(rng: Random, relation: Relation) -> tuple[Disc, Disc]:
    """Two objects as for "left of", then mirrored and turned into what was asked for."""
    first, last = SMALL, CELLS - SMALL
    while True:
        a, b = _within(rng, first, MIDDLE), _within(rng, MIDDLE, last)
        if b - a >= 2 * SMALL + GAP:
            break
    c = _within(rng, first, last)
    d = min(max(c + rng.randint(-SLANT, SLANT), first), last)
    if relation in ("right of", "below"):
        a, b = b, a
    if relation in ("above", "below"):
        return (c, a, SMALL), (d, b, SMALL)
    return (a, c, SMALL), (b, d, SMALL)


def _count(rng: Random) -> Scene:
    """Equal objects, each in a quarter of the picture of its own."""
    colour, shape = _trained_pair(rng)
    furthest = MIDDLE - GAP / 2 - SMALL
    quarters = rng.sample(tuple(product((False, True), repeat=2)), rng.choice((2, 3, 4)))
    objects = []
    for right, bottom in quarters:
        # In the far half the same span, mirrored, keeps the same distances to border and neighbour.
        x, y = _within(rng, SMALL, furthest), _within(rng, SMALL, furthest)
        disc = (CELLS - x if right else x, CELLS - y if bottom else y, SMALL)
        objects.append(_object(shape, colour, disc))
    return Scene(rng.choice(_BACKGROUNDS), tuple(objects))
