"""What the scales are for: a model whose late resblocks' gradients underflow in fp16."""

import pytest
import torch

from benchmarks.underflow import WAYS

STEPS = 40


@pytest.fixture(scope="module")
def last() -> dict[str, torch.Tensor]:
    """The last losses of every layer, by the way of training."""
    return {name: train(STEPS)[-10:].mean(0) for name, train in WAYS.items()}


def test_with_a_scale_for_each_resblock_every_layer_learns_as_in_fp32(last):
    exact, found = last["fp32"], last["fp16, a scale for each resblock"]
    torch.testing.assert_close(found, exact, rtol=0.03, atol=0)


def test_with_one_scale_the_last_layer_does_not_learn(last):
    exact, found = last["fp32"], last["fp16, one scale"]
    torch.testing.assert_close(found[0], exact[0], rtol=0.03, atol=0)
    assert found[-1] > 1.5 * exact[-1]
