"""A start from which unlike cells choose unlike codes."""

import torch

from stage1_dvae.config import DVAEConfig
from stage1_dvae.model import DVAE
from stage1_dvae.start import spread_logits

TINY = DVAEConfig(image_size=12, vocab_size=7, hidden=4, codebook_width=3, groups=2, blocks_per_group=1)


def test_every_code_s_logit_has_mean_0_and_the_spread_asked_for():
    torch.manual_seed(0)
    model, pixels = DVAE(TINY), torch.rand(5, 3, 12, 12)
    spread_logits(model, pixels, 1.5)
    logits = model.logits(pixels).movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(logits.mean(0), torch.zeros(7), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits.std(0), torch.full((7,), 1.5))


def test_more_codes_are_in_use_than_before():
    torch.manual_seed(0)
    model, pixels = DVAE(TINY), torch.rand(5, 3, 12, 12)
    before = model.encode(pixels).unique().numel()
    spread_logits(model, pixels, 1.5)
    assert model.encode(pixels).unique().numel() == 7 > before


def test_a_code_that_no_cell_prefers_stays_finite():
    model = DVAE(TINY)
    spread_logits(model, torch.full((2, 3, 12, 12), 0.5).round(), 1.5)
    assert all(p.isfinite().all() for p in model.parameters())
