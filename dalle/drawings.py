"""What `sample` and `reconstruct` leave behind: PNGs that say how they were made, and sheets of them."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dalle.checkpoint import write_json
from dalle.data.augment import centre_crop
from dalle.data.images import decode
from dalle.data.source import BadSample
from dalle.errors import DataError
from dalle.pictures import contact_sheet, grid, save_png, to_images, to_pixels
from stage1_dvae.model import DVAE


def save_drawings(
    folder: Path, pictures: Sequence[Image.Image], captions: Sequence[str], n: int, made: Mapping[str, Any]
) -> list[Path]:
    """Write every picture as PNG with a .json beside it, and a contact sheet where there are several.

    Args:
        captions: the prompt of every picture, n pictures each in turn.
        made: run, seed and settings; also written into the PNGs.

    Returns:
        The paths of the pictures, then of the sheet.
    """
    paths = []
    for i, (picture, prompt) in enumerate(zip(pictures, captions, strict=True)):
        facts = {"prompt": prompt, "picture": i % n, **made}
        path = folder / f"{_stem(prompt)}-seed{made['seed']}-{i % n}.png"
        save_png(path, picture, facts)
        write_json(path.with_suffix(".json"), facts)
        paths.append(path)
    if len(pictures) > 1:
        name = _stem(captions[0]) if len(set(captions)) == 1 else f"{_stem(captions[0])}-and-others"
        sheet = folder / f"{name}-seed{made['seed']}-sheet.png"
        save_png(sheet, contact_sheet(pictures, captions), {"prompts": json.dumps(list(captions)), **made})
        paths.append(sheet)
    return paths


def _stem(prompt: str) -> str:
    """A file name that one recognises the prompt by."""
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60] or "prompt"


def save_reconstructions(folder: Path, model: DVAE, images: Iterable[Path]) -> list[Path]:
    """Write each picture beside its reconstruction: the input's centre square left, the dVAE's right.

    Raises:
        DataError: a file is missing, is no picture, or is smaller than the model's pictures.
    """
    paths = []
    device = next(model.parameters()).device
    for source in images:
        try:
            cropped = centre_crop(decode(source, str(source)), model.config.image_size)
        except BadSample as bad:
            raise DataError(f"{bad}; give pictures that can be read") from bad
        except DataError as error:
            raise DataError(f"{source}: {error}") from error
        pixels = to_pixels(torch.from_numpy(cropped)[None]).to(device)
        with torch.inference_mode():
            pair = to_images(torch.cat([pixels, model.decode(model.encode(pixels))]))
        path = folder / f"{source.stem}-reconstruction.png"
        save_png(path, grid([pair]))
        paths.append(path)
    return paths
