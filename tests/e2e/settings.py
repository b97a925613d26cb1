"""The options that make training a matter of a second."""

import shutil
from pathlib import Path
from typing import Any


def options(**settings: Any) -> list[str]:
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


COMMON = {"workers": 0, "eval_pictures": 3, "batch_size": 4, "precision": "fp32", "save_every": 2}
DVAE = options(
    image_size=16, hidden=12, codebook_width=12, blocks_per_group=1, patch=4, vocab_size=16, **COMMON
)  # fmt: skip
# The attention is named: "auto" measures, and two runs begun apart could differ in the order of their sums.
PRIOR = options(
    attention="dense", width=12, heads=3, depth=3, text_length=29, bpe_vocab=290, bpe_captions=50, **COMMON
)


def dvae(run: Path, *more: Any, steps: int = 4) -> list[Any]:
    return ["train-dvae", "--preset", "tiny", "--run", run, "--steps", steps, *DVAE, *more]


def prior(run: Path, *more: Any, steps: int = 4) -> list[Any]:
    return ["train-prior", "--preset", "tiny", "--run", run, "--steps", steps, *PRIOR, *more]


def begin(trained: Path, tmp_path: Path, stage: str) -> Path:
    """A run in which `stage` is the next to be trained, after the dVAE of the run `trained`."""
    run = tmp_path / "run"
    if stage == "prior":
        shutil.copytree(trained / "dvae", run / "dvae")
    return run
