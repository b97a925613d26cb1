"""Files that are whole or absent: models to draw with, and training states to resume from.

    R/dvae/config.json, weights.safetensors         a model: all that drawing needs
    R/dvae/state/step-00000200/*.safetensors, state.json   a training state: all that resuming needs

Everything is written under a temporary name, synced and renamed. Nothing is ever unpickled.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dalle.config import from_json
from dalle.errors import CheckpointError

C = TypeVar("C")
M = TypeVar("M", bound=nn.Module)

FORMAT = 1  # of both kinds of files; a change comes with an upgrade of the older one
STATE = "state.json"
LARGE = 256 * 2**20  # bytes of weights


def fingerprint(path: Path) -> str:
    """A short name for a file's content."""
    return _sha256(path)[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its name once it is written whole.

    Raises:
        CheckpointError: the disk is full or refuses; what stood at `path` before still stands.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    except BaseException as error:
        with suppress(OSError):  # where its folder could not be made, either
            partial.unlink(missing_ok=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise unwritable(path, error) from error
        raise


def unwritable(path: Path, error: Exception) -> CheckpointError:
    """What to tell the user when the disk is full or refuses."""
    reason = getattr(error, "strerror", None) or str(error)
    return CheckpointError(
        f"cannot write {path}: {reason}; what was saved before is whole: "
        "make room or permit writing there, then run the same command again"
    )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `CheckpointError` if it is missing, broken or of a newer format."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: {path.parent} holds no model of that kind") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("format", FORMAT), int):
        raise CheckpointError(f"{path} is damaged or of another program: expected an object with a format")
    if value.get("format", FORMAT) > FORMAT:
        raise CheckpointError(f"{path} was written by a newer version of this program; update it")
    return value


def save_weights(folder: Path, weights: Mapping[str, Tensor]) -> str:
    """Write `folder`/weights.safetensors and return its fingerprint."""
    path = folder / "weights.safetensors"
    with replacing(path) as partial:
        save_file({name: w.detach().cpu().contiguous() for name, w in weights.items()}, partial)
    return fingerprint(path)


def load_weights(folder: Path, model: nn.Module) -> None:
    """Load `folder`/weights.safetensors into `model`; every name and shape must match.

    Raises:
        CheckpointError: the file is missing, damaged, or of another model.
    """
    path = folder / "weights.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: nothing has been trained or imported there yet")
    saved = load_tensors(path)
    wanted = model.state_dict()
    if saved.keys() != wanted.keys():
        missing, extra = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
        raise CheckpointError(
            f"{path} is of another model: it lacks {missing[:2]} ({len(missing)} in all) "
            f"and has {extra[:2]} ({len(extra)} in all) too many"
        )
    for name, tensor in wanted.items():
        if saved[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path} is of another model: {name} has shape {tuple(saved[name].shape)}, "
                f"its config.json asks for {tuple(tensor.shape)}"
            )
    # What was saved in 16 bits to travel is computed in fp32 all the same.
    saved = {name: tensor.to(wanted[name].dtype) for name, tensor in saved.items()}
    model.load_state_dict(saved, assign=any(w.is_meta for w in wanted.values()))


def load_model(folder: Path, kind: Callable[[C], M], config_kind: type[C], device: torch.device) -> M:
    """The model in `folder`, built from its config.json and ready for inference.

    Raises:
        CheckpointError: there is none, it is damaged, or its parts do not fit.
        ConfigError: its config.json describes another kind of model.
    """
    path = folder / "config.json"
    config = from_json(config_kind, read_json(path).get("model"), str(path))
    weights = folder / "weights.safetensors"
    large = weights.is_file() and weights.stat().st_size > LARGE
    # Weights that are overwritten at once are not drawn either; but for small ones torch's machinery behind
    # the meta device, two seconds of imports, would take far longer than drawing them.
    with torch.device("meta") if large else nullcontext():
        model = kind(config)
    load_weights(folder, model)
    return model.to(device).eval().requires_grad_(False)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: it is missing, damaged or of another kind.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error


def state_folders(folder: Path) -> list[Path]:
    """The training states under `folder`, newest first."""
    return sorted(folder.glob("step-" + "[0-9]" * 8), reverse=True)


def save_state(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Write the training state after update `step` and delete all but the newest `keep`.

    Args:
        folder: where states lie, one subfolder each.
        step: updates made so far.
        tensors: {file: {name: tensor}}, each written as one safetensors file.
        state: JSON values that belong to them.
        keep: how many states stay.

    States of later steps were refused when this run was resumed, or it would have gone on from there;
    they go too, and so does what a killed process left behind.

    Raises:
        CheckpointError: the disk is full or refuses; the states saved before are untouched.
    """
    target = folder / f"step-{step:08d}"
    partial = folder / f"step-{step:08d}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        hashes = {}
        for name, group in tensors.items():
            path = partial / f"{name}.safetensors"
            save_file({k: v.detach().cpu().contiguous() for k, v in group.items()}, path)
            _sync(path)
            hashes[path.name] = _sha256(path)
        values = {"step": step, **state}
        hashes[STATE] = _sha256_of(values)
        text = json.dumps({"format": FORMAT, "sha256": hashes, **values}, indent=2)
        (partial / STATE).write_text(text, encoding="utf-8")
        _sync(partial / STATE)
        _sync(partial)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise unwritable(target, error) from error
    later = [path for path in state_folders(folder) if path > target]
    stale = [path for path in state_folders(folder) if path <= target][keep:]
    for old in [*later, *stale]:
        with suppress(OSError):  # under another name, so that one half deleted does not pass for a state
            os.replace(old, old.with_name(f"{old.name}.partial"))
    for left in folder.glob("step-*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    return target


def load_state(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Read a training state back, every file checked against its recorded hash.

    Raises:
        CheckpointError: a file is missing or is not what was written.
    """
    state = read_json(path / STATE)
    hashes = state.get("sha256")
    values = {key: value for key, value in state.items() if key not in ("format", "sha256")}
    if not isinstance(hashes, dict) or hashes.pop(STATE, None) != _sha256_of(values):
        raise CheckpointError(f"{path / STATE} is not what was saved (its hash differs)")
    tensors = {}
    for name, expected in hashes.items():
        file = path / name
        try:
            found = _sha256(file)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
        if found != expected:
            raise CheckpointError(f"{file} is not what was saved (its hash differs)")
        tensors[file.stem] = load_tensors(file)
    return values, tensors


def newest_state(
    folder: Path,
) -> tuple[tuple[dict[str, Any], dict[str, dict[str, Tensor]]] | None, list[CheckpointError]]:
    """The newest training state that is whole (None if there is none), and why newer ones were refused."""
    refused: list[CheckpointError] = []
    for path in state_folders(folder):
        try:
            return load_state(path), refused
        except CheckpointError as error:
            refused.append(error)
    return None, refused
