"""From a picture of any size to a square of pixels: the paper's two listings, and the plain way."""

from itertools import pairwise

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from dalle.errors import DataError


def stage1_crop(
    image: Image.Image, target: int, rng: np.random.Generator, *, flip: bool = True
) -> UInt8[np.ndarray, "3 {target} {target}"]:
    """A random square of the picture, shrunk by AREA to 9/8–12/8 of `target`, cropped and flipped at random.

    Raises `DataError` if a side is shorter than `target`. Source: paper, Listing 1.
    """
    side = _short_side(image, target)
    left, top = (int(rng.integers(length - side, endpoint=True)) for length in image.size)
    low, high = min(side, 9 * target // 8), min(side, 12 * target // 8)
    cropped = _shrink_and_crop(image, (left, top), int(rng.integers(low, high, endpoint=True)), target, rng)
    return np.ascontiguousarray(cropped[:, :, ::-1]) if flip and rng.random() < 0.5 else cropped


def stage2_crop(
    image: Image.Image, target: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "3 {target} {target}"]:
    """A square from the middle of the picture, shrunk by AREA to 1–9/8 of `target` and cropped at random.

    Its offset lies in the central quarter of the slack, and it is never flipped: pictures may hold text.
    Raises `DataError` if a side is shorter than `target`. Source: paper, Listing 2.
    """
    side = _short_side(image, target)
    left, top = (_central_offset(length - side, rng) for length in image.size)
    size = int(rng.integers(target, min(side, 9 * target // 8), endpoint=True))
    return _shrink_and_crop(image, (left, top), size, target, rng)


def centre_crop(image: Image.Image, target: int) -> UInt8[np.ndarray, "3 {target} {target}"]:
    """The middle of the picture, its short side brought to `target` by LANCZOS: for evaluation.

    Raises `DataError` if a side is shorter than `target`. Source: openai/DALL-E, notebooks/usage.ipynb.
    """
    side = _short_side(image, target)
    width, height = (round(length * target / side) for length in image.size)
    left, top = round((width - target) / 2), round((height - target) / 2)
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    return _channels_first(np.asarray(resized.crop((left, top, left + target, top + target))))


def area_resize(pixels: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Average over areas, as TensorFlow 1 does it with `ResizeMethod.AREA` and `align_corners=True`.

    Source: paper, Listings 1 and 2; tensorflow/core/kernels/image/resize_area_op.cc.
    """
    height, width = pixels.shape[:2]
    if height == width == size:
        return pixels
    rows = _averages(pixels, size)
    averages = _averages(np.ascontiguousarray(rows.swapaxes(0, 1)), size).swapaxes(0, 1)
    return np.rint(averages.clip(0, 255)).astype(np.uint8)  # half to even


def _averages(pixels: np.ndarray, size: int) -> Float32[np.ndarray, "{size} a b"]:
    """Area averages along the first axis.

    Output x covers [x · scale, (x + 1) · scale) of the row. With aligned corners scale is
    (length − 1) / (size − 1), so the last one lies beyond the last pixel, which is repeated there.
    """
    if size == 1:
        return pixels.mean(0, keepdims=True, dtype=np.float32)
    edges = np.linspace(0, len(pixels) - 1, size)
    whole = edges.astype(int)
    # Whole pixels between the edges, less the part before the first edge, and the part before the second.
    sums = np.stack([pixels[low:high].sum(0, dtype=np.float32) for low, high in pairwise(whole)])
    parts = (edges - whole).astype(np.float32)[:, None, None] * pixels[whole]
    between = (sums - parts[:-1] + parts[1:]) * np.float32((size - 1) / (len(pixels) - 1))
    return np.concatenate([between, pixels[-1:].astype(np.float32)])


def _shrink_and_crop(
    image: Image.Image, corner: tuple[int, int], size: int, target: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "3 {target} {target}"]:
    left, top, side = *corner, min(image.size)
    square = np.asarray(image.crop((left, top, left + side, top + side)))
    x, y = (int(rng.integers(size - target, endpoint=True)) for _ in range(2))
    return _channels_first(area_resize(square, size)[y : y + target, x : x + target])


def _central_offset(slack: int, rng: np.random.Generator) -> int:
    low, high = 3 * slack // 8, 5 * slack // 8
    return int(rng.integers(low, max(low + 1, high)))


def _short_side(image: Image.Image, target: int) -> int:
    side = min(image.size)
    if side < target:
        width, height = image.size
        raise DataError(
            f"a picture of {width}×{height} pixels, expected at least {target}×{target}; give a larger one"
        )
    return side


def _channels_first(pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "3 h w"]:
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
