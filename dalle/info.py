"""What a run folder holds, in words and for machines."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dalle.checkpoint import fingerprint, read_json
from dalle.errors import CheckpointError
from dalle.metrics import read_metrics
from dalle.states import newest_step, state_folders

SHOWN = (
    "loss",
    "heldout_loss",
    "heldout_psnr",
    "heldout_codebook_usage",
    "heldout_text_loss",
    "heldout_image_loss",
)


def facts_of_run(run: Path) -> dict[str, Any]:
    """Both stages of a run: configuration, parameters, steps, states and last metrics.

    Raises:
        CheckpointError: there is no run in that folder, or it is damaged.
    """
    stages = {
        stage: _facts(run / stage) for stage in ("dvae", "prior") if (run / stage / "config.json").is_file()
    }
    if not stages:
        raise CheckpointError(
            f"{run} is no run folder: it holds neither dvae/config.json nor prior/config.json"
        )
    return {"run": str(run), **stages}


def _facts(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if not isinstance(config.get("model"), dict):
        raise CheckpointError(f"{folder / 'config.json'} is damaged or of another program: it names no model")
    weights = folder / "weights.safetensors"
    lines = read_metrics(folder)
    latest: dict[str, Any] = {}
    for line in lines:
        latest |= line
    states = state_folders(folder / "state")
    facts = {
        "preset": config.get("preset"),
        "data": config.get("data"),
        "model": config["model"],
        "steps": saved_steps(folder, config, lines),
        "of": _planned_steps(config),
        "states": [path.name for path in states],
        "metrics": {name: latest[name] for name in SHOWN if name in latest},
    }
    if "log2_scales" in latest:
        facts["resblocks"] = {name: latest[name] for name in ("log2_scales", "overflows")}
    if weights.is_file():
        facts["parameters"] = _parameters(weights)
        facts["fingerprint"] = fingerprint(weights)
    if "dvae" in config:
        facts["trained_on_dvae"] = config["dvae"]
    return facts


def saved_steps(folder: Path, config: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> int | None:
    """The updates of a stage that are saved, by its states, metrics or config.json; None if none tells.

    An exported one has no metrics, but says how many it has.
    """
    if state_folders(folder / "state"):
        return newest_step(folder / "state")
    if not (folder / "weights.safetensors").is_file():
        return 0
    steps: int | None = lines[-1]["step"] if lines else config.get("steps", _planned_steps(config))
    return steps


def _planned_steps(config: Mapping[str, Any]) -> int | None:
    training = config.get("training")
    return training.get("steps") if isinstance(training, dict) else None


def _parameters(weights: Path) -> int:
    """How many numbers a weights file holds, by its header."""
    try:
        with safe_open(weights, "pt") as file:
            names = file.keys()
            return sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{weights} is damaged or no safetensors file: {error}") from error


def describe_run(facts: dict[str, Any]) -> str:
    """The same in words."""
    lines = [facts["run"]]
    for stage in ("dvae", "prior"):
        if stage not in facts:
            lines.append(f"  {stage}: not there yet")
            continue
        f = facts[stage]
        trained = f"{f['steps']:,} of {f['of']:,} steps on {f['data']}" if f["of"] else "not trained here"
        lines.append(f"  {stage}: preset {f['preset']}, {f.get('parameters', 0):,} parameters, {trained}")
        lines.append("    " + ", ".join(f"{k}={v}" for k, v in f["model"].items()))
        if f["metrics"]:
            lines.append("    " + ", ".join(f"{k} {v:.4g}" for k, v in f["metrics"].items() if v is not None))
        if "resblocks" in f:
            lines.append(f"    {_scales(**f['resblocks'])}")
        states = ", ".join(f["states"]) or "nothing"
        lines.append(f"    weights {f.get('fingerprint', 'none')}, to resume from: {states}")
    return "\n".join(lines)


def _scales(log2_scales: list[float], overflows: list[float]) -> str:
    """The range of the gradient scales, and where gradients overflowed most; resblocks count from 1."""
    low, high = (pick(range(len(log2_scales)), key=log2_scales.__getitem__) for pick in (min, max))
    words = (
        f"gradient scales 2^{log2_scales[low]:.1f} (resblock {low + 1}) to 2^{log2_scales[high]:.1f} "
        f"(resblock {high + 1}), {sum(overflows):,.0f} overflows"
    )
    worst = overflows.index(max(overflows))
    return f"{words}, most in resblock {worst + 1}: {max(overflows):,.0f}" if any(overflows) else words
