"""AdamW with 16-bit moments."""

import math

import pytest
import torch
from torch import nn

from dalle.minifloat import SIGNED, UNSIGNED
from dalle.optim import AdamW
from dalle.packed import CHUNK, SMALL, PackedAdamW

BETAS, DECAY = (0.9, 0.96), 4.5e-2
ROWS = CHUNK // 512 + 3  # more than one chunk, and a part of one


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(512, ROWS), nn.LayerNorm(ROWS), nn.Linear(ROWS, 3), nn.Linear(3, 3))


def optimizer(model, matrices=("0.weight", "2.weight"), limit=None):
    return PackedAdamW(
        model, matrices=matrices, betas=BETAS, weight_decay=DECAY, variance_limit=limit
    )  # fmt: skip


def gradients(model, seed, norm=1.0):
    noise = torch.Generator().manual_seed(seed)
    grads = {n: torch.randn(p.shape, generator=noise) for n, p in model.named_parameters()}
    total = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
    return {n: g * norm / total for n, g in grads.items()}


def step(model, each, grads, lr=1e-2):
    for name, p in model.named_parameters():
        p.grad = grads[name].clone()
    for group in each.param_groups:
        group["lr"] = lr
    each.grad_norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
    each.step()
    each.zero_grad()


def test_only_large_matrices_that_are_named_have_16_bit_moments():
    model = net()
    each = optimizer(model, matrices=("0.weight", "2.weight", "0.bias"))
    assert model[2].weight.numel() < SMALL <= model[0].weight.numel()
    step(model, each, gradients(model, 0))
    kinds = {name: value.dtype for name, value in each.moments().items() if not name.endswith("/step")}
    packed = {"0.weight/exp_avg", "0.weight/exp_avg_sq"}
    assert kinds == {name: torch.uint16 if name in packed else torch.float32 for name in kinds}
    assert len(kinds) == 2 * len(list(model.parameters()))
    assert {len(group["params"]) for group in each.param_groups if group.get("packed")} == {1}


def test_packed_moments_take_four_bytes_a_parameter_and_a_step_needs_little_more():
    model = net()
    each = optimizer(model)
    step(model, each, gradients(model, 0))
    state = each.state[model[0].weight]
    held = sum(state[kind].nbytes for kind in ("exp_avg", "exp_avg_sq"))
    assert held == 4 * model[0].weight.numel()


def test_an_update_is_adamws_on_the_unpacked_moments():
    """Three updates by hand: unpack, textbook AdamW, pack."""
    model = net()
    each = optimizer(model)
    weight = model[0].weight.detach().clone()
    m = v = torch.zeros_like(weight)
    for t in range(1, 4):
        grads = gradients(model, t)
        step(model, each, grads)
        g = grads["0.weight"]
        m, v = 0.9 * m + 0.1 * g, 0.96 * v + 0.04 * g * g
        denominator = (v / (1 - 0.96**t)).sqrt() + 1e-8
        weight = weight * (1 - 1e-2 * DECAY) - 1e-2 * (m / (1 - 0.9**t)) / denominator
        torch.testing.assert_close(model[0].weight.detach(), weight, rtol=1e-5, atol=1e-6)
        state = each.state[model[0].weight]
        for format, kind, value in ((SIGNED, "exp_avg", m), (UNSIGNED, "exp_avg_sq", v)):
            # Half a unit in the last place of rounding, and fp32's own where terms cancel.
            held = format.unpack(state[kind])
            torch.testing.assert_close(held, value, rtol=0.51 * 2.0**-format.significand, atol=1e-9)
        m, v = SIGNED.unpack(state["exp_avg"]), UNSIGNED.unpack(state["exp_avg_sq"])


def test_the_other_parameters_are_updated_as_ever():
    packed, plain = net(), net()
    a = optimizer(packed, limit=5.0)
    b = AdamW(plain, betas=BETAS, weight_decay=DECAY, variance_limit=5.0)
    for t in range(3):
        step(packed, a, gradients(packed, t, norm=4.0))
        step(plain, b, gradients(plain, t, norm=4.0))
    for name, p in plain.named_parameters():
        assert torch.equal(p, packed.get_parameter(name)) == (name != "0.weight")


def test_the_limit_of_the_variance_holds_before_the_update_that_it_enters():
    def large(model):
        grads = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        grads["0.weight"][:, 0] = 4.0
        return grads

    packed, plain = net(), net()
    a = optimizer(packed, limit=5.0)
    b = AdamW(plain, betas=BETAS, weight_decay=DECAY, variance_limit=5.0)
    for _ in range(15):  # to 16·(1 − 0.96¹⁵) = 7.3 without the limit
        step(packed, a, large(packed))
        step(plain, b, large(plain))
    variance = UNSIGNED.unpack(a.state[packed[0].weight]["exp_avg_sq"])
    assert variance.max() == 5.0
    torch.testing.assert_close(packed[0].weight, plain[0].weight, rtol=0, atol=2e-3 * 15 * 1e-2)


def test_saved_moments_continue_bit_exactly():
    straight, resumed = net(), net(seed=1)
    a, b = optimizer(straight), optimizer(resumed)
    for t in range(3):
        step(straight, a, gradients(straight, t))
    resumed.load_state_dict(straight.state_dict())
    b.load_moments((name, value.clone()) for name, value in a.moments().items())
    for t in range(3, 6):
        step(straight, a, gradients(straight, t))
        step(resumed, b, gradients(resumed, t))
    for p, q in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    for name, value in a.moments().items():
        assert torch.equal(value, b.moments()[name]), name


def test_a_parameter_without_a_gradient_is_left_alone():
    model = net()
    each = optimizer(model)
    before = model[0].weight.detach().clone()
    each.step()
    assert torch.equal(model[0].weight, before)
    assert not each.moments()


@pytest.mark.parametrize("scale", [1e-3, 1e-6, 1e-8])
def test_small_gradients_survive_where_fp16_would_lose_them(scale):
    """The squares of gradients of 1e-8 lie at 1e-16, far below fp16's 6e-8."""
    packed, plain = net(), net()
    a, b = optimizer(packed), AdamW(plain, betas=BETAS, weight_decay=DECAY)
    for t in range(5):
        grads = {n: g.sign() * scale for n, g in gradients(packed, t).items()}
        step(packed, a, grads)
        step(plain, b, grads)
    torch.testing.assert_close(packed[0].weight, plain[0].weight, rtol=0, atol=5 * 1e-2 * 2e-3)
