"""The posterior over the codes: a relaxed sample, the KL, the use of the codes, and their gradients."""

import math

import numpy as np
import pytest
import torch

from dalle.noise import noise_of, uniform
from stage1_dvae import posterior as module
from stage1_dvae.posterior import Posterior, kl_to_uniform, posterior, relax


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def of_numpy(seed: int = 0) -> np.random.BitGenerator:
    return noise_of(torch.device("cpu"), seed)


def formulas(raw, tau, generators):
    """The same from torch's own operations, for autograd to differentiate."""
    log_q = torch.log_softmax(raw, -1)
    noise = torch.stack([uniform(g, out=torch.empty(raw.shape[1:])) for g in generators])
    relaxed = torch.softmax((log_q - (-noise.log()).log()) / tau, -1)
    q = log_q.exp()
    return relaxed, (q * log_q).sum(-1) + math.log(raw.shape[-1]), q.mean(1)


@pytest.mark.parametrize("at_once", [2**20, 200, 40, 1])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("generator", [seeded, of_numpy])
def test_values_and_gradients_are_those_of_the_formulas(at_once, channels_last, generator, monkeypatch):
    """However much is taken at a time."""
    monkeypatch.setattr(module, "AT_ONCE", {"cpu": at_once})
    raw = 3 * torch.randn(5, 7, 13, generator=seeded())
    if not channels_last:
        raw = raw.mT.contiguous().mT
    upstream = [torch.randn(shape, generator=seeded(9)) for shape in ((5, 7, 13), (5, 7), (5, 13))]
    found = []
    for form in (posterior, formulas):
        x = raw.clone().requires_grad_()
        values = form(x, 0.6, [generator(i) for i in range(5)])
        sum((v * g).sum() for v, g in zip(values, upstream, strict=True)).backward()
        found.append([*(v.detach() for v in values), x.grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # fp32, other orders of summation


def test_nothing_is_rounded_under_autocast():
    raw, found = 3 * torch.randn(2, 5, 11, generator=seeded()), []
    for dtype in (torch.float32, torch.bfloat16):
        x = raw.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            values = posterior(x, 0.6, [seeded(i) for i in range(2)])
            sum(v.square().sum() for v in values).backward()
        found.append([*values, x.grad])
    for rounded, exact in zip(*found, strict=True):
        assert torch.equal(rounded, exact)


@pytest.mark.parametrize("which", ["relaxed", "kl", "mean"])
def test_each_result_has_a_gradient_of_its_own(which):
    raw, index = 3 * torch.randn(2, 3, 11, generator=seeded()), Posterior._fields.index(which)
    found = []
    for form in (posterior, formulas):
        x = raw.clone().requires_grad_()
        form(x, 1.3, [seeded(i) for i in range(2)])[index].square().sum().backward()
        found.append(x.grad)
    assert found[1].abs().max() > 1e-4
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("v", [2, 11, 8192])
def test_kl_is_0_for_uniform_and_ln_v_for_a_certain_code(v):
    uniform = torch.log_softmax(torch.full((3, v), 5.0), -1)
    assert kl_to_uniform(uniform, uniform.exp()).abs().max() < 1e-5  # fp32 rounding of ln v
    certain = torch.log_softmax(80.0 * torch.eye(v)[[0, v - 1]], -1)
    torch.testing.assert_close(kl_to_uniform(certain, certain.exp()), torch.full((2,), math.log(v)))


def logits(*values: float, n: int) -> torch.Tensor:
    return torch.log_softmax(torch.tensor(values), -1).expand(n, 1, len(values))


@pytest.mark.parametrize("tau", [1.0, 1e-3])
def test_the_largest_relaxed_code_is_a_sample_of_the_posterior(tau):
    n, log_q = 20_000, logits(0.0, 1.0, 2.0, -1.0, 0.5, n=20_000)
    counts = torch.bincount(relax(log_q, tau, [seeded()] * len(log_q)).argmax(-1).flatten(), minlength=5)
    expected = n * log_q[0, 0].exp()
    chi_square = ((counts - expected).square() / expected).sum()
    assert chi_square < 18.5  # 4 degrees of freedom: exceeded once in a thousand seeds


def test_relaxed_codes_harden_as_tau_falls():
    log_q = logits(0.0, 1.0, 2.0, -1.0, 0.5, n=2000)
    largest = [
        relax(log_q, tau, [seeded()] * len(log_q)).amax(-1).mean().item()
        for tau in (1.0, 1 / 4, 1 / 16, 1e-3)
    ]
    assert largest == sorted(largest)
    assert largest[0] < 0.7
    assert largest[-1] > 0.995


def test_no_uniform_draw_makes_infinite_noise():
    class Extremes(np.random.SFC64):
        """The least and the greatest number that a generator gives."""

        def random_raw(self, size):
            return np.array([0, -1], np.int32).view(np.uint64)

    relaxed = relax(logits(0.0, 0.0, n=1), 10.0, [Extremes()])
    # noise −ln(24 ln 2) = −2.81 and 24 ln 2 = 16.64
    smaller = 1 / (1 + math.exp((16.64 + 2.81) / 10))
    assert relaxed[0, 0].tolist() == pytest.approx([smaller, 1 - smaller], rel=1e-3)
