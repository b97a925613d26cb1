"""A prior on two machines of two processes, with and without compression between them: docs/compression.svg.

    python -m benchmarks.compression docs/compression.svg

The machines are pretended: four processes on this one. The data are 2,048 built-in scenes as the built-in
dVAE codes them, folded to 64 codes and 128 text tokens: embeddings, which are never compressed, stay small
beside the matrices. The rank is far below the paper's share of the width, for error feedback to matter.
"""

import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dalle.builtin import FOLDER
from dalle.chart import curves, svg
from dalle.data.augment import centre_crop
from dalle.data.open import open_source
from dalle.distributed import joined, topology
from dalle.launch import launch
from dalle.noise import keyed
from dalle.pictures import to_pixels
from dalle.pipeline import codec_of
from dalle.text import Tokenizer, cut_or_pad
from dalle.training import LargeTraining
from dalle.wiring import build, make_engine
from stage2_prior.config import PriorConfig
from stage2_prior.loss import losses, weighted
from stage2_prior.model import Prior

STEPS, BATCH, PICTURES, FOLDED, WORDS = 300, 8, 2048, 64, 128
WIDTH, WARM, LR, START, LAST = 128, 30, 2e-3, 30, 50
RANK = 8  # the paper's rule gives 32 at this width: lossless here, with and without error feedback
RUNS: dict[str, dict[str, Any]] = {
    "averaged in full": {"compression_start": STEPS},
    f"rank {RANK}, 16 bits": {"compression_start": START},
    "without error feedback": {"compression_start": START, "feedback": False},
}


def write_data(path: Path) -> None:
    """Tokens and codes of the scenes."""
    codec = codec_of(FOLDER)
    source = open_source("scenes", "train", codec.image_size)
    tokenizer = Tokenizer.load(FOLDER / "prior" / "tokenizer.json")
    samples = [source[i] for i in range(PICTURES)]
    pixels = torch.from_numpy(np.stack([centre_crop(s.image, codec.image_size) for s in samples]))
    grids = torch.cat([codec.encode(to_pixels(part)).flatten(1) for part in pixels.split(64)])
    rows = [cut_or_pad(tokenizer.encode(s.captions[0]), 19)[0] for s in samples]
    tokens = torch.from_numpy(np.stack(rows))
    torch.save({"codes": grids % FOLDED, "tokens": torch.where(tokens < 0, tokens, tokens % WORDS)}, path)


def train(data: dict[str, torch.Tensor], feedback: bool = True, **changes: Any) -> dict[str, Any]:
    """Losses and receipts of one run."""
    config = LargeTraining(
        steps=STEPS, batch_size=BATCH, lr=LR, beta1=0.9, beta2=0.96, weight_decay=0.045, clip=4.0, zero=2,
        ema_decay=0.99, ema_every=25, precision="fp32", compression_rank=RANK, compression_sample=10,
        **changes,
    )  # fmt: skip
    shape = PriorConfig(
        text_length=20, text_vocab=WORDS, image_vocab=FOLDED, grid=math.isqrt(data["codes"].shape[1]),
        depth=4, width=WIDTH, heads=4,
    )  # fmt: skip
    model = build(lambda: Prior(shape), config)
    engine = make_engine(model, config, "fp32", matrices=model.matrices())
    assert engine.compression is not None
    engine.compression.feedback = feedback
    here, found, seconds = topology(), [], []
    for step in range(STEPS):
        began = time.perf_counter()
        random = keyed(torch.device("cpu"), 1, step)
        mine = torch.randint(PICTURES, (BATCH,), generator=random)[here.rank :: here.world]
        text, image = engine.run(losses, model, data["tokens"][mine], data["codes"][mine])
        loss = weighted(text, image)
        engine.backward(loss, 1)
        receipt = engine.update(LR * min(1.0, (step + 1) / WARM), step + 1)
        found.append({**receipt, "loss": here.mean({"loss": loss.item()})["loss"]})
        seconds.append(time.perf_counter() - began)
    engine._compare_machines()
    engine.close()  # type: ignore[attr-defined]
    return {"lines": found, "seconds": statistics.median(seconds)}


def work(data: Path, out: Path) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    with joined() as here:
        results = {name: train(torch.load(data), **changes) for name, changes in RUNS.items()}
        if here.main:
            out.write_text(json.dumps(results))


def above(values: list[float], full: list[float]) -> list[tuple[int, float]]:
    """By how many percent these losses lie above others, each a mean over the last updates."""
    return [
        (i, 100 * (statistics.mean(values[i - LAST : i]) / statistics.mean(full[i - LAST : i]) - 1))
        for i in range(LAST, len(values) + 1)
    ]


def main(out: Path) -> None:
    """Train all, draw, print."""
    with tempfile.TemporaryDirectory() as folder:
        data, results = Path(folder) / "data.pt", Path(folder) / "results.json"
        write_data(data)
        arguments = ["-m", "benchmarks.compression", "work", str(data), str(results)]
        assert launch(2, arguments, [sys.executable], machines=2) == 0
        runs = json.loads(results.read_text())
    curves_of = {name: [line["loss"] for line in run["lines"]] for name, run in runs.items()}
    plainly = curves_of["averaged in full"]
    drawn = curves({name: above(values, plainly) for name, values in curves_of.items()})
    title = f"Training loss, % above averaging in full (means of {LAST} updates)"
    out.write_text(svg(drawn, title, width=560, height=260), encoding="utf-8")
    full = statistics.mean(plainly[-LAST:])
    for name, run in runs.items():
        loss, last = statistics.mean(curves_of[name][-LAST:]), run["lines"][-1]
        cosines = [line["between_cosine"] for line in run["lines"] if "between_cosine" in line]
        plain = [line["between_plain_seconds"] for line in run["lines"] if "between_plain_seconds" in line]
        reduction = statistics.median(line["between_seconds"] for line in run["lines"][START:])
        print(
            f"| {name} | {loss:.4f} | {loss / full - 1:+.2%} | {last['between_bytes'] / 1e6:.3f} MB "
            f"| {last['between_saved']:.1%} | {statistics.mean(cosines) if cosines else math.nan:.2f} "
            f"| {1e3 * run['seconds']:.0f} ms | {1e3 * reduction:.0f} ms "
            f"| {1e3 * statistics.median(plain):.0f} ms |"
        )


if __name__ == "__main__":
    if sys.argv[1] == "work":
        work(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main(Path(sys.argv[1]))
