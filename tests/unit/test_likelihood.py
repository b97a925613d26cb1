"""The logit-Laplace distribution."""

import math

import pytest
import torch

from stage1_dvae.likelihood import (
    EPSILON,
    gaussian_log_density,
    log_density,
    log_likelihood,
    map_pixels,
    reconstruction,
    unmap_pixels,
)

PARAMETERS = pytest.mark.parametrize(
    ("mu", "b"), [(0.0, 0.5), (1.5, 0.1), (-2.0, 0.7), (0.3, 1.0), (-1.0, 2.0)]
)


def picture(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(1, 1, 1, -1)


@PARAMETERS
def test_the_density_integrates_to_one(mu, b):
    # Over u = logit x, where dx = x (1 − x) du; μ is a point of the grid, for the density has a corner there.
    u = mu + torch.linspace(-25, 25, 50_001, dtype=torch.float64)
    x = u.sigmoid()
    density = log_density(
        picture(x), picture(torch.full_like(x, mu)), picture(torch.full_like(x, math.log(b)))
    )
    mass = torch.trapezoid(density.exp().flatten() * x * (1 - x), u)
    assert mass.item() == pytest.approx(1, abs=1e-4)


@PARAMETERS
def test_half_of_the_mass_lies_below_the_median(mu, b):
    median = 1 / (1 + math.exp(-mu))
    x = torch.linspace(1e-9, median, 400_001, dtype=torch.float64)
    density = log_density(
        picture(x), picture(torch.full_like(x, mu)), picture(torch.full_like(x, math.log(b)))
    )
    # b = 2 has an integrable pole at 0, of which a sum sees less
    assert torch.trapezoid(density.exp().flatten(), x).item() == pytest.approx(
        0.5, abs=2e-4 if b <= 1 else 2e-2
    )


@PARAMETERS
@pytest.mark.parametrize("x", [0.1, 0.37, 0.5, 0.9])
def test_it_is_the_papers_formula(x, mu, b):
    by_hand = math.exp(-abs(math.log(x / (1 - x)) - mu) / b) / (2 * b * x * (1 - x))
    computed = log_density(
        *(torch.tensor([[[[value]]]], dtype=torch.float64) for value in (x, mu, math.log(b)))
    )
    assert computed.item() == pytest.approx(math.log(by_hand), rel=1e-12)


def test_mapping_is_undone_by_unmapping_and_stays_clear_of_0_and_1():
    pixels = torch.linspace(0, 1, 256).reshape(1, 1, 16, 16)
    mapped = map_pixels(pixels)
    assert mapped.min().item() == pytest.approx(EPSILON)
    assert mapped.max().item() == pytest.approx(1 - EPSILON)
    torch.testing.assert_close(unmap_pixels(mapped), pixels, rtol=0, atol=3e-7)
    assert torch.equal((255 * unmap_pixels(mapped)).round(), (255 * pixels).round())


def test_unmapping_clamps():
    mapped = torch.tensor([[[[0.0, 0.05, 0.1, 0.5, 0.95, 1.0]]]])
    torch.testing.assert_close(unmap_pixels(mapped).flatten(), torch.tensor([0, 0, 0, 0.5, 1, 1]))


def test_the_reconstruction_is_the_median_and_ignores_the_scale():
    torch.manual_seed(0)
    parameters = torch.randn(2, 6, 3, 5)
    shown = reconstruction(parameters)
    assert torch.equal(shown, unmap_pixels(parameters[:, :3].sigmoid()))
    parameters[:, 3:] += 1
    assert torch.equal(reconstruction(parameters), shown)
    assert reconstruction(parameters.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("std", [0.035, 0.3])
def test_gaussian_pixels_have_the_normal_density_around_the_median(std):
    x, mu = torch.rand(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    expected = torch.distributions.Normal(mu.sigmoid(), std).log_prob(x)
    torch.testing.assert_close(gaussian_log_density(x, mu, std), expected)


def test_the_likelihood_is_the_papers_unless_a_width_is_given():
    pixels, parameters = torch.rand(2, 3, 4, 5), torch.randn(2, 6, 4, 5)
    mu, ln_b = parameters.chunk(2, 1)
    assert torch.equal(log_likelihood(pixels, parameters, None), log_density(map_pixels(pixels), mu, ln_b))
    assert torch.equal(
        log_likelihood(pixels, parameters, 0.1), gaussian_log_density(map_pixels(pixels), mu, 0.1)
    )
