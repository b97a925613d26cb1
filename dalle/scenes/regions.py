"""Finds the areas of one colour in a picture: by colour alone, without a notion of shape."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from dalle.scenes.facts import BACKGROUNDS, COLOURS, Background, Colour

SIDE = 64  # pixels to which every picture is brought first
PURE = 30  # nearer than this to a colour, of 255 a channel, it is no mixture
LEAST = 0.005  # of the picture: anything smaller is a speck

Mask = Bool[np.ndarray, "side side"]
Cover = Float[np.ndarray, "side side"]
Pixels = Float[np.ndarray, "side side 3"]

_COLOURS, _BACKGROUNDS = tuple(COLOURS), tuple(BACKGROUNDS)
_PAINTS = np.array(list(COLOURS.values()), dtype=np.float32)
_GROUNDS = np.array(list(BACKGROUNDS.values()), dtype=np.float32)
_NOTHING = 0  # the label of the background; a colour's is its place in the palette, from 1


@dataclass(frozen=True)
class Region:
    """A connected area of one colour."""

    colour: Colour  # the nearest of the palette
    stray: float  # Euclidean distance of the area's mean from that colour, of 255 a channel
    cover: Cover  # how much of each pixel it covers, 0 to 1
    hidden: Mask | None  # where something lies on top of it, so that `cover` says nothing


def find_regions(picture: Image.Image) -> tuple[Background | None, tuple[Region, ...]]:
    """The background and what stands out from it; without a background that can be told, nothing does."""
    if picture.size != (SIDE, SIDE):
        smaller = picture.size[0] < SIDE or picture.size[1] < SIDE
        picture = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC if smaller else Image.Resampling.BOX)
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    background, ground = _background(pixels)
    if background is None:
        return None, ()
    labels = _labels(pixels, ground)
    masks = _connected(labels)
    colours = [int(labels[mask][0]) for mask in masks]
    areas, within = _nested(masks)
    for i in range(len(masks)):
        if _is_island(i, within, colours):
            masks[within[i][1]] |= masks[i]
    kept = [i for i in range(len(masks)) if not _is_island(i, within, colours)]
    means = {i: pixels[_core(masks[i])].mean(0) for i in kept}
    regions = []
    for i in kept:
        near = grow(grow(masks[i]))
        rim = near & ~masks[i]
        below = within[i][0] if within[i] and 2 * (masks[within[i][0]] & rim).sum() > rim.sum() else None
        cover = _cover(pixels, means[i], ground if below is None else means[below])
        cover[~near] = 0
        for j in kept:
            if j not in (i, below):
                cover[masks[j]] = 0
        on_top = [grow(areas[j]) for j in kept if i in within[j]]
        paint = colours[i] - 1
        stray = float(np.linalg.norm(means[i] - _PAINTS[paint]))
        regions.append(
            Region(_COLOURS[paint], stray, cover, np.logical_or.reduce(on_top) if on_top else None)
        )
    return background, tuple(regions)


def fill(mask: Mask) -> Mask:
    """With its holes: all that has the mask to the left, to the right, above and below.

    Unlike a flood from outside, this does not leak through a gap in a ring.
    """
    either = np.logical_or.accumulate
    return either(mask, 0) & either(mask[::-1], 0)[::-1] & either(mask, 1) & either(mask[:, ::-1], 1)[:, ::-1]


def grow(mask: Mask) -> Mask:
    """By one pixel, corners included."""
    wide = mask.copy()
    wide[1:] |= mask[:-1]
    wide[:-1] |= mask[1:]
    tall = wide.copy()
    tall[:, 1:] |= wide[:, :-1]
    tall[:, :-1] |= wide[:, 1:]
    return tall


def _background(pixels: Pixels) -> tuple[Background | None, Float[np.ndarray, "3"]]:
    """The one that most of the border has, and its colour as it is there."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    palette = np.concatenate([_GROUNDS, _PAINTS])
    nearest = _squares(border, palette).argmin(-1)
    counts = np.bincount(nearest, minlength=len(palette))[: len(_GROUNDS)]
    best = int(counts.argmax())
    if 2 * counts[best] <= len(border):
        return None, _GROUNDS[best]
    return _BACKGROUNDS[best], border[nearest == best].mean(0)


