"""AdamW with 16-bit moments."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import weights
from dalle import packed
from dalle.minifloat import SIGNED, UNSIGNED
from dalle.optim import AdamW
from dalle.packed import CHUNK, SMALL, PackedAdamW, rounded_at_random

BETAS, DECAY = (0.9, 0.96), 4.5e-2
ROWS = CHUNK["cpu"] // 512 + 3  # more than one chunk, and a part of one


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(512, ROWS), nn.LayerNorm(ROWS), nn.Linear(ROWS, 3), nn.Linear(3, 3))


def optimizer(model, matrices=("0.weight", "2.weight"), limit=None, halved=False):
    return PackedAdamW(
        model, matrices=matrices, betas=BETAS, weight_decay=DECAY, variance_limit=limit, halved=halved
    )  # fmt: skip


def gradients(model, seed, norm=1.0):
    noise = torch.Generator().manual_seed(seed)
    grads = {n: torch.randn(p.shape, generator=noise) for n, p in model.named_parameters()}
    total = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
    return {n: g * norm / total for n, g in grads.items()}


def step(model, each, grads, lr=1e-2):
    for name, p in model.named_parameters():
        setattr(p, "main_grad" if p.dtype == torch.float16 else "grad", grads[name].clone())
    for group in each.param_groups:
        group["lr"] = lr
    each.number += 1
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


def noise(seed=0):
    return torch.Generator().manual_seed(seed)


def test_what_fp16_has_is_never_rounded_away():
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    every = every[every.isfinite()]
    for seed in range(5):
        assert torch.equal(rounded_at_random(every.float(), noise(seed)), every)


def test_rounding_takes_one_of_the_two_neighbours_and_is_right_on_average():
    values = torch.cat([
        torch.randn(300, generator=noise()) * 10.0 ** torch.randint(-9, 4, (300,), generator=noise(1)),
        torch.tensor([0.0, 1e-9, -3e-8, 2.0**-14, 0.1, 1 / 3, 65472.0]),
    ])  # fmt: skip
    exact = values.double().numpy()
    near = exact.astype(np.float16)
    low = np.where(near.astype(np.float64) <= exact, near, np.nextafter(near, np.float16(-np.inf)))
    high = np.where(near.astype(np.float64) >= exact, near, np.nextafter(near, np.float16(np.inf)))
    draws = 4000
    taken = rounded_at_random(values.repeat(draws, 1), noise(2)).numpy()
    assert ((taken == low) | (taken == high)).all()
    gap = high.astype(np.float64) - low.astype(np.float64)
    error = np.abs(taken.astype(np.float64).mean(0) - exact)
    assert (error <= 5 * gap / 2 / math.sqrt(draws) + gap / 2**12).all()


def test_halved_matrices_take_two_bytes_and_their_moments_four():
    model = net()
    each = optimizer(model, halved=True)
    step(model, each, gradients(model, 0))
    weight, small = model[0].weight, model[2].weight
    assert (weight.dtype, small.dtype, model[0].bias.dtype) == (torch.float16, torch.float32, torch.float32)
    held = [weight, *(each.state[weight][kind] for kind in ("exp_avg", "exp_avg_sq"))]
    assert sum(each.nbytes for each in held) == 6 * weight.numel()
    assert weight.main_grad is None


def test_a_halved_matrix_follows_the_one_in_fp32():
    halved, full = net(), net()
    a, b = optimizer(halved, halved=True), optimizer(full)
    for t in range(20):
        step(halved, a, gradients(halved, t))
        step(full, b, gradients(full, t))
    away = (halved[0].weight.detach().float() - full[0].weight.detach()).abs()
    spacing = full[0].weight.detach().abs().clamp_min(2.0**-14) * 2.0**-10
    assert (away / spacing).mean() < math.sqrt(20)  # a random walk of twenty roundings
    assert (away / spacing).mean() > 0.1


def test_updates_far_smaller_than_fp16s_spacing_are_not_lost():
    """Steps of 2⁻¹⁶ at weights of 1/4, of which the neighbours in fp16 are 2⁻¹² away."""
    model = net()
    model[0].weight.data.fill_(0.25)
    each = optimizer(model, halved=True)
    grads = {n: torch.ones_like(p, dtype=torch.float32) for n, p in model.named_parameters()}
    for _ in range(64):
        step(model, each, grads, lr=2.0**-16)
    moved = 0.25 - model[0].weight.detach().double().mean().item()
    assert moved == pytest.approx(64 * 2.0**-16, rel=0.05)


def test_halved_matrices_continue_bit_exactly():
    straight, resumed = net(), net(seed=1)
    a, b = optimizer(straight, halved=True), optimizer(resumed, halved=True)
    for t in range(3):
        step(straight, a, gradients(straight, t))
    resumed.load_state_dict(straight.state_dict())
    b.load_moments((name, value.clone()) for name, value in a.moments().items())
    b.number = a.number
    for t in range(3, 6):
        step(straight, a, gradients(straight, t))
        step(resumed, b, gradients(resumed, t))
    assert torch.equal(straight[0].weight, resumed[0].weight)
    b.number += 1
    step(straight, a, gradients(straight, 6))
    step(resumed, b, gradients(resumed, 6))
    assert not torch.equal(straight[0].weight, resumed[0].weight)  # the noise is that of the update's number


@pytest.mark.parametrize("grid", [3, 4])
def test_the_benchmark_of_rounding_takes_codes_of_any_grid_and_rounds_as_it_is_told(grid, monkeypatch):
    monkeypatch.setattr(weights, "STEPS", 2)
    shape = {"tokens": 19, "codes": grid**2}
    data = {name: torch.zeros(weights.PICTURES, n, dtype=torch.long) for name, n in shape.items()}
    told = []

    def rounded(values, noise):
        told.append(values.numel())
        return values.half()

    losses = weights.train(data, True, rounded)
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert told
    assert packed.rounded_at_random is rounded_at_random


def test_matrices_of_at_least_8192_numbers_are_packed():
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 127))
    assert optimizer(model, matrices=("0.weight", "1.weight")).packed == {"0.weight"}


def test_matrices_that_are_frozen_or_not_contiguous_are_not_packed():
    model = nn.Sequential(*(nn.Linear(128, 128) for _ in range(3)))
    model[1].weight.requires_grad_(False)
    model[2].weight.data = model[2].weight.data.t()
    each = optimizer(model, matrices=("0.weight", "1.weight", "2.weight"))
    assert each.packed == {"0.weight"}
    assert sum(len(group["params"]) for group in each.param_groups) == 5


def test_the_limit_of_the_variance_holds_for_gradients_of_the_norm_that_they_are_clipped_to():
    model = net()
    each = optimizer(model, limit=5.0)
    grads = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    grads["0.weight"][7, 3] = 4.0  # of which the square is above the limit, the norm below it
    for _ in range(15):
        step(model, each, grads)
    assert UNSIGNED.unpack(each.state[model[0].weight]["exp_avg_sq"]).max() == 5.0


@pytest.mark.parametrize("halved", [False, True])
def test_a_skipped_update_leaves_packed_matrices_and_their_moments_as_they_are(halved):
    model = net()
    each = optimizer(model, halved=halved)
    step(model, each, gradients(model, 0))
    weight = model[0].weight
    before = [t.clone() for t in (weight.detach(), *each.state[weight].values())]
    each.skip = True
    step(model, each, gradients(model, 1))
    assert all(map(torch.equal, before, (weight.detach(), *each.state[weight].values())))


def test_no_value_is_rounded_beyond_what_fp16_holds():
    beyond = torch.tensor([65504.0, 65519.0, 1e6]).repeat(1000, 1)
    for sign in (1, -1):
        assert (rounded_at_random(sign * beyond, noise()) == sign * 65504).all()


def test_every_matrix_is_rounded_by_noise_of_its_own():
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    model.load_state_dict({**model.state_dict(), "1.weight": model[0].weight.detach()})
    each = optimizer(model, matrices=("0.weight", "1.weight"), halved=True)
    step(model, each, {n: torch.ones_like(p, dtype=torch.float32) for n, p in model.named_parameters()})
    assert not torch.equal(model[0].weight, model[1].weight)
    torch.testing.assert_close(model[0].weight, model[1].weight, rtol=2.0**-10, atol=2.0**-24)
