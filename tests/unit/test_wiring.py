"""What settings ask of the engine, and which of them cannot go together."""

from dataclasses import replace

import pytest
import torch

from dalle import wiring
from dalle.distributed import ALONE
from dalle.errors import ConfigError
from stage2_prior.config import PriorTraining
from tests import tiny


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"optimizer": "muon"}, "optimizer=muon"), ({"compression_rank": 4}, "compression_rank=4")],
)
def test_gradients_in_main_memory_cannot_be_exchanged_on_gpus(settings, name, monkeypatch):
    monkeypatch.setattr(wiring, "best_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(wiring, "topology", lambda: replace(ALONE, world=2, local_world=2))
    config = PriorTraining(batch_size=4, zero=2, offload="cpu", **settings)
    model = tiny.prior()
    with pytest.raises(ConfigError, match=f"from where {name} cannot exchange them"):
        wiring.make_engine(model, config, "fp32", matrices=model.matrices())