def _squares(
    pixels: Float[np.ndarray, "*n 3"], palette: Float[np.ndarray, "k 3"]
) -> Float[np.ndarray, "*n k"]:
    """Squared distances."""
    return (pixels**2).sum(-1)[..., None] - 2 * pixels @ palette.T + (palette**2).sum(-1)


def _labels(pixels: Pixels, ground: Float[np.ndarray, "3"]) -> Int[np.ndarray, "side side"]:
    """Which colour each pixel belongs to.

    On an edge colours mix, and the mixture may be like a third: half red, half white is nearest to pink.
    So each pixel goes with the purest one, that nearest to its colour, of the 3 × 3 around it.
    """
    squares = _squares(pixels, np.concatenate([ground[None], _PAINTS]))
    label = squares.argmin(-1)
    impurity = np.take_along_axis(squares, label[..., None], -1)[..., 0]
    key = impurity.clip(0).astype(np.int64) * 16 + label  # one number, so that the minimum brings the label
    rows = key.copy()
    np.minimum(rows[1:], key[:-1], out=rows[1:])
    np.minimum(rows[:-1], key[1:], out=rows[:-1])
    both = rows.copy()
    np.minimum(both[:, 1:], rows[:, :-1], out=both[:, 1:])
    np.minimum(both[:, :-1], rows[:, 1:], out=both[:, :-1])
    return np.where(impurity < PURE**2, label, both % 16)


def _connected(labels: Int[np.ndarray, "side side"]) -> list[Mask]:
    """The connected areas of each label but the background's, less specks and lines."""
    start = np.ones_like(labels, dtype=bool)  # of a run of equal labels within a row
    start[:, 1:] = labels[:, 1:] != labels[:, :-1]
    run = start.ravel().cumsum().reshape(labels.shape) - 1
    meet = (labels[1:] == labels[:-1]) & (start[1:] | start[:-1]) & (labels[1:] != _NOTHING)
    above, below = run[:-1][meet], run[1:][meet]
    root = np.arange(run[-1, -1] + 1)
    while (root[above] != root[below]).any():
        a, b = root[above], root[below]
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while (root[root] != root).any():
            root = root[root]
    part = root[run]
    sizes = np.bincount(part[labels != _NOTHING], minlength=1)
    masks = [part == i for i in np.nonzero(sizes >= LEAST * labels.size)[0]]
    return [mask for mask in masks if _core(mask).any()]


def _core(mask: Mask) -> Mask:
    """All whose four neighbours belong to it too."""
    core = np.zeros_like(mask)
    core[1:-1, 1:-1] = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    return core


def _nested(masks: list[Mask]) -> tuple[list[Mask], list[list[int]]]:
    """The masks with their holes; and for each the others that hold nearly all of it, smallest first."""
    areas = [fill(mask) for mask in masks]
    sizes = [int(area.sum()) for area in areas]
    order = sorted(range(len(areas)), key=sizes.__getitem__)
    within = [
        [j for j in order if sizes[j] > sizes[i] and (areas[j] & area).sum() > 0.9 * sizes[i]]
        for i, area in enumerate(areas)
    ]
    return areas, within


def _is_island(i: int, within: list[list[int]], colours: list[int]) -> bool:
    """Whether it is only what shows through a ring that lies on something of the same colour."""
    return len(within[i]) > 1 and colours[within[i][0]] != colours[i] == colours[within[i][1]]


def _cover(pixels: Pixels, colour: Float[np.ndarray, "3"], under: Float[np.ndarray, "3"]) -> Cover:
    """How far each pixel is on the way from one colour to the other."""
    way = colour - under
    return ((pixels - under) @ (way / (way @ way))).clip(0, 1)
