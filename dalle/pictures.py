"""Pictures to look at: grids, contact sheets with captions, PNGs that say how they were made."""

import json
import textwrap
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dalle.checkpoint import replacing

GAP = 2  # pixels between the cells of a grid
COLUMNS = 4  # of a contact sheet


def to_images(pixels: Float[Tensor, "b 3 h w"]) -> list[Image.Image]:
    """Pixels in [0, 1] as pictures, rounded to 8 bits; nothing is stretched."""
    bytes_ = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
    return [Image.fromarray(picture.numpy()) for picture in bytes_]


def to_pixels(bytes_: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """8-bit pictures as pixels in [0, 1]."""
    return bytes_.float() / 255


def grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Equal-sized pictures in rows and columns."""
    width, height = rows[0][0].size
    columns = max(map(len, rows))
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, len(rows) * (height + GAP) - GAP), "white")
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            sheet.paste(picture, (c * (width + GAP), r * (height + GAP)))
    return sheet


def contact_sheet(pictures: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Pictures with their captions below, enlarged to at least 128 pixels so that the words fit."""
    side = max(128, pictures[0].width)
    font, write = _font(max(11, side // 12))
    letters = max(8, int(side / font.getlength("n")))
    texts = ["\n".join(textwrap.wrap(write(c), letters)[:3]) or " " for c in captions]
    line = sum(font.getmetrics()) + 2
    below = max(text.count("\n") + 1 for text in texts) * line + 6
    columns = min(COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (side + 8) + 8, rows * (side + below + 8) + 8), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        x, y = 8 + i % columns * (side + 8), 8 + i // columns * (side + below + 8)
        sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x, y))
        draw.multiline_text((x, y + side + 2), text, fill="black", font=font, spacing=2)
    return sheet


@cache
def _font(size: int) -> tuple[ImageFont.FreeTypeFont, Callable[[str], str]]:
    """A font of many alphabets, if the machine has one, or Pillow's own; and how texts are written in it."""
    with suppress(OSError):
        return ImageFont.truetype("DejaVuSans.ttf", size), str
    own = ImageFont.load_default(size)
    assert isinstance(own, ImageFont.FreeTypeFont)
    return own, _plain


def _plain(text: str) -> str:
    """Without accents, which Pillow's own font lacks."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def save_png(path: Path, picture: Image.Image, facts: Mapping[str, Any] | None = None) -> None:
    """Write a PNG, whole or not at all, with `facts` as its text entries."""
    info = PngInfo()
    for key, value in (facts or {}).items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    with replacing(path) as partial:
        picture.save(partial, format="PNG", pnginfo=info)
