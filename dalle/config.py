"""Configuration: frozen dataclasses, presets, and `--set key=value` checked against the field's type."""

import dataclasses
import difflib
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from dalle.errors import ConfigError

C = TypeVar("C")


def setting(default: Any, doc: str, *, paper: str = "", fixed: str = "") -> Any:
    """A dataclass field that explains itself in `--show-config`.

    Args:
        default: the field's default, or `dataclasses.MISSING` where every preset must state it.
        doc: what it means, with its unit.
        paper: the paper's value and section.
        fixed: where the value comes from when it is not the user's to choose; `--set` refuses it.
    """
    return dataclasses.field(default=default, metadata={"doc": doc, "paper": paper, "fixed": fixed})


def override(sections: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Apply `key=value` texts to whichever of the sections has that field.

    Field names are unique over the sections of one stage, so users need not know the sections.

    Raises:
        ConfigError: no '=', an unknown key, a value of another type, or a combination that cannot be.
    """
    changes: dict[str, dict[str, Any]] = {name: {} for name in sections}
    for text in settings:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals:
            raise ConfigError(f"--set {text!r} is not of the form key=value")
        name = next((n for n, s in sections.items() if key in s.__dataclass_fields__), None)
        if name is None:
            raise ConfigError(_unknown(key, [f for s in sections.values() for f in s.__dataclass_fields__]))
        section = sections[name]
        if fixed := section.__dataclass_fields__[key].metadata.get("fixed"):
            raise ConfigError(f"{key} cannot be set: {fixed}")
        changes[name][key] = parse(key, value.strip(), get_type_hints(type(section))[key])
    return {name: dataclasses.replace(section, **changes[name]) for name, section in sections.items()}


def require(config: Any, rule: str, holds: Callable[[Any], bool], *names: str) -> None:
    """Raise `ConfigError` for the first of these settings whose value breaks the rule, as NaN does all."""
    for name in names:
        if not holds(value := getattr(config, name)):
            raise ConfigError(f"{name}={value} must {rule}")


def keys(settings: Sequence[str]) -> set[str]:
    """What `key=value` texts name."""
    return {text.partition("=")[0].strip() for text in settings}


def _unknown(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    advice = f"did you mean {close[0]!r}?" if close else "--show-config lists all settings"
    return f"unknown setting {key!r}; {advice}"


def parse(key: str, text: str, kind: Any) -> Any:
    """Read `text` as a value of type `kind`: int, float, bool, str, Literal, or one of these or None."""
    if get_origin(kind) in (Union, types.UnionType):
        if text.lower() in ("none", "null"):
            return None
        kind = next(k for k in get_args(kind) if k is not type(None))
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise ConfigError(f"{key}={text} must be one of {', '.join(get_args(kind))}")
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"{key}={text} must be true or false")
        return text.lower() == "true"
    try:
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError(text)
        return value
    except ValueError:
        wanted = {"int": "a whole number", "float": "a number"}[kind.__name__]
        raise ConfigError(f"{key}={text} must be {wanted}") from None


def to_json(config: Any) -> dict[str, Any]:
    """The fields of a config as plain values."""
    return dataclasses.asdict(config)


def from_json(kind: type[C], values: object, where: str) -> C:
    """Rebuild a config written by `to_json`; `where` names the file in messages.

    Raises:
        ConfigError: keys are missing or unknown, or a value has another type: the file is of another
            version or another model.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} does not describe a {kind.__name__}")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(values.keys() - fields.keys())
    required = {n for n, f in fields.items() if f.default is dataclasses.MISSING}
    missing = sorted(required - values.keys())
    if unknown or missing:
        raise ConfigError(
            f"{where} does not describe a {kind.__name__}: unknown {unknown or 'nothing'}, "
            f"missing {missing or 'nothing'}"
        )
    hints = get_type_hints(kind)
    for name, value in values.items():
        if not _fits(value, hints[name]):
            wanted = getattr(hints[name], "__name__", hints[name])
            raise ConfigError(f"{where}: {name} is {value!r}, expected {wanted}")
    return kind(**values)


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) in (Union, types.UnionType):
        return any(_fits(value, k) for k in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    return type(value) is kind or (kind is float and type(value) is int)


def preset(presets: Mapping[str, C], name: str) -> C:
    """The preset called `name`. Raises `ConfigError` naming the nearest one if there is none."""
    if name not in presets:
        close = difflib.get_close_matches(name, presets, n=1)
        advice = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(presets)}"
        raise ConfigError(f"unknown preset {name!r}; {advice}")
    return presets[name]


def describe(sections: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows (name, value, meaning, the paper's value) for `--show-config`."""
    return [
        (f.name, str(getattr(section, f.name)), f.metadata.get("doc", ""), f.metadata.get("paper", ""))
        for section in sections.values()
        for f in dataclasses.fields(section)
    ]
