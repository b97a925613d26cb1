"""What settings ask of the engine, and which of them cannot go together."""

from dataclasses import replace

import pytest
import torch

from dalle import wiring
from dalle.distributed import ALONE
from dalle.errors import ConfigError
from stage2_prior.config import PriorTraining
from tests import tiny


@pytest.fixture
def gpus(monkeypatch):
    """Settings of two processes on so many machines, as if there were GPUs."""

    def offloaded(machines, **settings):
        monkeypatch.setattr(wiring, "best_device", lambda: torch.device("cuda"))
        here = replace(ALONE, world=2, local_world=2 // machines, between="all")
        monkeypatch.setattr(wiring, "topology", lambda: here)
        return PriorTraining(batch_size=4, zero=2, offload="cpu", **settings)

    return offloaded


@pytest.mark.parametrize(
    ("machines", "settings", "name"),
    [(1, {"optimizer": "muon"}, "optimizer=muon"), (2, {"compression_rank": 4}, "compression_rank=4")],
)
def test_gradients_in_main_memory_cannot_be_exchanged_on_gpus(machines, settings, name, gpus):
    model = tiny.prior()
    with pytest.raises(ConfigError, match=f"from where {name} cannot exchange them"):
        wiring.make_engine(model, gpus(machines, **settings), "fp32", matrices=model.matrices())


def test_on_one_machine_a_rank_asks_for_no_exchange(gpus, monkeypatch):
    """The preset paper has one, and `dalle plan` offers offload=cpu for it."""
    config, model = gpus(1, compression_rank=4), tiny.prior()

    def accepted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(wiring, "AdamW", accepted)
    with pytest.raises(KeyboardInterrupt):
        wiring.make_engine(model, config, "fp32", matrices=model.matrices())
