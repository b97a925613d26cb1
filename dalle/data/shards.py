"""WebDataset shards: pictures and their captions inside tar archives."""

import glob
import os
import re
import tarfile
from collections.abc import Iterator
from functools import partial
from os.path import basename, splitext
from pathlib import Path

import numpy as np

from dalle.data import captions
from dalle.data.images import SUFFIXES, decode
from dalle.data.source import BadSample, Sample
from dalle.errors import DataError

BLOCK = 512  # bytes; a tar is made of these, and two of zeros end it
COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}

# Where a sample lies: offset and size in bytes, both 0 for captions that are not there.
# A table of numbers, because forked workers share its memory, unlike that of objects.
ROW = np.dtype([("shard", "i4"), ("image", "i8", 2), ("text", "i8", 2), ("json", "?")])


class Shards:
    """The pictures in tar archives: one, a folder of them, a glob, or a pattern such as `{00000..00099}.tar`.

    Members of the same stem are a sample: a picture and its captions in a `.txt`, one a line, or a `.json`
    with `caption` or `captions`. The key is archive.tar/member. The headers are read once, here, so that any
    sample can be read later by seeking. Archives that are cut off or damaged are used as far as they go, and
    stand in `bad`.

    Raises `DataError` for a shard that is missing or compressed, and if there are no pictures with captions.
    """

    def __init__(self, pattern: str) -> None:
        self.name = pattern
        self.paths = _expand(pattern)
        self.bad: list[BadSample] = []
        self.keys: list[str] = []
        tables = []
        for number, path in enumerate(self.paths):
            members, flaw = _members(path)
            if flaw:
                self.bad.append(BadSample(path.name, flaw))
            rows = list(_samples(members))
            self.keys += [f"{path.name}/{image.name}" for image, _ in rows]
            tables.append(np.array([_row(number, image, text) for image, text in rows], dtype=ROW))
        self._table = np.concatenate(tables)
        if not self._table["text"].any():
            flaw = f" ({self.bad[0]})" if self.bad else ""
            raise DataError(
                f"{pattern}: {len(self)} pictures in {len(self.paths)} shards, none with captions{flaw}; "
                "put a .txt or .json of the same name beside each"
            )

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        key, texts = self.keys[index], self.captions(index)
        return Sample(decode(self._read(index, "image"), key), texts, key)

    def captions(self, index: int) -> tuple[str, ...]:
        key, row = self.keys[index], self._table[index]
        if not row["text"].any():
            raise BadSample(key, "neither a .txt nor a .json of the same name in the archive")
        name = splitext(basename(key))[0] + (".json" if row["json"] else ".txt")
        return captions.from_file(name, self._read(index, "text"), key)

    def _read(self, index: int, what: str) -> bytes:
        row = self._table[index]
        offset, size = row[what].tolist()
        try:
            with self.paths[row["shard"]].open("rb") as archive:
                archive.seek(offset)
                return archive.read(size)
        except OSError as error:
            raise BadSample(self.keys[index], (error.strerror or str(error)).lower()) from error


def _row(shard: int, image: tarfile.TarInfo, text: tarfile.TarInfo | None) -> tuple[object, ...]:
    where = (text.offset_data, text.size) if text else (0, 0)
    return (
        shard,
        (image.offset_data, image.size),
        where,
        text is not None and text.name.lower().endswith(".json"),
    )


def _samples(members: list[tarfile.TarInfo]) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarInfo | None]]:
    """(picture, captions) of every picture, in the archive's order; a .txt goes before a .json."""
    files = [(*splitext(member.name), member) for member in members]
    texts = {stem: member for stem, suffix, member in files if suffix.lower() == ".json"}
    texts |= {stem: member for stem, suffix, member in files if suffix.lower() == ".txt"}
    for stem, _, member in files:
        if _is_picture(member.name):
            yield member, texts.get(stem)


def _members(path: Path) -> tuple[list[tarfile.TarInfo], str]:
    """The whole files in a tar, by reading its headers, and what is wrong with the rest of it or ""."""
    with path.open("rb") as archive:
        start = archive.read(BLOCK)
        size = archive.seek(0, 2)
        for magic, program in COMPRESSED.items():
            if start.startswith(magic):
                raise DataError(f"{path}: compressed, so it cannot be read at random; {program} it first")
        members: list[tarfile.TarInfo] = []
        end = links = 0
        archive.seek(0)
        try:
            with tarfile.open(fileobj=archive, mode="r:") as tar:
                for member in tar:
                    if not member.isreg():
                        end = member.offset_data
                        links += (member.issym() or member.islnk()) and _is_picture(member.name)
                        continue
                    end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                    if member.offset_data + member.size > size:
                        return members, f"cut off inside {member.name}; what follows is lost"
                    if not basename(member.name).startswith("."):  # as macOS's ._name.jpg
                        members.append(member)
        except tarfile.TarError as error:
            return members, f"{error} after {len(members)} files; what follows is lost"
        # tarfile takes a damaged header for the end, without a word.
        archive.seek(end)
        mark = archive.read(BLOCK)
        follows = any(any(part) for part in iter(partial(archive.read, 2**20), b""))
    if mark != bytes(BLOCK):
        return members, f"{'damaged' if mark else 'cut off'} at byte {end:,}; what follows is lost"
    if follows:
        return members, f"goes on behind its end at byte {end:,}; what follows is lost, unpack it"
    return members, f"{links} pictures are links, which are not followed; pack the files" if links else ""


def _is_picture(name: str) -> bool:
    return splitext(name)[1].lower() in SUFFIXES


def _expand(pattern: str) -> list[Path]:
    """The archives that a path, a folder, a glob or a brace pattern means. Raises `DataError`."""
    paths = []
    for name in [pattern] if os.path.exists(pattern) else _braces(pattern):
        if Path(name).is_dir():
            found = sorted(Path(name).glob("[!.]*.tar"))
        elif Path(name).is_file():
            found = [Path(name)]
        else:
            found = sorted(path for path in map(Path, glob.glob(name, recursive=True)) if path.is_file())
        if unreadable := [path for path in found if not os.access(path, os.R_OK)]:
            raise DataError(f"{unreadable[0]}: permission denied; permit reading the shard")
        if not found:
            raise DataError(f"{pattern}: the shard {name} is missing; give .tar archives that exist")
        paths += found
    return paths


def _braces(pattern: str) -> list[str]:
    """Write out {00..12} and {a,b} as a shell does; numbers keep the width of a first one with zeros."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not match:
        return [pattern]
    first, last, words = match.groups()
    if first and int(first) > int(last):
        raise DataError(f"{pattern}: {{{first}..{last}}} counts backwards; give the smaller number first")
    choices = words.split(",") if words else [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
    return [
        pattern[: match.start()] + choice + rest
        for choice in choices
        for rest in _braces(pattern[match.end() :])
    ]
