"""Training states, from which a run goes on: R/dvae/state/step-00000200/*.safetensors, state.json.

A state does not tell which engine wrote it, nor in how many processes: `weights`, `average` and `moments`
hold every tensor whole, by the name of its parameter. It is written and read tensor by tensor, so that no
process ever needs memory for more than one of them beyond its own share. It is there whole or not at all, and
read only if every file is what was written.
"""

import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dalle.checkpoint import FORMAT, read_json, replacing, sha256, sync, unwritable
from dalle.distributed import ALONE, Part, Topology
from dalle.errors import CheckpointError

STATE = "state.json"
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.uint16: "U16", torch.bool: "BOOL",
}  # fmt: skip


def _sha256_of(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


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


def newest_step(folder: Path) -> int:
    """The number of updates that the newest of them has seen; 0 without any."""
    folders = state_folders(folder)
    return int(folders[0].name.removeprefix("step-")) if folders else 0


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
                found = sha256(file)
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
        """Wait for the last state; after an error only if alone: its writing may wait for a dead process."""
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
    published = False
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
            published = True
        described = {"step": step, **values}
        hashes[STATE] = _sha256_of(described)
        text = json.dumps({"format": FORMAT, "sha256": hashes, **described}, indent=2)
        (partial / STATE).write_text(text, encoding="utf-8")
        sync(partial / STATE)
        sync(partial)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        sync(folder)
    except (OSError, CheckpointError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if published and not state_folders(folder):
            with suppress(OSError):  # tells these weights from those of a finished model (`runs.begun`)
                partial.mkdir()
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
