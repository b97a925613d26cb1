"""From what the user calls the data to a source of samples."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from dalle.data.folder import Folder
from dalle.data.images import SUFFIXES as PICTURES
from dalle.data.manifest import SUFFIXES, Manifest
from dalle.data.shards import Shards
from dalle.data.source import Source
from dalle.data.split import KeyedSource, Split, subset
from dalle.errors import DataError


def located(data: str) -> str:
    """The same data from wherever it is named: "scenes", or an absolute path. Raises `DataError` if empty."""
    if not data:
        raise DataError("--data is empty; give scenes, or a path to pictures")
    return data if data == "scenes" else os.path.abspath(os.path.expanduser(data))


def open_source(data: str, split: Split, size: int, heldout: float = 0.02) -> Source:
    """The samples of one split; see `open_splits`."""
    return open_splits(data, [split], size, heldout)[0]


def open_splits(data: str, splits: Sequence[Split], size: int, heldout: float) -> list[Source]:
    """The samples of each split of `data`: "scenes", or a path to a folder, a manifest or shards.

    `size` is the side in pixels of built-in scenes; real pictures keep theirs. `heldout` is the fraction that
    is held out of data that names no splits. Raises `DataError` for data that is missing or of another kind.
    """
    if data == "scenes":
        from dalle.scenes.source import Scenes  # here, because its drawing is loaded for nothing otherwise

        return [Scenes(split, size) for split in splits]
    whole = _open(located(data))
    return [subset(whole, split, heldout) for split in splits]


def _holds_shards(folder: Path) -> bool:
    """Raises `DataError` where pictures lie beside the archives: half of the data would be left out."""
    names = [path for path in folder.iterdir() if not path.name.startswith(".")]
    shards = sum(path.suffix == ".tar" for path in names)
    pictures = sum(path.suffix.lower() in PICTURES for path in names)
    if shards and pictures:
        raise DataError(
            f"{folder}: {pictures} pictures beside {shards} .tar archives; give a folder of either kind"
        )
    return shards > 0


def _open(data: str) -> KeyedSource:
    path = Path(data)
    if path.is_dir():
        return Shards(data) if _holds_shards(path) else Folder(path)
    if path.suffix.lower() in SUFFIXES and path.is_file():
        return Manifest(path)
    if re.search(r"\.(tar|tgz)($|\.)", path.name):
        return Shards(data)
    raise DataError(
        f"{data}: {'of an unknown kind' if path.exists() else 'does not exist'}; give scenes, a folder of "
        "pictures with .txt captions, a .jsonl, .csv or .tsv manifest, or .tar shards such as {000..099}.tar"
    )
