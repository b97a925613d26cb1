"""Reads a picture of a scene, without any network, and says which of a caption's facts hold in it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, permutations, product

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from dalle.scenes.draw import draw
from dalle.scenes.facts import SHAPES, Background, Colour, Facts, Object, Relation, Scene, Shape
from dalle.scenes.regions import SIDE, Cover, Region, fill, find_regions
from dalle.scenes.words import NUMBER_WORDS, PLACE_WORDS, with_article

Picture = Image.Image | UInt8[np.ndarray, "h w 3"]

FIT = 0.75  # below it an object has none of the shapes; ours, softened or a little bent, reach 0.8
STRAY = 70  # beyond it an object has none of the colours, most of which are at least 85 apart
APART = 0.75  # of the sum of the radii: nearer to each other, two objects are not beside each other

# Shapes are compared in a frame of CELLS × CELLS points around the object, that reaches REACH times the
# radius of the disc of its area, with each shape as it is drawn, at other sizes and places, and softened.
CELLS, REACH = 28, 1.75
SCALES = (1.0, 0.93, 1.07)  # as it is comes first, to win ties
SHIFTS = ((0.0, 0.0), (-0.1, 0.0), (0.1, 0.0), (0.0, -0.1), (0.0, 0.1))
BLURS = (0.0, 0.1, 0.18)  # standard deviation, as a part of the radius
MOST_BLUR = 2.0  # pixels of SIDE: as much as a picture may lack in sharpness

MOST = 8  # objects among which a pair is looked for; more are not in any scene

Frame = Float[np.ndarray, " cells"]
Likeness = tuple[Shape, tuple[float, float], float]  # the centre and the radius of it in the frame
Asked = tuple[Shape, Colour]

_GRID = ((np.arange(CELLS) + 0.5) / CELLS * 2 - 1) * REACH


@dataclass(frozen=True)
class Finding(Object):
    """An object as seen: `shape` and `colour` are the likeliest, if not always likely."""

    fit: float  # of the shape: the area common to both as a part of the area of either, 0 to 1
    stray: float  # from the colour: Euclidean, of 255 a channel
    at: int  # its place among the objects of the reading
    within: int | None  # the place of the object that it lies inside of

    @property
    def known_shape(self) -> Shape | None:
        return self.shape if self.fit >= FIT else None

    @property
    def known_colour(self) -> Colour | None:
        return self.colour if self.stray <= STRAY else None


Pairing = tuple[Asked, Finding]


@dataclass(frozen=True)
class Reading:
    """What is seen in a picture, the largest object first. Without a known background nothing is."""

    background: Background | None
    objects: tuple[Finding, ...]


@dataclass(frozen=True)
class Verdict:
    """Which of the facts that a caption states hold, and in words why the others do not."""

    holds: dict[str, bool]  # of "count", "shape", "colour", "size", "place", "relation", "background"
    reasons: tuple[str, ...]  # "asked for a red circle, found a red square"

    @property
    def right(self) -> bool:
        return all(self.holds.values())


def judge(picture: Picture, facts: Facts) -> Verdict:
    """Whether `facts` hold in a picture of any size; it is read at 64 × 64 pixels."""
    return compare(read(picture), facts)


def read(picture: Picture) -> Reading:
    """The background and every object that covers at least 0.5 % of the picture."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    background, regions = find_regions(image)
    return Reading(background, tuple(_recognise(at, region) for at, region in enumerate(regions)))


