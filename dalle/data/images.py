"""Picture files of every kind, as plain RGB."""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from dalle.data.source import BadSample

Image.init()  # registers the formats
# A list, because Pillow also opens formats that it hands to other programs (PostScript to Ghostscript).
FORMATS = sorted({"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"} & set(Image.OPEN))
SUFFIXES = frozenset(  # lower case
    f".{name}"
    for name in "avif bmp gif jfif jp2 jpeg jpg pgm png ppm tif tiff webp".split()  # noqa: SIM905
)

ORIENTATION = 0x0112  # the EXIF tag that says how a picture is to be turned
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What white may be in the modes of more than 8 bits: the first that holds the brightest pixel.
WHITE = {"I;16": (2**16 - 1,), "I": (2**16 - 1, 2**31 - 1), "F": (1, 2**8 - 1, 2**16 - 1)}


def decode(data: bytes | Path, key: str) -> Image.Image:
    """The picture in a file or in its bytes: mode RGB, upright, on white where it was transparent.

    Of an animation it is the first frame. Raises `BadSample` naming `key` for a missing, empty, corrupt or
    truncated file, and for one that unpacks to more than twice `Image.MAX_IMAGE_PIXELS`.
    """
    try:
        packed = data if isinstance(data, bytes) else data.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise BadSample(key, (getattr(error, "strerror", None) or str(error)).lower()) from error
    if not packed:
        raise BadSample(key, "the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata and large pictures
            with Image.open(io.BytesIO(packed), formats=FORMATS) as image:
                return _rgb(_upright(image))
    except UnidentifiedImageError as error:
        raise BadSample(key, "not a picture, or in a format that is not read") from error
    except Exception as error:  # a corrupt file makes Pillow's decoders raise almost anything
        raise BadSample(key, f"cannot be decoded: {error or type(error).__name__}") from error


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF data says; as it lies where these are damaged, which says nothing of the pixels."""
    image.load()  # a PNG may say it at its end, and of a TIFF Pillow itself turns the pixels here
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # what metadata of no known form make Pillow raise
        turn = None
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale a greyscale picture to 8 bits; Pillow's own conversion clips at 255, which is nearly black."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64)).clip(min=0)
    brightest = values.max(initial=0)
    levels = WHITE["I;16" if image.mode.startswith("I;16") else image.mode]
    white = next((level for level in levels if brightest <= level), brightest)
    greys = np.rint(values * (255 / white))
    if isinstance(clear := image.info.get("transparency"), int):  # of a PNG: this grey is none
        greys[values == clear] = 255
    return Image.fromarray(greys.astype(np.uint8))
