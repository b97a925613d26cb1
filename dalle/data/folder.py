"""A folder of pictures, each with its captions in a text file beside it."""

import os
from collections import Counter
from os.path import splitext
from pathlib import Path

from dalle.data import captions
from dalle.data.images import SUFFIXES, decode
from dalle.data.source import BadSample, Sample
from dalle.errors import DataError

WANTED = "a .txt of the same name beside each, one caption a line"


class Folder:
    """Every picture below a folder, in the order of their paths; hidden files are left out.

    The captions of `a/b.jpg` are the lines of `a/b.txt`; the key is the path relative to the folder. Files
    of other kinds that have captions stand in `bad`. Raises `DataError` when there are no pictures, or not
    one of them has a caption file.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.path = path
        files = set(_files(path))
        self.keys = sorted(file for file in files if Path(file).suffix.lower() in SUFFIXES)
        if not self.keys:
            kinds = Counter(Path(file).suffix.lower() or "without a suffix" for file in sorted(files))
            found = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(3)) or "none"
            raise DataError(f"{path}: no picture among its files ({found}); give pictures with {WANTED}")
        # .TXT and its like, by the name that they would have
        self.texts = {_text(f): f for f in files if f.lower().endswith(".txt") and not f.endswith(".txt")}
        if not any(_text(key) in files or _text(key) in self.texts for key in self.keys):
            manifests = sorted(file for file in files if file.endswith((".jsonl", ".csv", ".tsv")))
            manifest = f"the manifest {path / manifests[0]}" if manifests else "a manifest of them"
            if len(manifests) > 1:
                manifest = f"one of its manifests, each of which may list a part: {', '.join(manifests[:9])}"
            raise DataError(
                f"{path}: {len(self.keys)} pictures, none with captions; put {WANTED}, or give {manifest}"
            )
        captioned = {file for file in files if file.endswith(".txt")} | self.texts.keys()
        lone = captioned - set(map(_text, self.keys))
        others = sorted(f for f in files if _text(f) in lone and not f.lower().endswith((".txt", ".json")))
        self.bad = [BadSample(f, "in a format that is not read; save it as PNG or JPEG") for f in others]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        key, texts = self.keys[index], self.captions(index)
        return Sample(decode(self.path / key, key), texts, key)

    def captions(self, index: int) -> tuple[str, ...]:
        key = self.keys[index]
        name = self.texts.get(_text(key), _text(key))
        try:
            content = (self.path / name).read_bytes()
        except OSError as error:
            raise BadSample(key, f"captions {name}: {(error.strerror or '').lower()}") from error
        return captions.from_file(name, content, key)


def _files(path: Path) -> list[str]:
    """The files below a folder, relative to it, without hidden ones such as macOS's `._name.jpg`.

    Links to folders are followed, once each. Raises `DataError` for a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: {error.strerror}; permit reading it, or give another folder")

    found, seen = [], set()
    for folder, subfolders, names in os.walk(path, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        prefix = Path(folder).relative_to(path)
        found += [(prefix / name).as_posix() for name in names if not name.startswith(".")]
    return found


def _text(key: str) -> str:
    return splitext(key)[0] + ".txt"