def compare(reading: Reading, facts: Facts) -> Verdict:
    """Whether `facts` hold of what was seen.

    Every object counts; for the other facts, those count that come nearest to the ones asked for. A shape
    and its colour belong together: where a blue circle and a red square are seen, there is no red circle.
    """
    asked: list[Asked] = list(zip(facts.shapes, facts.colours, strict=True))
    pairs = _match(asked if len(asked) > 1 else asked * facts.count, reading.objects, facts.relation)
    all_there = {want for want, _ in pairs} == set(asked)
    first = pairs[0][1] if pairs else None
    relation = _relation(pairs[0][1], pairs[1][1]) if len(pairs) > 1 else None
    holds = {
        "count": len(reading.objects) == facts.count,
        "shape": all_there and all(seen.known_shape == shape for (shape, _), seen in pairs),
        "colour": all_there and all(seen.known_colour == colour for (_, colour), seen in pairs),
        "size": first is not None and first.size == facts.size,
        "place": first is not None and first.place == facts.place,
        "relation": len(pairs) > 1 and relation == facts.relation,
        "background": reading.background == facts.background,
    }
    stated = {"count", "shape", "colour"} | {name for name in holds if getattr(facts, name, None) is not None}
    holds = {name: held for name, held in holds.items() if name in stated}
    reasons = [
        *(() if reading.background else ("the background is none that is known, so nothing stands out",)),
        *_kind_reasons(asked, pairs),
        *_reasons({name for name, held in holds.items() if not held}, facts, reading, first, relation),
    ]
    return Verdict(holds, tuple(dict.fromkeys(reasons)))


def _match(asked: Sequence[Asked], found: Sequence[Finding], relation: Relation | None) -> list[Pairing]:
    """Each asked for with the object that comes nearest, in the order asked; fewer where fewer are found."""
    if len(set(asked)) == 1:
        found = sorted(found, key=lambda seen: _likeness([(asked[0], seen)], relation), reverse=True)
        return list(zip(asked, found, strict=False))
    number = min(len(asked), len(found))
    choices = product(combinations(asked, number), permutations(found[:MOST], number))
    return max(
        (list(zip(*choice, strict=True)) for choice in choices), key=lambda pairs: _likeness(pairs, relation)
    )


def _likeness(pairs: Sequence[Pairing], relation: Relation | None) -> tuple[int, int, bool]:
    """More is nearer: first to shapes and colours together, then to the colours, then to the relation."""
    shapes = sum(seen.known_shape == shape for (shape, _), seen in pairs)
    colours = sum(seen.known_colour == colour for (_, colour), seen in pairs)
    related = len(pairs) > 1 and _relation(pairs[0][1], pairs[1][1]) == relation
    return shapes + colours, colours, related


def _relation(first: Finding, second: Finding) -> Relation | None:
    """How the first stands to the second: the main direction, if they are apart."""
    if first.within == second.at:
        return "inside"
    dx, dy = second.x - first.x, second.y - first.y
    if max(abs(dx), abs(dy)) < APART * (first.radius + second.radius) or abs(dx) == abs(dy):
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def _kind_reasons(asked: Sequence[Asked], pairs: Sequence[Pairing]) -> Iterator[str]:
    for (shape, colour), seen in pairs:
        if (seen.known_shape, seen.known_colour) != (shape, colour):
            yield f"asked for {with_article(colour)} {shape}, found {_as_seen(seen)}"
    for shape, colour in asked:
        if (shape, colour) not in dict(pairs):
            yield f"asked for {with_article(colour)} {shape}, found none"


def _reasons(
    wrong: set[str], facts: Facts, reading: Reading, first: Finding | None, relation: Relation | None
) -> Iterator[str]:
    """Why the other facts do not hold; nothing of an object that is not there."""
    things = [
        f"{with_article(colour)} {shape}" for shape, colour in zip(facts.shapes, facts.colours, strict=True)
    ]
    if "count" in wrong:
        found = len(reading.objects)
        number = {0: "none", 1: "one", **NUMBER_WORDS}
        objects = "object" if facts.count == 1 else "objects"
        yield f"asked for {number[facts.count]} {objects}, found {number.get(found, found)}"
    if "size" in wrong and first:
        yield f"asked for a {facts.size} {facts.colours[0]} {facts.shapes[0]}, found a {first.size} one"
    if "place" in wrong and first and facts.place:
        yield f"asked for {things[0]} {PLACE_WORDS[facts.place][0]}, found it {PLACE_WORDS[first.place][0]}"
    if "relation" in wrong and len(reading.objects) > 1:
        found_it = f"{relation} it" if relation else "neither beside nor inside it"
        yield f"asked for {things[0]} {facts.relation} {things[1]}, found it {found_it}"
    if "background" in wrong and facts.background:
        found_one = f"{with_article(reading.background)} one" if reading.background else "none that is known"
        yield f"asked for {with_article(facts.background)} background, found {found_one}"


