"""The smallest models, runs and data that have every part. No two axes are of the same length."""

import copy
import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dalle.checkpoint import FORMAT, fingerprint, save_weights, write_json
from dalle.config import to_json
from dalle.engine import Engine
from dalle.precision import Arithmetic
from dalle.text import Tokenizer
from dalle.training import Training
from dalle.wiring import make_engine
from stage1_dvae.config import DVAEConfig
from stage1_dvae.model import DVAE
from stage2_prior.config import PriorConfig
from stage2_prior.decode import Decoder
from stage2_prior.linear import Weights
from stage2_prior.model import Prior
from stage2_prior.sample import Sampling, draw, read

WORDS = ("red", "blue", "green", "circle", "square", "star", "a", "the", "of", "left")
CAPTIONS = [f"a {colour} {shape}" for colour in WORDS[:3] for shape in WORDS[3:6]]
DVAE_SHAPE = {
    "image_size": 16, "vocab_size": 13, "hidden": 4, "codebook_width": 6, "groups": 3, "blocks_per_group": 1,
}  # fmt: skip
PRIOR_SHAPE = {"text_length": 7, "text_vocab": 11, "image_vocab": 13, "grid": 4, "depth": 3, "width": 12,
               "heads": 3, "kernel": 3}  # fmt: skip


def randomise(model: nn.Module, seed: int = 0, spread: float = 0.5) -> None:
    """Give every parameter, heads and biases too, values that make a difference."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=spread, generator=random)


def dvae(seed: int = 0, **shape: Any) -> DVAE:
    """A dVAE of 16-pixel pictures and 4×4 of 13 codes."""
    model = DVAE(DVAEConfig(**(DVAE_SHAPE | shape)))
    randomise(model, seed)
    return model.eval().requires_grad_(False)


def prior(seed: int = 0, **shape: Any) -> Prior:
    """A prior of 7 text and 16 image slots."""
    model = Prior(PriorConfig(**(PRIOR_SHAPE | shape)))
    randomise(model, seed)
    return model.eval()


def batch(model: Prior, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens of captions of different lengths (the first empty, the last full), and codes."""
    c, random = model.config, np.random.default_rng(seed)
    tokens = random.integers(c.text_vocab, size=(size, c.text_length - 1))
    for row, words in zip(tokens, np.linspace(0, c.text_length - 1, size).round(), strict=True):
        row[int(words) :] = -1
    codes = random.integers(c.image_vocab, size=(size, c.cells))
    return torch.from_numpy(tokens), torch.from_numpy(codes)


def gradients(
    model: nn.Module, config: Training, precision: Arithmetic, loss: Callable[[nn.Module], Tensor]
) -> dict[str, Tensor]:
    """Of every parameter, as training computes them in this precision."""
    engine = make_engine(copy.deepcopy(model), config, precision)
    engine.backward(engine.run(loss, engine.model), 1)
    return {piece.name: piece.grad for piece in engine.pieces()}


