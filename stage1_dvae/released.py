"""OpenAI's released dVAE, `encoder.pkl` and `decoder.pkl`, read without running anything in them.

Each file is a whole pickled nn.Module, in torch's zip format or in the one before it (torch < 1.6).
`torch.load(weights_only=True)` refuses the older format's modules, so both are read here: every name
in the pickle must be known, and becomes an inert stand-in, from which the tensors are then collected.

Source: openai/DALL-E, dall_e/__init__.py, encoder.py, decoder.py, utils.py; torch/serialization.py.
"""

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle.checkpoint import FORMAT, save_weights, write_json
from dalle.config import to_json
from dalle.errors import CheckpointError
from stage1_dvae.config import DVAEConfig
from stage1_dvae.model import DVAE

ENCODER, DECODER = "dall_e.encoder.Encoder", "dall_e.decoder.Decoder"

# All that the two files name beside plain containers. Anything else makes a file a foreign one.
KNOWN = (
    ENCODER,
    DECODER,
    "dall_e.encoder.EncoderBlock",
    "dall_e.decoder.DecoderBlock",
    "dall_e.utils.Conv2d",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.upsampling.Upsample",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
    "torch.FloatStorage",
    "torch.device",
)
NAME = re.compile(
    r"blocks\.(input|output\.conv|group_[1-4]\.block_\d+\.(id_path|res_path\.conv_[1-4]))\.[wb]"
)
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def read_released(encoder: Path, decoder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the two files: see `read_pickle`. Raises `CheckpointError` if they are swapped, too."""
    return read_pickle(encoder, ENCODER), read_pickle(decoder, DECODER)


def read_pickle(path: Path, expected: str) -> dict[str, Tensor]:
    """The tensors of one released file by name, `blocks.input.w` …, fp32 and contiguous on the CPU.

    Args:
        expected: what it is a pickle of, `ENCODER` or `DECODER`.

    Raises:
        CheckpointError: if the file is missing, or holds anything else.
    """
    try:
        root, storages = _unpickle(path)
        found = root.name if isinstance(root, StandIn) else type(root).__name__
        if found != expected:
            raise CheckpointError(f"{path}: holds {found}, expected {expected}")
        tensors = {name: _tensor(value, storages) for name, value in _parameters(root)}
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # damaged bytes can fail in any way
        raise CheckpointError(
            f"{path}: not a file that torch saved, or a damaged one ({type(error).__name__}); "
            f"expected a pickled {expected}"
        ) from error
    strange = [name for name in tensors if not NAME.fullmatch(name)]
    missing = {"blocks.input.w", "blocks.output.conv.w"} - tensors.keys()
    if strange or missing:
        fault = f"has a parameter {strange[0]!r}" if strange else f"has no {min(missing)!r}"
        raise CheckpointError(f"{path}: {fault}, unlike the released {expected}")
    return tensors


class StandIn:
    """What a class or function of the pickle becomes: it keeps what it is called with and does nothing."""

    name: str
    args: tuple[Any, ...]

    def __new__(cls, *args: Any) -> "StandIn":
        self = super().__new__(cls)
        self.args = args
        return self


class InertUnpickler(pickle.Unpickler):
    """Makes stand-ins of the known names, and runs nothing that the pickle asks for.

    Tensor data stays outside the pickle: a storage becomes the key under which its data is found.
    """

    def __init__(self, file: io.BufferedIOBase, path: Path) -> None:
        super().__init__(file)
        self.path = path
        # Classes of this reading alone, for a pickle can set attributes of what it names.
        self.known: dict[str, type] = {name: type("Named", (StandIn,), {"name": name}) for name in KNOWN}
        self.known |= {"collections.OrderedDict": OrderedDict, "__builtin__.set": set}  # protocol 2's names

    def find_class(self, module: str, name: str) -> type:
        """The stand-in of a known name. Raises `CheckpointError` for any other."""
        full = f"{module}.{name}"
        if full not in self.known:
            raise CheckpointError(
                f"{self.path}: names {full!r}, which no released dVAE file does; nothing of it was run; "
                f"expected a pickled {ENCODER} or {DECODER}"
            )
        return self.known[full]

    def persistent_load(self, pid: Any) -> Any:
        """The key of a float storage; the class itself where the older format adds its source."""
        match pid:
            case ("module", kind, _, _):
                return kind
            # The older format ends in None: whole storages only, which is all that torch ≥ 0.4 wrote.
            case ("storage", kind, str(key), _, _) | ("storage", kind, str(key), _, _, None):
                if kind is self.known["torch.FloatStorage"]:
                    return key
        raise pickle.UnpicklingError(f"unknown persistent id {pid!r}")


def _unpickle(path: Path) -> tuple[Any, dict[str, bytearray]]:
    """The root of a file's objects, and the bytes of its storages by key."""
    with path.open("rb") as file:
        if file.peek(4)[:4] == b"PK\3\4":
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
                pickled = next(name for name in names if name.endswith("/data.pkl"))
                data = pickled.removesuffix(".pkl") + "/"
                root = InertUnpickler(io.BytesIO(archive.read(pickled)), path).load()
                return root, {
                    name.removeprefix(data): bytearray(archive.read(name))
                    for name in names
                    if name.startswith(data)
                }
        magic, _version, _machine, root, keys = (InertUnpickler(file, path).load() for _ in range(5))
        if magic != LEGACY_MAGIC:
            raise pickle.UnpicklingError("not in torch's format")
        storages = {}
        for key in keys:
            numel = int.from_bytes(file.read(8), "little")
            storages[key] = bytearray(file.read(4 * numel))
        return root, storages


def _parameters(module: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, parameter
    for name, child in module._modules.items():
        yield from _parameters(child, f"{prefix}{name}.")


def _tensor(parameter: StandIn, storages: dict[str, bytearray]) -> Tensor:
    """Do what the two rebuilding functions named in the pickle would have done."""
    tensor, *_ = parameter.args
    key, offset, size, stride, *_ = tensor.args
    flat = torch.frombuffer(storages[key], dtype=torch.float32)
    return flat.as_strided(size, stride, offset).clone(memory_format=torch.contiguous_format)


def import_released(encoder: Path, decoder: Path, folder: Path) -> DVAEConfig:
    """Write OpenAI's two pickles as a model folder; its configuration.

    Raises:
        CheckpointError: a file is not what it should be, or the folder holds a model already.
    """
    if (folder / "config.json").exists():
        raise CheckpointError(f"{folder} holds a model already: import into another --run")
    halves = dict(zip(("encoder", "decoder"), read_released(encoder, decoder), strict=True))
    weights = {f"{half}.{name}": w for half, tensors in halves.items() for name, w in tensors.items()}
    config = _config(halves["encoder"], halves["decoder"])
    with torch.device("meta"):
        wanted = DVAE(config).state_dict()
    if {n: w.shape for n, w in weights.items()} != {n: w.shape for n, w in wanted.items()}:
        raise CheckpointError(f"{encoder} and {decoder} do not hold the two halves of one released dVAE")
    save_weights(folder, weights)
    sections = {"preset": "imported", "data": None, "model": to_json(config)}
    write_json(folder / "config.json", {"format": FORMAT, **sections})
    return config


def _config(encoder: dict[str, Tensor], decoder: dict[str, Tensor]) -> DVAEConfig:
    """The architecture that the shapes of the released tensors tell."""
    blocks = {name.split(".")[2] for name in encoder if name.startswith("blocks.group_1.")}
    vocab, hidden = encoder["blocks.output.conv.w"].shape[0], encoder["blocks.input.w"].shape[0]
    return DVAEConfig(
        vocab_size=vocab,
        hidden=hidden,
        codebook_width=decoder["blocks.input.w"].shape[0],
        blocks_per_group=len(blocks),
    )
