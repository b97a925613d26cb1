"""Files that are whole or absent: models to draw with, and training states to resume from.

    R/dvae/config.json, weights.safetensors         a model: all that drawing needs
    R/dvae/state/step-00000200/*.safetensors, state.json   a training state: all that resuming needs

A training state does not tell which engine wrote it, nor in how many processes: `weights`, `average` and
`moments` hold every tensor whole, by the name of its parameter. It is written and read tensor by tensor, so
that no process ever needs memory for more than one of them beyond its own share.

Everything is written under a temporary name, synced and renamed. Nothing is ever unpickled.
"""

import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dalle.config import from_json
from dalle.distributed import ALONE, Part, Topology
from dalle.errors import CheckpointError

C = TypeVar("C")
M = TypeVar("M", bound=nn.Module)

FORMAT = 1  # of both kinds of files; a change comes with an upgrade of the older one
STATE = "state.json"
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.uint16: "U16", torch.bool: "BOOL",
}  # fmt: skip
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


class TensorFile:
    """A safetensors file that is written tensor by tensor, in the order that was announced.

    Args:
        file: open for writing.
        announced: {name: (dtype, shape)}.
    """

    def __init__(self, file: BinaryIO, announced: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        header, end = {}, 0
        for name, (dtype, shape) in announced.items():
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file, self._hash = file, hashlib.sha256()
        self._write(len(text).to_bytes(8, "little") + text)

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)

    def add(self, tensor: Tensor) -> None:
        """Write the next tensor."""
        flat = tensor.detach().cpu().contiguous().flatten()
        self._write(flat.view(torch.uint8).numpy().data if flat.numel() else b"")

    def finish(self) -> str:
        """Sync the file to the disk; its SHA-256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._hash.hexdigest()


def _write_tensors(path: Path, parts: Mapping[str, Part], topology: Topology) -> str:
    """Bring parts together and write them, one tensor at a time; the hash of the file (process 0)."""
    if not topology.main:
        for part in parts.values():
            topology.assemble(part)
        return ""
    announced = {name: (part.values.dtype, part.shape) for name, part in parts.items()}
    with path.open("wb") as opened:
        file = TensorFile(opened, announced)
        for part in parts.values():
            file.add(topology.assemble(part))
        return file.finish()


def state_folders(folder: Path) -> list[Path]:
    """The training states under `folder`, newest first."""
    return sorted(folder.glob("step-" + "[0-9]" * 8), reverse=True)


class State:
    """A training state on disk, every file checked against its recorded hash.

    Raises:
        CheckpointError: a file is missing or is not what was written.
    """

    def __init__(self, path: Path) -> None:
        state = read_json(path / STATE)
        hashes = state.get("sha256")
        self.values = {key: value for key, value in state.items() if key not in ("format", "sha256")}
        if not isinstance(hashes, dict) or hashes.pop(STATE, None) != _sha256_of(self.values):
            raise CheckpointError(f"{path / STATE} is not what was saved (its hash differs)")
        self.path = path
        self._files: dict[str, Any] = {}
        for name, expected in hashes.items():
            file = path / name
            try:
                found = _sha256(file)
            except OSError as error:
                raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
            if found != expected:
                raise CheckpointError(f"{file} is not what was saved (its hash differs)")
            try:
                self._files[file.stem] = safe_open(file, "pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file} is damaged or no safetensors file: {error}") from error

    def files(self) -> list[str]:
        """Of tensors, in alphabetical order."""
        return sorted(self._files)

    def names(self, file: str) -> set[str]:
        """The tensors in a file; none if there is no such file."""
        return set(self._files[file].keys()) if file in self._files else set()

    def read(self, file: str, name: str) -> Tensor:
        """One tensor, to be copied: what is read twice may share its memory."""
        if name not in self.names(file):
            raise CheckpointError(f"{self.path / file}.safetensors holds no {name}: it is of another model")
        return self._files[file].get_tensor(name)


class SharedState:
    """A training state that process 0 reads, for all processes of a run.

    Args:
        state: on process 0; None on the others.
    """

    def __init__(self, state: State | None, topology: Topology) -> None:
        self.state, self.topology = state, topology
        self.values: dict[str, Any] = topology.share(state and state.values)
        listed = state and {file: sorted(state.names(file)) for file in state.files()}
        self._names: dict[str, list[str]] = topology.share(listed)

    def names(self, file: str) -> set[str]:
        """The tensors in a file; none if there is no such file."""
        return set(self._names.get(file, ()))

    def read(self, file: str, name: str) -> Tensor:
        """One tensor, whole. All processes read the same ones in the same order."""
        tensor = self.state.read(file, name) if self.state else None
        if self.topology.world == 1:
            assert tensor is not None
            return tensor
        told = tensor is not None and [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        dtype, shape = self.topology.share(told)
        if tensor is None:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        return self.topology.broadcast(tensor)


def newest_state(folder: Path) -> tuple[State | None, list[CheckpointError]]:
    """The newest training state that is whole (None if there is none), and why newer ones were refused."""
    refused: list[CheckpointError] = []
    for path in state_folders(folder):
        try:
            return State(path), refused
        except CheckpointError as error:
            refused.append(error)
    return None, refused


class Saver:
    """Writes training states, and the weights to draw with, beside the training.

    `save` copies what each process holds to main memory and returns; a thread then brings the parts together
    and writes them. So a state costs the training only the copy.

    Args:
        folder: of the run's stage: states lie in its `state`, the averaged weights in weights.safetensors.
        keep: how many states stay.
        topology: the processes that hold the parts; the first one writes.
    """

    def __init__(self, folder: Path, keep: int, topology: Topology = ALONE) -> None:
        self.folder, self.keep = folder, keep
        self.topology = topology.apart()  # its exchanges run beside those of the training
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Wait for the last state; after an error only where no process that died could be waited for."""
        if error is None:
            self.wait()
        elif self._thread is not None and self.topology.world == 1:
            self._thread.join()

    def save(self, step: int, parts: Mapping[str, Mapping[str, Part]], values: Mapping[str, Any]) -> None:
        """Write the state after update `step`, once the one before is written.

        Args:
            step: updates made so far.
            parts: {file: {name: what this process holds of the tensor}}.
            values: JSON values that belong to them.

        Raises:
            CheckpointError: the disk was full or refused at the save before this one.
        """
        self.wait()
        copies = {
            file: {name: part._replace(values=_copied(part.values)) for name, part in group.items()}
            for file, group in parts.items()
        }
        self._thread = threading.Thread(target=self._write, args=(step, copies, dict(values)), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when the last state is on the disk. Raises `CheckpointError` if it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise `CheckpointError` if it is known by now that the last state could not be written."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, step: int, parts: dict[str, dict[str, Part]], values: dict[str, Any]) -> None:
        try:
            write_state(
                self.folder / "state", step, parts, values, self.keep,
                weights=self.folder / "weights.safetensors", topology=self.topology,
            )  # fmt: skip
        except BaseException as error:
            self._error = error


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def write_state(
    folder: Path,
    step: int,
    parts: Mapping[str, Mapping[str, Part]],
    values: Mapping[str, Any],
    keep: int,
    *,
    weights: Path | None = None,
    topology: Topology = ALONE,
) -> Path:
    """Write the training state after update `step` and delete all but the newest `keep`.

    Args:
        folder: where states lie, one subfolder each.
        step: updates made so far.
        parts: {file: {name: what this process holds of the tensor}}.
        values: JSON values that belong to them.
        keep: how many states stay.
        weights: where the averaged weights go besides, to draw with.
        topology: the processes that hold the parts; the first one writes.

    States of later steps were refused when this run was resumed, or it would have gone on from there;
    they go too, and so does what a killed process left behind.

    Raises:
        CheckpointError: the disk is full or refuses; the states saved before are untouched.
    """
    target = folder / f"step-{step:08d}"
    partial = folder / f"step-{step:08d}.partial"
    try:
        if topology.main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        hashes = {}
        for name, group in parts.items():
            path = partial / f"{name}.safetensors"
            hashes[path.name] = _write_tensors(path, group, topology)
        if not topology.main:
            return target
        if weights is not None:
            # The weights first: were the state there without them, a finished run would never write them.
            with replacing(weights) as copy:
                shutil.copyfile(partial / "average.safetensors", copy)
        described = {"step": step, **values}
        hashes[STATE] = _sha256_of(described)
        text = json.dumps({"format": FORMAT, "sha256": hashes, **described}, indent=2)
        (partial / STATE).write_text(text, encoding="utf-8")
        _sync(partial / STATE)
        _sync(partial)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        _sync(folder)
    except (OSError, CheckpointError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise unwritable(target, error) from error
        raise
    later = [path for path in state_folders(folder) if path > target]
    stale = [path for path in state_folders(folder) if path <= target][keep:]
    for old in [*later, *stale]:
        with suppress(OSError):  # under another name, so that one half deleted does not pass for a state
            os.replace(old, old.with_name(f"{old.name}.partial"))
    for left in folder.glob("step-*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    return target
