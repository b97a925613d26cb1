"""The data flow of a resblock in 16 bits: what is scaled, what is filtered, what stays in fp32."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dalle.boundary import Boundary, LayerNorm, Linear, enclose, residual
from stage2_prior.loss import losses
from stage2_prior.model import MLP
from tests import tiny

WIDTH = 12
TINY = 2.0**-30  # far below 2^-24, the least that fp16 holds


def boundary(log2_scale: int, dtype=torch.float16) -> Boundary:
    return Boundary(torch.tensor(2.0**log2_scale), dtype)


class Resblock(nn.Module):
    """An MLP resblock of the prior."""

    def __init__(self, within: Boundary | None = None):
        super().__init__()
        self.norm, self.branch = LayerNorm(WIDTH), MLP(WIDTH)
        tiny.randomise(self)
        if within is not None:
            enclose(self, within)

    def forward(self, x):
        return residual(x, self.norm, self.branch)


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()


def gradients(model, x, gradient) -> dict[str, torch.Tensor]:
    model.zero_grad()
    x.grad = None
    model(x).backward(gradient)
    return {"x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


def prior_gradients(model, seed=0) -> dict[str, torch.Tensor]:
    model.zero_grad()
    text, image = losses(model, *tiny.batch(model, 3, seed))
    (text + image).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_close(one, other, **tolerance):
    for name in one:
        torch.testing.assert_close(one[name], other[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_without_a_boundary_the_layers_are_torchs_own():
    for ours, theirs in ((Linear(5, 3), nn.Linear(5, 3)), (LayerNorm(5), nn.LayerNorm(5))):
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(2, 5)
        assert torch.equal(ours(x), theirs(x))
    block, x = Resblock(), inputs(2)
    assert torch.equal(block(x), x + block.branch(block.norm(x)))


def test_the_branch_is_fp16_and_its_gain_bias_and_identity_are_fp32():
    block, x = Resblock(boundary(0)), inputs(2)
    up, down = block.branch.up, block.branch.down
    normed = F.layer_norm(x, (WIDTH,), block.norm.weight, block.norm.bias).half()
    y = (F.linear(normed, up.weight.half()) + up.bias).half()
    y = y * torch.sigmoid(1.702 * y)
    y = (F.linear(y, down.weight.half()) + down.bias).half()
    assert torch.equal(block(x), x + y.float())


def test_nothing_of_the_identity_path_is_rounded_to_16_bits():
    block, x = Resblock(boundary(10)), inputs(2)
    nn.init.zeros_(block.branch.down.weight)
    nn.init.zeros_(block.branch.down.bias)
    assert torch.equal(block(x), x)
    gradient = torch.randn(2, WIDTH)
    gradients(block, x, gradient)
    assert torch.equal(x.grad, gradient)  # the branch, multiplied by 0, adds nothing to it


@pytest.mark.parametrize("scales", [(0,), (7, 24, 13), (20, 3)])
def test_no_scale_is_left_on_any_gradient(scales):
    """In fp32 inside, scales that are powers of two change nothing but through the order of sums."""
    plain, scaled = tiny.prior(), tiny.prior()
    for i, modules in enumerate(scaled.resblocks().values()):
        for module in modules:
            enclose(module, boundary(scales[i % len(scales)], torch.float32))
    assert_close(prior_gradients(scaled), prior_gradients(plain), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_16_bits_the_gradients_are_those_of_fp32_but_for_rounding(dtype):
    plain, halved = tiny.prior(), tiny.prior()
    for modules in halved.resblocks().values():
        for module in modules:
            enclose(module, boundary(10, dtype))
    rounding = torch.finfo(dtype).eps
    for (name, found), exact in zip(
        prior_gradients(halved).items(), prior_gradients(plain).values(), strict=True
    ):
        assert found.dtype == torch.float32
        assert (found - exact).norm() < 30 * rounding * exact.norm(), name
        assert not torch.equal(found, exact) or not exact.any(), name


def test_recomputing_changes_no_gradient():
    model = tiny.prior()
    for modules in model.resblocks().values():
        for module in modules:
            enclose(module, boundary(10))
    kept = prior_gradients(model)
    model.recompute = True
    again = prior_gradients(model)
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_a_gradient_too_small_for_fp16_survives_at_its_scale_only():
    gradient = torch.full((3, WIDTH), TINY)
    x = inputs(3)
    exact = gradients(Resblock(), x, gradient)
    kept = gradients(Resblock(boundary(24)), x, gradient)
    for name in exact:
        assert (kept[name] - exact[name]).norm() < 0.05 * exact[name].norm(), name
    lost = gradients(Resblock(boundary(0)), x, gradient)
    assert torch.equal(lost.pop("x"), gradient)  # that of the identity alone
    assert not any(grad.any() for grad in lost.values())


def test_an_overflow_made_by_the_scale_shows_in_its_own_parameters_alone():
    """All others are as if the resblock's branch had sent no gradient back."""
    model, cut = tiny.prior(), tiny.prior()
    for each, names in ((model, tuple(model.resblocks())), (cut, tuple(cut.resblocks()))):
        for i, modules in enumerate(each.resblocks().values()):
            for module in modules:
                enclose(module, boundary(60 if each is model and i == 3 else 10))
        assert names[3] == "layers.1.mlp"
    norm, mlp = cut.layers[1].mlp_norm, cut.layers[1].mlp
    norm.register_full_backward_hook(lambda _, grads, __: tuple(torch.zeros_like(g) for g in grads))
    hit, spared = prior_gradients(model), prior_gradients(cut)
    inside = {n for n in hit if n.startswith(("layers.1.mlp.", "layers.1.mlp_norm."))}
    assert {name for name, grad in hit.items() if not grad.isfinite().all()} == inside
    assert mlp.up.weight.grad.isfinite().all()
    for name in hit.keys() - inside:
        assert torch.equal(hit[name], spared[name]), name


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_what_comes_in_broken_is_zeroed_and_not_reported(poison):
    block, x = Resblock(boundary(10)), inputs(4)
    gradient = torch.randn(4, WIDTH)
    without = gradient.clone()
    gradient[2, 5], without[2, 5] = poison, 0.0
    broken = gradients(block, x, gradient)
    sound = gradients(block, x, without)
    broken.pop("x"), sound.pop("x")  # its identity has the broken one, as it came
    assert all(torch.equal(broken[name], sound[name]) for name in sound)


