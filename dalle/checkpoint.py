"""Files that are whole or absent, and models to draw with: R/dvae/config.json, weights.safetensors.

Everything is written under a temporary name, synced and renamed. Nothing is ever unpickled. Training states,
from which a run goes on, are those of `dalle.states`.
"""

import hashlib
import json
import os
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
LARGE = 256 * 2**20  # bytes of weights


def fingerprint(path: Path) -> str:
    """A short name for a file's content."""
    return sha256(path)[:16]


def sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Have it on the disk, not in a buffer."""
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
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
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


def refuse_unwritable(folder: Path) -> None:
    """Before work is done for it: raises `CheckpointError` if nothing can be written to a folder."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise unwritable(folder, NotADirectoryError(0, f"{nearest} is a file"))
    if not os.access(nearest, os.W_OK):
        raise unwritable(folder, PermissionError(0, "permission denied"))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with replacing(path) as partial:
        # Names of files may not be UTF-8; what Python has for their bytes is written as JSON's own escapes.
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


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
        partial.touch()
        mode = partial.stat().st_mode
        save_file({name: w.detach().cpu().contiguous() for name, w in weights.items()}, partial)
        partial.chmod(mode)  # as of any other file: safetensors lets its owner alone read it
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
        path.open("rb").close()  # or a file that must not be read would be told as missing
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error
