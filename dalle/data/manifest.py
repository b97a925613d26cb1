"""A table of pictures and captions: JSON lines, comma- or tab-separated values."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dalle.data import captions
from dalle.data.images import decode
from dalle.data.source import BadSample, Sample
from dalle.errors import DataError

SUFFIXES = (".jsonl", ".csv", ".tsv")


class Manifest:
    """The pictures that a `.jsonl`, `.csv` or `.tsv` lists under `image` or `file_name`, in its order.

    Captions stand under `caption`, `captions` or `text`, one or a list (in a table, as JSON); rows of the
    same image are one sample. The key is the image's path as written, relative to the manifest. `held_out`
    tells which samples the column `split` puts outside "train" in any of their rows; it is None without such
    a column.

    Raises `DataError` with the line number for a row that cannot be understood, and for an empty manifest.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.folder = path.parent
        texts: dict[str, tuple[str, ...]] = {}
        splits: dict[str, set[str]] = {}
        try:
            for number, row in _rows(path):
                key, found, split = _parse(row, f"{path}, line {number}")
                texts[key] = captions.tidy([*texts.get(key, ()), *found])
                splits.setdefault(key, set()).add(split)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; give a readable manifest") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from error
        if not texts:
            raise DataError(f"{path}: no rows; give a manifest with columns `image` and `caption`")
        self.keys = list(texts)
        self._captions = list(texts.values())
        marked = any(split for found in splits.values() for split in found)
        self.held_out = np.array([found != {"train"} for found in splits.values()]) if marked else None

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        key, texts = self.keys[index], self.captions(index)
        return Sample(decode(self.folder / key, key), texts, key)

    def captions(self, index: int) -> tuple[str, ...]:
        if not self._captions[index]:
            raise BadSample(self.keys[index], "no caption in the manifest")
        return self._captions[index]


def _parse(row: Any, place: str) -> tuple[str, tuple[str, ...], str]:
    """(image, captions, split in lower case or "") of a row; `place` names it in errors."""
    if not isinstance(row, dict):
        raise DataError(f"{place}: {row!r:.40} is not an object; write one object with `image` and `caption`")
    if None in row:  # where csv puts values beyond the last column
        raise DataError(f"{place}: more values than columns; quote texts that contain the separator")
    image = row.get("image", row.get("file_name"))
    if not image or not isinstance(image, str) or not {"caption", "captions", "text"} & row.keys():
        columns = ", ".join(row) or "none"
        raise DataError(f"{place}: columns {columns}; expected a path in `image`, and captions in `caption`")
    try:
        image.encode("utf-8", "surrogateescape")  # or its key could not be hashed
        return image, captions.from_fields(row), str(row.get("split") or "").strip().lower()
    except ValueError as error:
        raise DataError(f"{place}: {error}") from error


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, fields) of every row that is not blank."""
    if path.suffix.lower() == ".jsonl":
        yield from _json_rows(path)
    else:
        yield from _table_rows(path, "\t" if path.suffix.lower() == ".tsv" else ",")


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{path}, line {number}: broken JSON ({error}); write one object a line"
                ) from error


def _table_rows(path: Path, separator: str) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        # Strict, or a quote that is never closed swallows the rows after it without a word.
        rows = csv.DictReader(lines, delimiter=separator, strict=True)
        try:
            rows.fieldnames = [name.strip() for name in rows.fieldnames or ()]
            for row in rows:
                yield rows.line_num, {name: _unpack(cell) for name, cell in row.items()}
        except csv.Error as error:
            raise DataError(
                f"{path}, line {rows.reader.line_num}: {error}; quote texts that hold quotes and double those"
            ) from error


def _unpack(cell: Any) -> Any:
    """A cell that holds a JSON list of texts as that list, any other as it is."""
    if isinstance(cell, str) and cell.startswith("["):
        try:
            found = json.loads(cell)
        except (ValueError, RecursionError):
            return cell
        return found if all(isinstance(text, str) for text in found) else cell
    return cell