def test_gradients_of_gains_and_biases_are_summed_in_fp32():
    """Over these tokens the sum is far beyond what fp16 holds."""
    block, x = Resblock(boundary(10)), inputs(500)
    found = gradients(block, x, torch.ones(500, WIDTH))
    assert torch.finfo(torch.float16).max < 500 * 2**10
    torch.testing.assert_close(found["branch.down.bias"], torch.full((WIDTH,), 500.0))
    assert found["norm.weight"].isfinite().all()
    assert not found["branch.down.weight"].isfinite().all()  # as against matrices


def test_drawing_is_the_same_within_boundaries_and_leaves_them_be():
    plain, halved = tiny.prior(), tiny.prior()
    for modules in halved.resblocks().values():
        for module in modules:
            enclose(module, boundary(10))
    tokens, codes = tiny.batch(plain, 2)
    exact, found = (tiny.cached_logits(model, tokens, codes) for model in (plain, halved))
    assert torch.equal(found, exact)
    assert all(m.boundary is not None for m in halved.layers.modules() if isinstance(m, (Linear, LayerNorm)))


def test_a_layer_that_knows_no_boundary_is_refused():
    with pytest.raises(TypeError, match="1 is a Linear, which knows no boundary"):
        enclose(nn.Sequential(Linear(2, 2), nn.Linear(2, 2)), boundary(10))


def test_a_weight_in_fp16_has_its_gradient_gathered_in_fp32():
    """What it would be for the same weight in fp32, far below the least that fp16 holds."""
    full, half = Resblock(boundary(24)), Resblock(boundary(24))
    for model in (full, half):
        for linear in (model.branch.up, model.branch.down):
            linear.weight.data = linear.weight.data.half().to(linear.weight.dtype)
    for linear in (half.branch.up, half.branch.down):
        linear.weight.data = linear.weight.data.half()
    x, slope = inputs(5), torch.full((5, WIDTH), TINY)
    for _ in range(2):
        for model in (full, half):
            model(x).backward(slope)
    for name in ("up", "down"):
        expected, weight = getattr(full.branch, name).weight.grad, getattr(half.branch, name).weight
        assert weight.grad is None
        assert weight.main_grad.dtype == torch.float32
        assert torch.equal(weight.main_grad, expected)
        assert expected.abs().max() < 2.0**-24
    assert torch.equal(half.branch.up.bias.grad, full.branch.up.bias.grad)


def test_outside_of_a_boundary_a_weight_in_fp16_is_its_value_in_fp32():
    linear = Linear(WIDTH, WIDTH)
    linear.weight.data = linear.weight.data.half()
    x = inputs(5)
    assert torch.equal(linear(x), F.linear(x, linear.weight.float(), linear.bias))
