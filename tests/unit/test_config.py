"""Settings: read by the field's type, refused in one line that says what to do."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import pytest

from dalle.config import describe, from_json, override, parse, preset, setting
from dalle.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Model:
    width: int = setting(dataclasses.MISSING, "channels", paper="3,968 (App. B.1)")
    grid: int = setting(7, "cells per side", fixed="it comes from the run's dVAE")
    gain: float | None = setting(None, "factor; none: as released")


@dataclass(frozen=True, kw_only=True)
class Run:
    lr: float = setting(3e-4, "step size")
    flip: bool = setting(True, "mirror half")
    schedule: Literal["plateau", "cosine"] = setting("plateau", "after the warm-up")
    name: str = setting("x", "a word")

    def __post_init__(self):
        if self.lr <= 0:
            raise ConfigError(f"lr={self.lr} must be above 0")


SECTIONS = {"model": Model(width=12), "run": Run()}


def message(function, *args) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_setting_reaches_the_section_that_has_the_field_and_no_other_field_changes():
    changed = override(SECTIONS, ["width=13", "lr = 1e-5 ", "gain=0.5", "flip=False", "width=17"])
    assert changed["model"] == Model(width=17, gain=0.5)
    assert changed["run"] == Run(lr=1e-5, flip=False)
    assert SECTIONS["model"] == Model(width=12)
    assert SECTIONS["run"] == Run()
    assert override(SECTIONS, []) == SECTIONS


def test_a_value_may_hold_an_equals_sign():
    assert override(SECTIONS, ["name=a=b"])["run"].name == "a=b"


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("17", int, 17),
        ("-3", int, -3),
        ("2.5e-3", float, 0.0025),
        ("3", float, 3.0),
        ("True", bool, True),
        ("false", bool, False),
        ("1e3", str, "1e3"),
        ("cosine", Literal["plateau", "cosine"], "cosine"),
        ("None", float | None, None),
        ("null", int | None, None),
        ("0.25", float | None, 0.25),
        ("5", int | None, 5),
    ],
)
def test_text_becomes_a_value_of_the_fields_type(text, kind, value):
    parsed = parse("key", text, kind)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "kind", "wanted"),
    [
        ("1e3", int, "a whole number"),
        ("2.0", int, "a whole number"),
        ("fast", float, "a number"),
        ("nan", float, "a number"),
        ("inf", float | None, "a number"),
        ("", int, "a whole number"),
        ("none", float, "a number"),
        ("1", bool, "true or false"),
        ("linear", Literal["plateau", "cosine"], "one of plateau, cosine"),
    ],
)
def test_a_value_of_another_type_is_refused_with_what_was_wanted(text, kind, wanted):
    assert message(parse, "key", text, kind) == f"key={text} must be {wanted}"


def test_an_unknown_key_suggests_the_nearest():
    assert message(override, SECTIONS, ["widht=3"]) == "unknown setting 'widht'; did you mean 'width'?"
    assert message(override, SECTIONS, ["qqqq=3"]).endswith("--show-config lists all settings")


def test_a_setting_needs_an_equals_sign():
    assert message(override, SECTIONS, ["width"]) == "--set 'width' is not of the form key=value"


def test_a_field_that_is_not_the_users_is_refused_with_its_source():
    assert message(override, SECTIONS, ["grid=8"]) == "grid cannot be set: it comes from the run's dVAE"


def test_a_combination_that_cannot_be_is_refused():
    assert message(override, SECTIONS, ["lr=0"]) == "lr=0.0 must be above 0"


def test_a_whole_number_is_a_number():
    assert from_json(Run, {"lr": 1}, "config.json").lr == 1


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"width": 3, "depth": 2}, ["unknown ['depth']", "missing nothing"]),
        ({"grid": 3}, ["missing ['width']", "unknown nothing"]),
        ({"width": "3"}, ["width is '3', expected int"]),
        ({"width": True}, ["width is True, expected int"]),
        ({"width": 3, "gain": "half"}, ["gain is 'half', expected float | None"]),
        (None, ["does not describe a Model"]),
        ([3], ["does not describe a Model"]),
    ],
)
def test_a_file_of_another_kind_is_refused_by_name(values, parts):
    text = message(from_json, Model, values, "R/dvae/config.json")
    assert text.startswith("R/dvae/config.json")
    for part in parts:
        assert part in text


def test_an_unknown_preset_suggests_the_nearest_or_lists_all():
    presets = {"tiny": 1, "paper": 2}
    assert preset(presets, "tiny") == 1
    assert message(preset, presets, "papr") == "unknown preset 'papr'; did you mean 'paper'?"
    assert message(preset, presets, "qqq") == "unknown preset 'qqq'; choose from tiny, paper"


def test_every_field_is_described_with_its_value():
    rows = describe(SECTIONS)
    assert ("width", "12", "channels", "3,968 (App. B.1)") in rows
    assert [name for name, *_ in rows] == ["width", "grid", "gain", "lr", "flip", "schedule", "name"]
