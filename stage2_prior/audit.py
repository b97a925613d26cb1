"""Which gradients of a trained prior fp16 would lose."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dalle.audit import count, facts
from dalle.checkpoint import read_json
from dalle.config import from_json
from dalle.data.loader import Loader
from dalle.data.open import open_source
from dalle.errors import ConfigError
from dalle.pictures import to_pixels
from dalle.text import Tokenizer
from stage2_prior.codec import Codec
from stage2_prior.config import PriorTraining
from stage2_prior.loss import losses, weighted
from stage2_prior.model import Prior
from stage2_prior.train import prepare_plainly


def audit(folder: Path, codec: Codec, batches: int, data: str | None = None) -> dict[str, Any]:
    """Run backward passes of the prior in `folder` (R/prior) in fp32 and count its gradients.

    Args:
        codec: the dVAE that it was trained on.
        batches: how many, each of as many pictures as training passes through the model at once.
        data: in place of the run's.

    Returns:
        The number of pictures, and see `dalle.audit.facts`.

    Raises:
        DalleError: there is no such prior, it was trained on another dVAE, or its data cannot be read.
    """
    path = folder / "config.json"
    saved = read_json(path)
    training = from_json(PriorTraining, saved.get("training"), str(path))
    if saved.get("dvae") != codec.fingerprint:
        raise ConfigError(
            f"{folder} was trained on the dVAE {saved.get('dvae')}, the one there now is "
            f"{codec.fingerprint}: put that one back"
        )
    where = saved["data"] if data is None else data
    if data is None and not (where == "scenes" or os.path.isabs(os.path.expanduser(where))):
        raise ConfigError(f"{folder} was handed on without its data, {where}: name them with --data")
    model = Prior.load(folder, codec.vectors.device).requires_grad_()
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    source = open_source(where, "train", codec.image_size, training.heldout)
    size, words = codec.image_size, model.config.text_length - 1
    prepare = partial(prepare_plainly, tokenizer=tokenizer, size=size, words=words)
    together = training.pictures_at_once(1)
    loader = Loader(source, prepare, batch_size=together, seed=training.seed, min_side=size)
    pixels, tokens = (t.to(codec.vectors.device) for t in loader.some(batches * together))

    def loss(part: slice) -> torch.Tensor:
        seen = codec.encode(to_pixels(pixels[part])).flatten(1)
        text, image = losses(model, tokens[part], seen)
        return weighted(text, image, training.text_weight)

    parts = (slice(at, at + together) for at in range(0, len(pixels), together))
    found = count(model.resblocks(), (partial(loss, part) for part in parts))
    return {"pictures": len(pixels), **facts(found)}