def apart(found: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    """‖found − exact‖ / ‖exact‖ of all these tensors as one vector."""
    one, other = (torch.cat([tensor.double().flatten() for tensor in some]) for some in (found, exact))
    return ((one - other).norm() / other.norm()).item()


@torch.inference_mode()
def cached_logits(
    model: Prior, tokens: Tensor, codes: Tensor, weights: Weights = "fp32", precision: str = "fp32"
) -> Tensor:
    """Logits of every slot, step by step, when these codes are drawn; n pictures for each prompt."""
    decoder = Decoder(model, len(codes), weights, precision)
    state = decoder.state(decoder.read(tokens), len(codes) // len(tokens))
    before = torch.cat([torch.full_like(codes[:, :1], decoder.start), codes[:, :-1]], 1)
    steps = [decoder.step(code, state, torch.tensor([slot])) for slot, code in enumerate(before.unbind(1))]
    return torch.stack(steps, 1)


@torch.inference_mode()
def drawn(model: Prior, tokens: Tensor, uniform: Tensor, how: Sampling | None = None) -> Tensor:
    """The codes of whole pictures, a row each."""
    how = how or Sampling()
    decoder = Decoder(model, len(uniform) * how.texts)
    return torch.stack(list(draw(decoder, read(decoder, tokens, how), uniform, how)), 1)


def tokenizer() -> Tokenizer:
    """One that knows a few words whole."""
    return Tokenizer.train(CAPTIONS, 280)


def write_dvae(run: Path, seed: int = 0, **shape: Any) -> DVAE:
    """A run's dvae folder as training leaves it, but for its state."""
    model = dvae(seed, **shape)
    save_weights(run / "dvae", model.state_dict())
    head = {"format": FORMAT, "preset": "tiny", "data": "scenes"}
    write_json(run / "dvae" / "config.json", {**head, "model": to_json(model.config)})
    return model


def write_run(
    run: Path, seed: int = 0, captions: Iterable[str] | None = None, text_length: int = 9, **shape: Any
) -> Path:
    """A run folder that can draw, without training and without states."""
    write_dvae(run, seed)
    words = tokenizer() if captions is None else Tokenizer.train(captions, 400)
    words.save(run / "prior" / "tokenizer.json")
    model = prior(seed, text_length=text_length, text_vocab=words.vocab_size, **shape)
    save_weights(run / "prior", model.state_dict())
    facts = {
        "format": FORMAT,
        "preset": "tiny",
        "data": "scenes",
        "dvae": fingerprint(run / "dvae" / "weights.safetensors"),
        "tokenizer": words.fingerprint(),
    }
    write_json(run / "prior" / "config.json", {**facts, "model": to_json(model.config)})
    return run


def picture(seed: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """Soft noise."""
    small = np.random.default_rng(seed).integers(256, size=(3, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BILINEAR)


def png(seed: int, size: tuple[int, int] = (24, 20)) -> bytes:
    """The same as the bytes of a PNG."""
    file = io.BytesIO()
    picture(seed, size).save(file, "PNG")
    return file.getvalue()


def write_folder(folder: Path, n: int = 9, captioned: Iterable[int] | None = None) -> Path:
    """A folder of n pictures, each with a .txt beside it (or only the `captioned` ones)."""
    folder.mkdir(parents=True)
    for i in range(n):
        (folder / f"{i}.png").write_bytes(png(i))
        if captioned is None or i in captioned:
            (folder / f"{i}.txt").write_text(CAPTIONS[i % len(CAPTIONS)] + "\nanother caption\n")
    return folder


def write_jsonl(folder: Path, n: int = 9) -> Path:
    """A .jsonl manifest beside its pictures."""
    rows = [{"image": f"{i}.png", "caption": CAPTIONS[i % len(CAPTIONS)]} for i in range(n)]
    path = write_folder(folder, n, captioned=()) / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(folder: Path, columns: tuple[str, str], n: int = 9) -> Path:
    """A .csv manifest with columns of these names."""
    path = write_folder(folder, n, captioned=()) / "manifest.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        table.writerows((f"{i}.png", CAPTIONS[i % len(CAPTIONS)]) for i in range(n))
    return path


def write_tar(path: Path, n: int = 9) -> Path:
    """A WebDataset shard."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for i in range(n):
            for name, content in ((f"{i}.png", png(i)), (f"{i}.txt", CAPTIONS[i % len(CAPTIONS)].encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


class Kept:
    """A training state in memory."""

    def __init__(self, engine: Engine) -> None:
        self.files = {
            file: {n: part.values.clone(memory_format=torch.contiguous_format) for n, part in group.items()}
            for file, group in engine.state().items()
        }

    def names(self, file: str) -> set[str]:
        return set(self.files.get(file, ()))

    def read(self, file: str, name: str) -> Tensor:
        return self.files[file][name]
