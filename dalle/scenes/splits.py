"""Which scenes and wordings training never meets, so that what was learned can be told from what was seen."""

import zlib
from typing import Literal, get_args

from dalle.scenes.facts import COLOURS, SHAPES, Colour, Relation, Scene, Shape

# train      what models are trained on
# heldout    the same kinds of scene, other pictures
# pairs      one object, of a colour that its shape never has in train
# relations  two objects whose shapes never stand in that relation in train
# wordings   captions of a form that train never has for such scenes (words.py); the pictures, too, are others
Split = Literal["train", "heldout", "pairs", "relations", "wordings"]
SPLITS: tuple[Split, ...] = get_args(Split)

Pair = tuple[Colour, Shape]

HELD_OUT = 8  # one picture of so many is kept out of train
CELLS = 9  # of a picture per side; an object is centred on one, so there are few enough places to learn

# One for each shape, so that all of them stay equally common in train.
HELD_OUT_PAIRS: tuple[Pair, ...] = (
    ("orange", "circle"),
    ("pink", "square"),
    ("blue", "triangle"),
    ("purple", "star"),
    ("green", "heart"),
    ("red", "diamond"),
    ("yellow", "cross"),
    ("cyan", "ring"),
)
TRAINED_PAIRS: tuple[Pair, ...] = tuple(
    (colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in HELD_OUT_PAIRS
)

# An eighth of what there is of each relation; each shape keeps the other seven partners, on both sides.
_HELD_OUT_RELATIONS: frozenset[tuple[Shape, Relation, Shape]] = frozenset(
    [(shape, "left of", SHAPES[(i + 3) % len(SHAPES)]) for i, shape in enumerate(SHAPES)]
    + [(shape, "above", SHAPES[(i + 6) % len(SHAPES)]) for i, shape in enumerate(SHAPES)]
    + [("star", "inside", "circle"), ("heart", "inside", "square")]
    + [("triangle", "inside", "diamond"), ("cross", "inside", "ring")]
)
_INVERSE: dict[Relation, Relation] = {"right of": "left of", "below": "above"}


def is_held_out(first: Shape, relation: Relation, second: Shape) -> bool:
    """Whether no trained picture shows this; "a right of b" is the same picture as "b left of a"."""
    if relation in _INVERSE:
        first, relation, second = second, _INVERSE[relation], first
    return (first, relation, second) in _HELD_OUT_RELATIONS


def is_trained_picture(scene: Scene) -> bool:
    """Whether the picture is one for train: seven of eight are, and no pattern tells which.

    Decided by a checksum of what is to be seen, whatever the order of the objects; a mirrored picture falls
    as its original does, since stage 1 mirrors what it trains on. Anything with a pattern, such as every
    second position, would be learned, and held-out pictures would surprise by it alone. With half of all
    held out, a model that trained for an hour learned which ones are missing (docs/log.md).
    """
    seen = sorted(
        (thing.shape, thing.colour, *_halves(abs(thing.x - 0.5), thing.y, thing.radius))
        for thing in scene.objects
    )
    return zlib.crc32(repr((scene.background, seen)).encode()) % HELD_OUT != HELD_OUT - 1


def _halves(*lengths: float) -> list[int]:
    """In halves of a cell, of which all places and radii are whole numbers."""
    return [round(2 * CELLS * length) for length in lengths]
