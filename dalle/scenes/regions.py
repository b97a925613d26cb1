"""Finds the areas of one colour in a picture, by colour alone and without a notion of shape."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from dalle.scenes.facts import BACKGROUNDS, COLOURS, Background, Colour

SIDE = 64  # pixels; every picture is brought to this size first
SPECK = 0.005  # of the picture: what covers less is no object; the smallest that is drawn covers 0.02
SOLID = 0.35  # of an object's pixels, at least, have all four neighbours in it; of a blurred edge's few have
PURE = 30  # nearer than this to a colour (Euclidean, of 255 a channel) a pixel is no mixture

Mask = Bool[np.ndarray, "side side"]
Cover = Float[np.ndarray, "side side"]
Pixels = Float[np.ndarray, "side side 3"]
Mean = Float[np.ndarray, "3"]  # of a colour's pixels

_COLOURS = tuple(COLOURS)
_PAINTS = np.array(list(COLOURS.values()), dtype=np.float32)
_GROUND = 0  # the background's label; a colour's is its place in the palette, counted from 1


@dataclass(frozen=True)
class Region:
    """A connected area of one colour."""

    colour: Colour  # the nearest of the palette
    stray: float  # how far from it the area's mean is: Euclidean, of 255 a channel
    cover: Cover  # how much of each pixel the area covers, 0 to 1
    hidden: Mask | None  # where something lies on top, so that `cover` says nothing
    within: int | None  # which region it lies inside of, the innermost one


def find_regions(picture: Image.Image) -> tuple[Background | None, tuple[Region, ...]]:
    """The background and what stands out from it; where the background cannot be told, nothing does."""
    pixels = _pixels(picture)
    background, ground = _background(pixels)
    if background is None:
        return None, ()
    labels = _labels(pixels, background, ground)
    masks, filled, holders = _nested(labels, _connected(labels))
    means = [pixels[_core(mask)].mean(0) for mask in masks]
    owner = np.full(labels.shape, -1)
    for i, mask in enumerate(masks):
        owner[mask] = i
    regions = []
    for i, mask in enumerate(masks):
        paint = int(labels[mask][0]) - 1
        stray = float(np.linalg.norm(means[i] - _PAINTS[paint]))
        near = grow(grow(mask))
        around = holders[i][0] if holders[i] else None
        lies_on = around if around is not None and _mostly(masks[around], near & ~mask) else i
        cover = _cover(pixels, means[i], ground if lies_on == i else means[lies_on])
        cover[~near | (owner >= 0) & (owner != i) & (owner != lies_on)] = 0
        on_top = [grow(filled[j]) for j in range(len(masks)) if i in holders[j]]
        hidden = np.logical_or.reduce(on_top) if on_top else None
        regions.append(Region(_COLOURS[paint], stray, cover, hidden, around))
    return background, tuple(regions)


def fill(mask: Mask) -> Mask:
    """With its holes: every pixel that has the mask to its left and right, above and below.

    Unlike a flood from outside, this does not leak in through a gap in a ring.
    """
    either = np.logical_or.accumulate
    return either(mask, 0) & either(mask[::-1], 0)[::-1] & either(mask, 1) & either(mask[:, ::-1], 1)[:, ::-1]


def grow(mask: Mask) -> Mask:
    """With the pixels that touch it, corners included."""
    return _of_3x3(mask, np.logical_or)


def _of_3x3(values: np.ndarray, combine: np.ufunc) -> np.ndarray:
    """`combine` of every pixel and the eight around it."""
    for _ in range(2):  # along one axis, then along the other
        near = values.copy()
        combine(near[1:], values[:-1], out=near[1:])
        combine(near[:-1], values[1:], out=near[:-1])
        values = near.T
    return values


def _pixels(picture: Image.Image) -> Pixels:
    picture = picture.convert("RGB")
    if picture.size != (SIDE, SIDE):
        shrinks = min(picture.size) > SIDE
        way = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC
        picture = picture.resize((SIDE, SIDE), way)
    return np.asarray(picture, dtype=np.float32)


def _background(pixels: Pixels) -> tuple[Background | None, Mean]:
    """The one that more than half of the border has, and its colour as it is there."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    nearest = _squares(border, _PAINTS).argmin(-1)
    counts = np.bincount(nearest, minlength=len(_PAINTS))
    background = max(BACKGROUNDS, key=lambda name: counts[_COLOURS.index(name)])
    paint = _COLOURS.index(background)
    if 2 * counts[paint] <= len(border):
        return None, _PAINTS[paint]
    return background, border[nearest == paint].mean(0)


