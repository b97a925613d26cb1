"""Captions as files write them: lines of text, or the fields of a record."""

import json
import re
from collections.abc import Mapping
from typing import Any

from dalle.data.source import BadSample


def from_file(name: str, content: bytes, key: str) -> tuple[str, ...]:
    """The captions in a `.json` file, an object as in `from_fields`, or in a text file, one a line, in UTF-8.

    Raises `BadSample` naming `key`, the picture they belong to, if there are none or they cannot be read.
    """
    try:
        if name.lower().endswith(".json"):
            found = from_fields(json.loads(content))
        else:
            found = tidy(lines(content.decode("utf-8-sig")))
    except ValueError as error:
        raise BadSample(key, f"captions {name}: {error}") from error
    if not found:
        raise BadSample(key, f"captions {name}: there are none in it")
    return found


def lines(text: str) -> list[str]:
    """Its lines, as files end them: captions from the web hold other characters that Python splits at."""
    return re.split(r"\r\n|\r|\n", text)


def from_fields(fields: Any) -> tuple[str, ...]:
    """What stands under `caption` and `captions`, or else under `text`, each a text or a list of texts.

    Raises `ValueError` for a value of another kind, or if `fields` are no mapping.
    """
    if not isinstance(fields, Mapping):
        raise ValueError(f"{fields!r:.40} is not an object with named fields")
    found: list[str] = []
    for name in ("caption", "captions") if {"caption", "captions"} & fields.keys() else ("text",):
        value = fields.get(name)
        texts = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"`{name}` is {value!r:.40}, expected a text or a list of texts")
        found += texts
    return tidy(found)


def tidy(texts: list[str]) -> tuple[str, ...]:
    """The texts without surrounding blanks, empty ones and repetitions."""
    return tuple(dict.fromkeys(text for text in map(str.strip, texts) if text))
