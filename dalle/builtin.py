"""The model that travels with the project, and how a trained run becomes one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle.checkpoint import load_tensors, read_json, replacing, save_weights, write_json
from dalle.config import to_json
from dalle.errors import CheckpointError
from stage2_prior.model import Prior

NAME = "scenes"
FOLDER = Path(__file__).parent / "models" / NAME
ABOUT = (
    "one to four flat-coloured shapes on a plain background, such as "
    '"a red circle left of a blue square" or "three yellow stars on a black background"'
)


def find_run(run: Path) -> Path:
    """The folder of a run: `run` itself, or the built-in model where that is asked for by its name.

    A folder of that name in the working directory goes first.
    """
    return FOLDER if run == Path(NAME) and not run.exists() else run


def export(run: Path, out: Path) -> int:
    """Write all that drawing needs of `run` to `out`, weights in 16 bits; returns the bytes written.

    Raises:
        CheckpointError: a stage is missing or damaged, or `out` holds something already.
    """
    run = find_run(run)
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty: name a new folder")
    dvae_config, prior_config = (read_json(run / stage / "config.json") for stage in ("dvae", "prior"))
    of_dvae = load_tensors(run / "dvae" / "weights.safetensors")
    prior = Prior.load(run / "prior").folded()  # 16 bits of sums, not sums of 16 bits
    prior_config["dvae"] = _write(out / "dvae", dvae_config, of_dvae)
    prior_config["model"] = to_json(prior.config)
    _write(out / "prior", prior_config, prior.state_dict())
    for name in ("prior/tokenizer.json", "report.json"):
        if (run / name).is_file():
            with replacing(out / name) as partial:
                partial.write_bytes((run / name).read_bytes())
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def _write(folder: Path, config: dict[str, Any], weights: Mapping[str, Tensor]) -> str:
    written = save_weights(folder, {name: tensor.to(torch.float16) for name, tensor in weights.items()})
    write_json(folder / "config.json", config)
    return written
