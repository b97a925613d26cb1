"""What a training command is to do: from presets, options and what the run folder already holds."""

import dataclasses
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dalle.budget import Budget, lasting
from dalle.checkpoint import FORMAT, read_json, write_json
from dalle.config import describe, from_json, keys, override, preset, to_json
from dalle.console import say
from dalle.data.open import located, open_splits
from dalle.data.source import Source
from dalle.errors import CheckpointError, ConfigError, DataError
from dalle.precision import best_device
from dalle.states import newest_step, state_folders
from dalle.training import CHANGEABLE, Training

# Spans within `steps`. Not `patience`: over few updates a batch's noise would pass for a loss at a stand.
HORIZONS = ("warmup", "lr_steps", "beta_steps", "tau_steps")


@dataclass(frozen=True)
class Options:
    """What the user gave to a training command; None where nothing was given."""

    run: Path
    data: str | None = None
    preset: str | None = None
    steps: int | None = None
    settings: tuple[str, ...] = ()
    minutes: float | None = None  # to end in, in place of a number of steps


@dataclass(frozen=True)
class StageRun:
    """One stage of a run, resolved: its folder and everything its config.json holds."""

    folder: Path
    preset: str
    data: str
    model: Any
    training: Any
    resumed: bool
    spans: tuple[str, ...] = ()  # settings that keep their share of the steps while these are fitted
    minutes: float | None = None

    def budget(self) -> Budget | None:
        """The time to keep to, from now on, if there is one."""
        return None if self.minutes is None else Budget(self.minutes, self.training, self.spans)

    def sources(self, size: int) -> tuple[Source, Source]:
        """The samples to train on and the held-out ones; built-in scenes are drawn `size` pixels wide.

        Raises:
            DataError: there are none, or they are of another kind.
        """
        try:
            train, heldout = open_splits(self.data, ("train", "heldout"), size, self.training.heldout)
        except DataError as error:
            if self.resumed and not os.path.exists(self.data):
                path = self.folder / "config.json"
                raise DataError(f"{error}; if they have only moved, change data in {path}") from error
            raise
        return train, heldout

    def write(self, **more: Any) -> None:
        """Write config.json, before the first step."""
        sections = {"model": to_json(self.model), "training": to_json(self.training)}
        head = {"format": FORMAT, "preset": self.preset, "data": self.data}
        write_json(self.folder / "config.json", {**head, **more, **sections})

    def show(self) -> None:
        """Print every setting, its meaning and the paper's value."""
        title = Text(f"preset {self.preset}, data {self.data}")
        table = Table("setting", "value", "meaning", "paper", title=title)
        for row in describe({"model": self.model, "training": self.training}):
            table.add_row(*map(Text, row))
        Console().print(table)


def machine_preset() -> str:
    """The preset that suits this machine."""
    return "small" if best_device().type == "cuda" else "tiny"


def resolve_run(
    options: Options,
    stage: str,
    presets: Mapping[str, tuple[Any, Any]],
    *,
    default_preset: str,
    default_data: str = "scenes",
    dvae: str | None = None,
) -> StageRun:
    """Resolve what to train in `options.run`/`stage`.

    A new run starts from a preset; its horizons (warm-up, cosines) scale with `steps` unless they are
    set. A run found in the folder is continued with its own configuration, of which only what cannot
    change its course may be set anew. One that ended before it saved anything starts anew, with the data and
    the settings that it was begun with unless others are given.

    Args:
        dvae: the fingerprint of the one that a prior is to be trained on.

    Raises:
        ConfigError: unknown names, values that cannot be, or a run found there that was started otherwise.
    """
    folder = options.run / stage
    if options.data is not None:
        options = replace(options, data=located(options.data))
    if options.steps is not None:
        options = replace(options, settings=(*options.settings, f"steps={options.steps}"))
    if (minutes := options.minutes) is not None:
        if not (math.isfinite(minutes) and minutes > 0):
            raise ConfigError(f"--minutes {minutes:g} is no time to train for; give more than 0")
        if "steps" in keys(options.settings):
            raise ConfigError("--minutes and --steps both say when to end: give one of them")
    if _holds_a_model(folder) and not (folder / "config.json").exists():
        raise ConfigError(
            f"{folder} holds a model, but no config.json that tells of what kind: put that back, or use "
            "another --run"
        )
    if begun(folder):
        return _continued(folder, options, presets)
    unsaved = _unsaved(folder, presets, dvae)
    name = options.preset or (unsaved.preset if unsaved else default_preset)
    data = options.data or (unsaved.data if unsaved else located(default_data))
    return _new(folder, name, data, options, presets, unsaved)


