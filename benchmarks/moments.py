"""The same prior trained with fp32 and with 16-bit moments: docs/moments.svg, and the figures behind it.

    python -m benchmarks.moments docs/moments.svg

Both runs see the same batches of the built-in scenes, coded by the built-in dVAE. Printed are the losses,
the bytes of the moments for each parameter as they stand in the training states, and the time of one update
of the optimizer alone on a model of 19 million parameters.
"""

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from dalle.builtin import FOLDER
from dalle.chart import curves, svg
from dalle.metrics import read_metrics
from dalle.optim import AdamW
from dalle.packed import PackedAdamW
from dalle.pipeline import codec_of
from dalle.runs import Options
from dalle.states import State, state_folders
from stage2_prior.config import PriorConfig
from stage2_prior.model import Prior
from stage2_prior.train import train as train_prior

STEPS = 600
LABELS = {"fp32": "fp32 moments", "16bit": "16-bit moments (1-6-9, 0-6-10)"}


def train(run: Path, moments: str) -> list[tuple[float, float]]:
    """Loss by update, a mean over ten each."""
    shutil.copytree(FOLDER / "dvae", run / "dvae")
    settings = ("optimizer=adamw", f"moments={moments}", "precision=fp32", f"eval_every={STEPS}", "workers=0")
    options = Options(run, "scenes", "tiny", STEPS, settings)
    train_prior(options, codec_of(run), preset="tiny", data="scenes")
    return [(line["step"], line["loss"]) for line in read_metrics(run / "prior") if "loss" in line]


def bytes_per_parameter(run: Path) -> tuple[float, float]:
    """Of both moments: over all parameters, and over the matrices of the resblocks alone."""
    saved = State(state_folders(run / "prior" / "state")[0])
    held: dict[str, int] = {}
    for name in saved.names("moments"):
        if not name.endswith("/step"):
            parameter = name.rpartition("/")[0]
            held[parameter] = held.get(parameter, 0) + saved.read("moments", name).nbytes
    weights = {name: saved.read("weights", name) for name in saved.names("weights")}
    sizes = {name: weight.numel() for name, weight in weights.items()}
    matrices = [n for n in sizes if n.startswith("layers.") and weights[n].ndim > 1]
    return (
        sum(held.values()) / sum(sizes.values()),
        sum(held[n] for n in matrices) / sum(sizes[n] for n in matrices),
    )


def seconds_per_update() -> dict[str, float]:
    """Median seconds of an optimizer step, the two alternated."""
    model = Prior(PriorConfig(depth=6, width=512, heads=8, text_vocab=256, image_vocab=256, grid=16))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    betas, decay = (0.9, 0.96), 4.5e-2
    candidates = {
        "fp32": AdamW(model, betas=betas, weight_decay=decay),
        "16bit": PackedAdamW(model, matrices=model.matrices(), betas=betas, weight_decay=decay),
    }
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(8):
        for name, optimizer in candidates.items():
            began = time.perf_counter()
            optimizer.step()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def main(out: Path) -> None:
    """Train both, draw, print."""
    losses = {}
    for moments, label in LABELS.items():
        with tempfile.TemporaryDirectory() as folder:
            losses[label] = train(Path(folder), moments)
            every, matrices = bytes_per_parameter(Path(folder))
        print(f"{label}: {matrices:.2f} bytes a parameter of the matrices, {every:.2f} of all")
    out.write_text(svg(curves(losses), "Training loss of the prior", width=560, height=260), encoding="utf-8")
    fp32, packed = (dict(points) for points in losses.values())
    apart = [abs(packed[step] / fp32[step] - 1) for step in fp32]
    print(f"last loss {fp32[STEPS]:.4f} and {packed[STEPS]:.4f}; at most {max(apart):.2%} apart, "
          f"{statistics.mean(apart):.3%} on average")  # fmt: skip
    for name, seconds in seconds_per_update().items():
        print(f"{LABELS[name]}: {1e3 * seconds:.0f} ms for an update of 19 million parameters")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