def _squares(pixels: Float[np.ndarray, "*n 3"], to: Float[np.ndarray, "k 3"]) -> Float[np.ndarray, "*n k"]:
    """Squared distances."""
    return (pixels**2).sum(-1)[..., None] - 2 * pixels @ to.T + (to**2).sum(-1)


def _labels(pixels: Pixels, background: Background, ground: Mean) -> Int[np.ndarray, "side side"]:
    """Which colour each pixel belongs to.

    On an edge two colours mix, and the mixture may be like a third: half red, half white is nearest to
    pink. So a mixed pixel takes the label of the purest one, that nearest to its colour, of the 3 × 3.
    """
    squares = _squares(pixels, np.concatenate([ground[None], _PAINTS]))
    squares[..., 1 + _COLOURS.index(background)] = np.inf  # no object has it
    label = squares.argmin(-1)
    impurity = squares.min(-1).clip(0).astype(np.int64)
    key = impurity * 16 + label  # in one number, so that the least impurity brings its label along
    return np.where(impurity < PURE**2, label, _of_3x3(key, np.minimum) % 16)


def _connected(labels: Int[np.ndarray, "side side"]) -> list[Mask]:
    """The connected areas of every colour; specks and lines, such as soft edges, are left out."""
    start = np.ones_like(labels, dtype=bool)  # of a run of equal labels in a row
    start[:, 1:] = labels[:, 1:] != labels[:, :-1]
    run = start.ravel().cumsum().reshape(labels.shape) - 1
    meet = (labels[1:] == labels[:-1]) & (start[1:] | start[:-1]) & (labels[1:] != _GROUND)
    upper, lower = run[:-1][meet], run[1:][meet]
    root = np.arange(run[-1, -1] + 1)
    while (root[upper] != root[lower]).any():
        a, b = root[upper], root[lower]
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while (root[root] != root).any():
            root = root[root]
    part = root[run]
    sizes = np.bincount(part[labels != _GROUND])
    masks = [part == i for i in np.flatnonzero(sizes >= SPECK * labels.size)]
    return [mask for mask in masks if _core(mask).sum() > SOLID * mask.sum()]


def _core(mask: Mask) -> Mask:
    """The pixels whose four neighbours are in it too."""
    core = np.zeros_like(mask)
    inner = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    core[1:-1, 1:-1] = inner
    return core


def _nested(
    labels: Int[np.ndarray, "side side"], masks: list[Mask]
) -> tuple[list[Mask], list[Mask], list[list[int]]]:
    """The masks, the largest first; with their holes; and which of them each lies inside of, innermost first.

    What shows through a ring's hole is one with what the ring lies on.
    """
    filled = [fill(mask) for mask in masks]
    order = sorted(range(len(masks)), key=lambda i: int(filled[i].sum()), reverse=True)
    masks, filled = [masks[i] for i in order], [filled[i] for i in order]
    stack = np.array(filled).reshape(len(masks), labels.size)
    common = [np.count_nonzero(stack & area, axis=1) for area in stack]
    kept: list[int] = []
    holders: dict[int, list[int]] = {}
    for i in range(len(masks)):
        around = [j for j in reversed(kept) if common[i][j] > 0.9 * common[i][i]]
        shades = [int(labels[masks[j]][0]) for j in (i, *around)]
        if len(around) > 1 and shades[0] == shades[2] != shades[1]:
            masks[around[1]] = masks[around[1]] | masks[i]
        else:
            holders[i] = around
            kept.append(i)
    places = [[kept.index(j) for j in holders[i]] for i in kept]
    return [masks[i] for i in kept], [filled[i] for i in kept], places


def _mostly(mask: Mask, area: Mask) -> bool:
    """Whether the mask has more than half of the area."""
    return bool(2 * (mask & area).sum() > area.sum())


def _cover(pixels: Pixels, colour: Mean, under: Mean) -> Cover:
    """How far each pixel is on the way from what lies under to the colour."""
    way = colour - under
    return ((pixels - under) @ (way / (way @ way))).clip(0, 1)