def _new(
    folder: Path,
    name: str,
    data: str,
    options: Options,
    presets: Mapping[str, tuple[Any, Any]],
    unsaved: StageRun | None,
) -> StageRun:
    """A run that begins, from a preset, or as one began there that saved nothing."""
    model, training = preset(presets, name)
    chosen = keys(options.settings)
    if unsaved and unsaved.preset == name:
        say(f"{folder} was begun before and saved nothing: what is not given now is as it was then")
        planned = {h: getattr(training, h) for h in ("steps", *HORIZONS) if hasattr(training, h)}
        model, training = unsaved.model, unsaved.training
        if options.minutes is not None or "steps" in chosen:
            training = replace(training, **planned)
    sections = override({"model": model, "training": training}, options.settings)
    chosen_training: Training = sections["training"]
    spans = tuple(h for h in HORIZONS if hasattr(training, h) and h not in chosen)
    of_preset = replace(chosen_training, steps=training.steps)
    return StageRun(
        folder, name, data, sections["model"],
        lasting(of_preset, chosen_training.steps, spans),
        resumed=False, spans=spans, minutes=options.minutes,
    )  # fmt: skip


def begun(folder: Path) -> bool:
    """Does a stage's folder hold a model or a training state, not just what was there before a first save?"""
    return _holds_a_model(folder) and (folder / "config.json").exists()


def _holds_a_model(folder: Path) -> bool:
    states = folder / "state"
    return bool(state_folders(states)) or (
        (folder / "weights.safetensors").exists() and not any(states.glob("step-*.partial"))
    )


def _unsaved(folder: Path, presets: Mapping[str, tuple[Any, Any]], dvae: str | None) -> StageRun | None:
    """What a run that saved nothing was begun with, if that can be read and was begun on this dVAE."""
    with suppress(ConfigError, CheckpointError):
        saved = read_json(folder / "config.json")
        if "training" in saved and dvae in (None, saved.get("dvae")):
            return _as_saved(folder, saved, presets)
    return None


def _as_saved(folder: Path, saved: Mapping[str, Any], presets: Mapping[str, tuple[Any, Any]]) -> StageRun:
    """What config.json says that the run was begun with."""
    path = folder / "config.json"
    model_kind, training_kind = (type(section) for section in next(iter(presets.values())))
    model = from_json(model_kind, saved.get("model"), str(path))
    training = from_json(training_kind, saved["training"], str(path))
    name, data = saved.get("preset"), saved.get("data")
    if not isinstance(name, str) or not isinstance(data, str):
        raise ConfigError(f"{path} does not name the preset and the data of its run")
    return StageRun(folder, name, data, model, training, resumed=True)


def _continued(folder: Path, options: Options, presets: Mapping[str, tuple[Any, Any]]) -> StageRun:
    described = read_json(folder / "config.json")
    if "training" not in described:
        raise ConfigError(
            f"{folder} holds an imported model without a training run; use another --run to train"
        )
    if (folder / "weights.safetensors").exists() and not state_folders(folder / "state"):
        raise ConfigError(
            f"{folder} holds a trained model, but no training state to go on from: use another --run to train"
        )
    saved = _as_saved(folder, described, presets)
    sections = override({"model": saved.model, "training": saved.training}, options.settings)
    for section, old in (("model", saved.model), ("training", saved.training)):
        for field in dataclasses.fields(old):
            was, now = getattr(old, field.name), getattr(sections[section], field.name)
            if was != now and field.name not in CHANGEABLE:
                raise ConfigError(
                    f"{folder} was started with {field.name}={was}, not {now}: keep it, or use another --run"
                )
    made, steps = newest_step(folder / "state"), sections["training"].steps
    if steps < made and steps != saved.training.steps:
        raise ConfigError(f"{folder} has {made:,} steps already: give --steps so many or more, not {steps}")
    moved = f"; if they have only moved, change data in {folder / 'config.json'}"
    for what, was, now, or_else in (
        ("--preset", saved.preset, options.preset, ""),
        ("--data", located(saved.data), options.data, "" if saved.data == "scenes" else moved),
    ):
        if now is not None and now != was:
            raise ConfigError(
                f"{folder} was started with {what} {was}, not {now}: keep it, or use another --run{or_else}"
            )
    return replace(saved, model=sections["model"], training=sections["training"], minutes=options.minutes)
