"""Reads a picture of a scene, without any network, and says which of a caption's facts hold in it."""

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dalle.scenes.draw import draw
from dalle.scenes.facts import SHAPES, Background, Object, Scene
from dalle.scenes.regions import Region, fill, find_regions

LEAST_FIT = 0.7
MOST_STRAY = 60


@dataclass(frozen=True)
class Finding(Object):
    """An object as seen: shape and colour are the likeliest."""

    fit: float
    stray: float


@dataclass(frozen=True)
class Reading:
    background: Background | None
    objects: tuple[Finding, ...]


BLURS = (0, 0.12, 0.2)
REACH = 1.75
CELLS = 40
SCALES = (0.93, 1.0, 1.07)
SHIFTS = ((0.0, 0.0), (-0.1, 0.0), (0.1, 0.0), (0.0, -0.1), (0.0, 0.1))


def read(picture: Image.Image | UInt8[np.ndarray, "h w 3"]) -> Reading:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    background, regions = find_regions(image)
    return Reading(background, tuple(_recognise(r) for r in regions))


def _frame(cover):
    """Centre and radius (of the disc of equal area) with its holes, in pixels."""
    solid = np.where(fill(cover > 0.5), np.maximum(cover, cover <= 0.5), cover)
    area = solid.sum()
    at = np.arange(len(cover)) + 0.5
    return float(solid.sum(0) @ at / area), float(solid.sum(1) @ at / area), float(np.sqrt(area / np.pi))


def _sample(cover, xs, ys):
    at = np.arange(len(cover), dtype=np.float32) + 0.5
    wx = np.maximum(0, 1 - np.abs(xs[:, None] - at))
    wy = np.maximum(0, 1 - np.abs(ys[:, None] - at))
    return wy @ cover @ wx.T


_GRID = ((np.arange(CELLS) + 0.5) / CELLS * 2 - 1).astype(np.float32) * REACH


def _blur(cover, sigma):
    at = np.arange(len(cover))
    kernel = np.exp(-((at[:, None] - at) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum(1, keepdims=True)
    return kernel @ cover @ kernel.T


@cache
def _bank():
    side, radius = 128, 0.4
    bank, meta = [], []
    for shape in SHAPES:
        px = np.asarray(draw(Scene("black", (Object(shape, "yellow", 0.5, 0.5, radius),)), side))[
            ..., 0
        ].astype(np.float32)
        cover = (px - 12) / (255 - 12)
        for blur in BLURS:
            soft = _blur(cover, blur * side * radius) if blur else cover
            x, y, r = _frame(soft)
            for s, (dx, dy) in product(SCALES, SHIFTS):
                bank.append(_sample(soft, x + r * (_GRID - dx) / s, y + r * (_GRID - dy) / s) > 0.5)
                meta.append(
                    (shape, dx + s * (side / 2 - x) / r, dy + s * (side / 2 - y) / r, s * radius * side / r)
                )
    flat = np.array(bank, dtype=np.float32).reshape(len(bank), -1)
    return flat, flat.sum(1), meta


def _recognise(region: Region) -> Finding:
    side = len(region.cover)
    x, y, r = _frame(region.cover)
    xs, ys = x + r * _GRID, y + r * _GRID
    seen = (_sample(region.cover, xs, ys) > 0.5).astype(np.float32).ravel()
    bank, sizes, meta = _bank()
    if region.hidden is not None:
        shown = (_sample(region.hidden.astype(np.float32), xs, ys) < 0.5).astype(np.float32).ravel()
        seen = seen * shown
        sizes = bank @ shown
    both = bank @ seen
    fit = both / (sizes + seen.sum() - both)
    best = int(fit.argmax())
    shape, dx, dy, k = meta[best]
    return Finding(
        shape,
        region.colour,
        (x + r * dx) / side,
        (y + r * dy) / side,
        r * k / side,
        float(fit[best]),
        region.stray,
    )
