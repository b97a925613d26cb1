"""How a trained run becomes one that only draws, to hand on."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from dalle.builtin import find_run
from dalle.checkpoint import read_json, replacing, save_weights, unwritable, write_json
from dalle.config import to_json
from dalle.errors import CheckpointError
from dalle.info import saved_steps
from dalle.metrics import read_metrics
from dalle.pipeline import TextToImage
from stage1_dvae.model import DVAE
from stage2_prior.model import Prior


def export(run: Path, out: Path) -> int:
    """Write all that drawing needs of `run` to `out`, weights in 16 bits; returns the bytes written.

    Where that fails, `out` is left empty.

    Raises:
        CheckpointError: a stage is missing or damaged, they do not belong together, or there is something at
            `out` already.
    """
    run = find_run(run)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out} is {'not empty' if out.is_dir() else 'a file'}: name a new folder")
    model = TextToImage.load(run, "cpu")  # refuses what could not draw
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="partial-", dir=out) as partial:
            _write_all(run, model.prior, model.dvae, Path(partial))
            for part in Path(partial).iterdir():
                part.replace(out / part.name)
    except OSError as error:
        raise unwritable(out, error) from error
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def _write_all(run: Path, prior: Prior, dvae: DVAE, out: Path) -> None:
    dvae_config, prior_config = (_described(run / stage) for stage in ("dvae", "prior"))
    prior = prior.folded()  # 16 bits of sums, not sums of 16 bits
    prior_config["dvae"] = _write(out / "dvae", dvae_config, dvae.state_dict())
    prior_config["model"] = to_json(prior.config)
    _write(out / "prior", prior_config, prior.state_dict())
    with replacing(out / "prior" / "tokenizer.json") as partial:
        partial.write_bytes((run / "prior" / "tokenizer.json").read_bytes())


def _described(folder: Path) -> dict[str, Any]:
    """A stage's config.json, with the steps that its states and metrics, which stay behind, tell."""
    config = read_json(folder / "config.json")
    return {**config, "steps": saved_steps(folder, config, read_metrics(folder))}


def _write(folder: Path, config: dict[str, Any], weights: Mapping[str, Tensor]) -> str:
    written = save_weights(folder, {name: _halved(tensor) for name, tensor in weights.items()})
    if (data := config.get("data")) not in (None, "scenes"):
        config["data"] = f"./{Path(data).name}"  # not where they lie here
    write_json(folder / "config.json", config)
    return written


def _halved(tensor: Tensor) -> Tensor:
    """In fp16, but for what is too large for it: biases of a dVAE that clustered flat pictures."""
    half = tensor.to(torch.float16)
    return half if half.isfinite().all() else tensor
