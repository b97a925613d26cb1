"""What `sample` and `reconstruct` leave behind: PNGs that say how they were made, and sheets of them."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dalle.checkpoint import read_json, write_json
from dalle.console import say, warn
from dalle.data.augment import centre_crop
from dalle.data.images import decode
from dalle.data.source import BadSample
from dalle.errors import CheckpointError, DataError
from dalle.pictures import contact_sheet, grid, save_png, to_images, to_pixels
from stage1_dvae.model import DVAE


def save_drawings(
    folder: Path, pictures: Iterable[Image.Image], captions: Sequence[str], n: int, made: Mapping[str, Any]
) -> list[Path]:
    """Write every picture as PNG with a .json beside it, and a contact sheet where there are several.

    Args:
        pictures: written as they come.
        captions: the prompt of every picture, n pictures each in turn.
        made: run, seed and settings; also written into the PNGs. A file is replaced only by the picture
            of the same prompt and settings.

    Returns:
        The paths of the pictures, then of the sheet.
    """
    paths: list[Path] = []
    drawn: list[Image.Image] = []
    coming = iter(pictures)
    for start in range(0, len(captions), n):
        prompt = captions[start]
        facts = [{"prompt": prompt, "picture": i, **made} for i in range(n)]
        first = next(coming)  # before names are taken: where nothing can be drawn, none is left behind
        names = _free(folder, _stem(prompt), [f"-seed{made['seed']}-{i}" for i in range(n)], facts)
        for i, (path, fact) in enumerate(zip(names, facts, strict=True)):
            drawn.append(next(coming) if i else first)
            _save(path, drawn[-1], fact)
        paths += names
    if len(drawn) > 1:
        stem = _stem(captions[0]) + ("" if len(set(captions)) == 1 else "-and-others")
        fact = {"prompts": list(captions), **made}
        (sheet,) = _free(folder, stem, [f"-seed{made['seed']}-sheet"], [fact])
        _save(sheet, contact_sheet(drawn, captions), fact)
        paths.append(sheet)
    return paths


@contextmanager
def previewing(
    folder: Path, captions: Sequence[str], wanted: bool
) -> Iterator[Callable[[int, list[Image.Image]], None] | None]:
    """While it lasts, preview.png in the folder shows the pictures under way; None where that is not wanted.

    It is preview-2.png and so on where there is such a file, and which one is told.

    Args:
        captions: the prompt of every picture that will be drawn.
    """
    path: Path | None = None

    def show(first: int, pictures: list[Image.Image]) -> None:
        nonlocal path
        if path is None:
            names = (folder / f"preview{mark}.png" for mark in _marks())
            path = next(name for name in names if _take(name))  # only what is ours goes away at the end
            say(f"what is drawn so far: {path}")
        save_png(path, contact_sheet(pictures, captions[first : first + len(pictures)]))

    try:
        yield show if wanted else None
    finally:
        if path is not None:
            path.unlink(missing_ok=True)


def readable(path: Path) -> str:
    """A path as text that can be written anywhere: bytes that are not UTF-8 are shown as \\xff."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _save(path: Path, picture: Image.Image, facts: Mapping[str, Any]) -> None:
    save_png(path, picture, facts)
    write_json(path.with_suffix(".json"), facts)


def _stem(prompt: str) -> str:
    """A file name that one recognises the prompt by; 60 letters, or fewer where they take many bytes."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60]
    return words.encode()[:150].decode(errors="ignore") or "prompt"


def _free(folder: Path, stem: str, endings: Sequence[str], facts: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Paths with a number on the stem if need be, so that no picture made otherwise is overwritten.

    From then on they are taken, for samplings at the same time too: by the .json of the first.
    """
    tries = ([folder / f"{stem}{mark}{ending}.png" for ending in endings] for mark in _marks())
    free = (paths for paths in tries if all(map(_is_free, paths, facts)))
    return next(
        paths for paths in free if _take(paths[0].with_suffix(".json")) or _is_free(paths[0], facts[0])
    )


def _take(path: Path) -> bool:
    """Make an empty file of this name; False where there is one already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        path.touch(exist_ok=False)
        return True
    return False


def _marks() -> Iterator[str]:
    """Nothing, then -2, -3, …"""
    yield ""
    yield from (f"-{number}" for number in count(2))


def _is_free(path: Path, facts: Mapping[str, Any]) -> bool:
    """Nothing lies there, or the same picture drawn before."""
    beside = path.with_suffix(".json")
    if not path.exists() and not beside.exists():
        return True
    try:
        return read_json(beside) == facts
    except CheckpointError:
        return False


def save_reconstructions(
    folder: Path, model: DVAE, images: Iterable[Path], made: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """Write each picture beside its reconstruction: the input's centre square left, the dVAE's right.

    Gives the path of each pair once it is written.

    Args:
        made: what tells this dVAE; also written beside and into the PNGs. A file is replaced only by the same
            picture through the same one.

    Raises:
        DataError: after all others are written, where a file is missing, is no picture, or is smaller than
            the model's pictures.
    """
    refused: list[str] = []
    device = next(model.parameters()).device
    for source in images:
        try:
            cropped = centre_crop(decode(source, str(source)), model.config.image_size)
        except BadSample as bad:
            refused.append(f"{bad}; give pictures that can be read")
            continue
        except DataError as error:
            refused.append(f"{source}: {error}")
            continue
        pixels = to_pixels(torch.from_numpy(cropped)[None]).to(device)
        with torch.inference_mode():
            pair = to_images(torch.cat([pixels, model.decode(model.encode(pixels))]))
        facts = {"image": readable(source.absolute()), **(made or {})}
        (path,) = _free(folder, readable(Path(source.stem)), ["-reconstruction"], [facts])
        _save(path, grid([pair]), facts)
        yield path
    for reason in refused[:-1]:
        warn(reason)
    if refused:
        raise DataError(refused[-1])
