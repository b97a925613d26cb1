"""Muon: steps of matrices, against the singular value decomposition and by laws."""

import math

import pytest
import torch
from torch import nn

from dalle.config import override
from dalle.distributed import topology
from dalle.engine import Engine
from dalle.errors import ConfigError
from dalle.muon import MOMENTUM, QUINTIC, ROUNDS, Muon, orthogonal
from dalle.optim import AdamW, Average
from dalle.piece import Piece
from stage2_prior.config import PRESETS

LOW, HIGH = 0.6, 1.3  # between which the quintic leaves singular values


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pieces(gradients, offset=0):
    return [Piece(name, nn.Parameter(g.clone()), g.clone(), offset) for name, g in gradients.items()]


@pytest.mark.parametrize("shape", [(24, 24), (8, 32), (32, 8), (1, 5)])
def test_singular_vectors_stay_and_singular_values_become_one(shape):
    matrix = noise(*shape)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    turned = u.t() @ orthogonal(matrix) @ vt.t()
    found = turned.diagonal()
    assert found.min() > LOW
    assert found.max() < HIGH
    assert (turned - torch.diag(found)).abs().max() < 1e-4


def test_scale_does_not_matter_and_nothing_stays_nothing():
    matrix = noise(8, 12)
    torch.testing.assert_close(orthogonal(1e-3 * matrix), orthogonal(matrix), rtol=1e-3, atol=1e-3)
    assert not orthogonal(torch.zeros(3, 4)).any()


def test_steps_follow_the_mean_and_only_of_the_matrices():
    """The mean and Nesterov's look ahead, written down a second time."""
    muon, momentum = Muon({"a": (12, 6)}, ratio=5.0), torch.zeros(12, 6)
    for seed in range(3):
        gradients = {"a": noise(12, 6, seed=seed), "b": noise(4, 4, seed=seed + 10)}
        held = pieces(gradients)
        muon.turn(held)
        momentum = MOMENTUM * momentum + gradients["a"]
        expected = 5 * math.sqrt(2) * orthogonal(gradients["a"] + MOMENTUM * momentum)
        torch.testing.assert_close(held[0].grad, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(held[1].grad, gradients["b"], rtol=0, atol=0)


def test_a_saved_mean_goes_on():
    gradients = [{"a": noise(6, 4, seed=seed)} for seed in range(4)]
    through, first, second = (Muon({"a": (6, 4)}, 1.0) for _ in range(3))
    for each in gradients[:2]:
        first.turn(pieces(each))
        through.turn(pieces(each))
    second.load("a", 0, 24, first.momenta["a"].view(6, 4))
    for each in gradients[2:]:
        one, other = pieces(each), pieces(each)
        through.turn(one)
        second.turn(other)
        torch.testing.assert_close(one[0].grad, other[0].grad, rtol=0, atol=0)


def test_the_optimizer_takes_plain_steps_as_they_are():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    before = model[0].weight.detach().clone()
    optimizer = AdamW(
        model, betas=(0.9, 0.98), weight_decay=0.1, plain=("0.weight",), plain_decay=0.5
    )  # fmt: skip
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(model[0].weight, before * (1 - 0.01 * 0.5) - 0.01)
    assert not any(name.startswith("0.weight") for name in optimizer.moments())
    assert "1.weight/exp_avg" in optimizer.moments()
    optimizer.skip = True
    held = model[0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model[0].weight, held)


def test_a_state_before_the_first_update_is_whole():
    """As where every update so far was dropped for a gradient that was not finite."""
    model = nn.Sequential(nn.Linear(3, 2))
    optimizer = AdamW(model, betas=(0.9, 0.98), weight_decay=0.1, plain=("0.weight",))
    muon, average = Muon({"0.weight": (2, 3)}, 1.0), Average(model.parameters(), 0.9, 1)
    engine = Engine(model, optimizer, average, clip=1.0, precision="fp32", muon=muon)
    saved = topology().assemble(engine.state()["moments"]["0.weight/momentum"])
    assert torch.equal(saved, torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("settings", "told"),
    [(["muon_lr=0"], "muon_lr"), (["optimizer=muon", "moments=16bit"], "moments=fp32")],
)
def test_what_cannot_be_is_refused(settings, told):
    with pytest.raises(ConfigError, match=told):
        override({"training": PRESETS["small"][1]}, settings)


def test_the_numbers_are_those_of_its_authors():
    assert (MOMENTUM, ROUNDS, QUINTIC) == (0.95, 5, (3.4445, -4.7750, 2.0315))


def test_a_matrix_with_more_columns_than_rows_has_steps_no_smaller():
    held = pieces({"a": noise(6, 12)})
    Muon({"a": (6, 12)}, ratio=5.0).turn(held)
    torch.testing.assert_close(held[0].grad, 5 * orthogonal(noise(6, 12)), rtol=1e-4, atol=1e-5)


def test_matrices_larger_than_what_is_turned_at_once_are_turned_one_by_one():
    assert Muon({"a": (2**13, 2**12), "b": (2**12, 2**13)}, 1.0).alike == [["a"], ["b"]]


def test_products_in_16_bits_change_singular_values_by_their_rounding_alone():
    matrix = noise(24, 32)
    exact, found = orthogonal(matrix), orthogonal(matrix, torch.bfloat16)
    assert found.dtype == torch.float32
    assert 1e-3 < (found - exact).norm() / exact.norm() < 0.05