def _as_seen(seen: Finding) -> str:
    if seen.known_colour:
        shape = seen.known_shape or "thing of no known shape"
        return f"{with_article(seen.known_colour)} {shape}"
    return f"{with_article(seen.known_shape)} of no known colour" if seen.known_shape else "something unknown"


def _recognise(at: int, region: Region) -> Finding:
    """The shape whose likeness has the most in common with the region, and with it centre and radius."""
    x, y, radius = _disc(region.cover)
    xs, ys = x + radius * _GRID, y + radius * _GRID
    seen = (_sample(region.cover, xs, ys) > 0.5).ravel().astype(np.float32)
    likenesses, masks, areas, blurs = _gallery()
    if region.hidden is not None:
        shown = (_sample(region.hidden.astype(np.float32), xs, ys) < 0.5).ravel().astype(np.float32)
        seen, areas = seen * shown, masks @ shown
    common = masks @ seen
    fit = np.where(blurs * radius <= MOST_BLUR, common / (areas + seen.sum() - common), 0)
    best = int(fit.argmax())
    shape, (dx, dy), scale = likenesses[best]
    return Finding(
        shape=shape,
        colour=region.colour,
        x=(x + radius * dx) / SIDE,
        y=(y + radius * dy) / SIDE,
        radius=radius * scale / SIDE,
        fit=float(fit[best]),
        stray=region.stray,
        at=at,
        within=region.within,
    )


@cache
def _gallery() -> tuple[
    list[Likeness], Float[np.ndarray, "n points"], Float[np.ndarray, " n"], Float[np.ndarray, " n"]
]:
    """What every shape may look like in the frame: its mask, the mask's area, its blur in frame units."""
    likenesses, masks, blurs = [], [], []
    middle, radius = 64, 50  # pixels of the drawing
    for shape, blur in product(SHAPES, BLURS):
        thing = Object(shape, "yellow", 0.5, 0.5, radius / (2 * middle))
        drawing = draw(Scene("black", (thing,)), 2 * middle)
        red = np.asarray(drawing, dtype=np.float32)[..., 0]
        cover = _blurred((red - red.min()) / (red.max() - red.min()), blur * radius)
        x, y, unit = _disc(cover)
        for scale, (dx, dy) in product(SCALES, SHIFTS):
            mask = _sample(cover, x + unit * (_GRID - dx) / scale, y + unit * (_GRID - dy) / scale) > 0.5
            masks.append(mask.ravel())
            centre = dx + scale * (middle - x) / unit, dy + scale * (middle - y) / unit
            likenesses.append((shape, centre, scale * radius / unit))
            blurs.append(blur * scale * radius / unit)
    flat = np.array(masks, dtype=np.float32)
    return likenesses, flat, flat.sum(1), np.array(blurs, dtype=np.float32)


def _disc(cover: Cover) -> tuple[float, float, float]:
    """Centre and radius, in pixels, of the disc with the area and centroid of the covered and its holes."""
    holes = fill(cover > 0.5) & (cover <= 0.5)
    solid = np.where(holes, 1, cover)
    area = solid.sum()
    at = np.arange(len(cover)) + 0.5
    return float(solid.sum(0) @ at / area), float(solid.sum(1) @ at / area), float(np.sqrt(area / np.pi))


def _sample(cover: Cover, xs: Frame, ys: Frame) -> Float[np.ndarray, "cells cells"]:
    """At every (x, y), in pixels: between the pixels' middles bilinear, outside 0."""
    at = np.arange(len(cover)) + 0.5
    across, down = (np.maximum(0, 1 - np.abs(places[:, None] - at)) for places in (xs, ys))
    return down @ cover @ across.T


def _blurred(cover: Cover, deviation: float) -> Cover:
    if deviation == 0:
        return cover
    at = np.arange(len(cover))
    kernel = np.exp(-(((at[:, None] - at) / deviation) ** 2) / 2)
    kernel /= kernel.sum(1, keepdims=True)
    return kernel @ cover @ kernel.T
