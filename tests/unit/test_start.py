"""A start at which the dVAE is a vector quantiser of patches."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from dalle.errors import ConfigError, DataError
from stage1_dvae import start
from stage1_dvae.config import DVAEConfig
from stage1_dvae.likelihood import map_pixels
from stage1_dvae.model import DVAE
from stage1_dvae.start import _distinct, k_means, pictures_needed, start_from_patches

TINY = DVAEConfig(
    image_size=8, vocab_size=6, hidden=96, codebook_width=96, groups=1, blocks_per_group=1, patch=4, gain=1.0
)


def patches_of(pixels):
    return F.pixel_unshuffle(pixels, 4).movedim(1, -1).flatten(0, 2)


def pictures_of(kinds, n=20):
    """Pictures put together from these patches, `k 3 4 4`, and which patch is where."""
    which = torch.randint(len(kinds), (n, 2, 2), generator=torch.Generator().manual_seed(1))
    return kinds[which].permute(0, 3, 1, 4, 2, 5).reshape(n, 3, 8, 8), which


def started(pixels, config=TINY):
    torch.manual_seed(0)
    model = DVAE(config)
    start_from_patches(model, pixels, seed=0)
    return model


def test_as_many_patches_as_codes_come_back_exactly_each_by_a_code_of_its_own():
    kinds = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    pixels, which = pictures_of(kinds)
    model = started(pixels)
    codes = model.encode(pixels)
    torch.testing.assert_close(model.decode(codes), pixels, atol=2e-3, rtol=0)
    pairs = set(zip(which.flatten().tolist(), codes.flatten().tolist(), strict=True))
    assert len(pairs) == len({code for _, code in pairs}) == 6


def test_a_patch_gets_the_code_of_the_nearest_cluster():
    pixels = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    model = started(pixels)
    shown = patches_of(map_pixels(model.decode(torch.arange(6).repeat(4, 1).t().reshape(6, 2, 2))))[::4]
    distance = torch.cdist(patches_of(map_pixels(pixels)), shown)
    # In all 48 components; means lie inside of [0.1, 0.9], so nothing is clamped.
    assert torch.equal(model.encode(pixels).flatten(), distance.argmin(1))


def test_every_code_is_in_use():
    pixels = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    assert started(pixels).encode(pixels).unique().numel() == 6


def test_fewer_different_patches_than_codes_are_no_error():
    flat = torch.ones(5, 3, 8, 8) * torch.tensor([0.2, 0.4, 0.4, 0.9, 0.9])[:, None, None, None]
    model = started(flat)
    assert all(p.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(model.decode(model.encode(flat)), flat, atol=5e-3, rtol=0)


def test_pictures_of_one_flat_colour_are_refused():
    with pytest.raises(DataError, match="all 20 looked at have one flat colour: give others"):
        started(torch.full((20, 3, 8, 8), 0.7))


def test_the_same_seed_gives_the_same_weights():
    pixels = torch.rand(30, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    one, other = started(pixels).state_dict(), started(pixels).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "change", [{"groups": 2, "image_size": 16}, {"codebook_width": 48}, {"hidden": 20, "codebook_width": 24}]
)
def test_geometries_without_patches_are_refused(change):
    config = dataclasses.replace(TINY, **change)
    with pytest.raises(ConfigError, match=r"start=patches needs groups=1.* or use start=random"):
        start_from_patches(DVAE(config), torch.rand(4, 3, config.image_size, config.image_size), 0)


def test_centres_are_the_weighted_means_of_what_is_nearest_to_them():
    generator = torch.Generator().manual_seed(5)
    middles = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = (middles[:, None] + torch.rand(3, 50, 2, generator=generator)).flatten(0, 1)
    weights = torch.rand(150, generator=generator) + 0.1
    found = k_means(points, weights, 3, generator)
    for middle in range(3):
        own = slice(50 * middle, 50 * (middle + 1))
        mean = (points[own] * weights[own, None]).sum(0) / weights[own].sum()
        assert torch.cdist(mean[None], found).min() < 1e-4


def test_common_patches_have_codes_of_their_own_before_rare_ones_that_differ_more():
    generator = torch.Generator().manual_seed(5)
    common = 3 + torch.tensor([[0.0, 0.0], [0.2, 0.0], [0.0, 0.2], [0.2, 0.2]])
    points = torch.cat([torch.randn(400, 2, generator=generator), common])
    weights = torch.cat([torch.ones(400), torch.full((4,), 1e5)])
    found = k_means(points, weights, 16, generator)
    assert torch.cdist(common, found).min(1).values.max() < 0.02


@pytest.mark.parametrize("grey", [0.5, 0.89])
def test_patches_that_differ_by_a_level_of_grey_have_centres_of_their_own(grey):
    """Light sketches and icons: distances between such patches are lost in the rounding of their squares."""
    generator = torch.Generator().manual_seed(5)
    points = torch.full((300, 192), grey)
    points[torch.arange(300), torch.randint(192, (300,), generator=generator)] -= (
        0.003 * torch.arange(1, 301) / 300
    )
    found = k_means(points, torch.ones(300), 256, generator)
    assert len(found.unique(dim=0)) == 256


def test_codes_beyond_the_patches_there_are_stay_near_one():
    points = torch.rand(7, 12, generator=torch.Generator().manual_seed(5))
    found = k_means(points, torch.ones(7), 20, torch.Generator().manual_seed(0))
    assert len(found.unique(dim=0)) == 20
    assert torch.cdist(found, points).amin(0).max() < 1e-3
    assert torch.cdist(found, points).amin(1).max() < 0.01


def test_enough_pictures_are_asked_for():
    config = dataclasses.replace(TINY, vocab_size=100)
    assert pictures_needed(config) * config.grid**2 >= 4 * 32 * 100


def test_a_code_is_as_likely_as_a_gaussian_around_its_cluster_says():
    """Of a sixteenth of the variance that patches have around the nearest cluster."""
    pixels = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    model = started(pixels)
    shown = patches_of(map_pixels(model.decode(torch.arange(6).repeat(4, 1).t().reshape(6, 2, 2))))[::4]
    squares = torch.cdist(patches_of(map_pixels(pixels)).double(), shown.double()).square()
    expected = -squares / (2 * squares.amin(1).mean() / 16)
    found = model.logits(pixels).movedim(1, -1).flatten(0, 2).double()
    torch.testing.assert_close(
        found - found[:, :1], expected - expected[:, :1], rtol=0.02, atol=0.02 * expected.std().item()
    )


def test_a_patch_counts_by_the_root_of_how_often_it_occurs():
    kinds = torch.tensor([0.2, 0.4, 0.6, 0.8])[:, None].expand(4, 12)
    patches, weights = _distinct(
        kinds.repeat_interleave(torch.tensor([16, 9, 4, 1]), 0), 99, torch.Generator()
    )
    torch.testing.assert_close(patches, kinds)
    assert weights.tolist() == [4, 3, 2, 1]


def test_of_too_many_different_patches_a_part_is_kept_and_the_commonest_anyway():
    patches = torch.arange(1000.0).repeat_interleave(torch.tensor([1] * 998 + [9, 9]))[:, None] / 1000
    for seed in range(3):
        kept, _ = _distinct(patches, 100, torch.Generator().manual_seed(seed))
        assert 100 <= len(kept) <= 100 + 64
        assert kept[-2:, 0].tolist() == pytest.approx([0.998, 0.999])


def test_every_pixel_begins_with_the_same_scale():
    pixels = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    model = started(pixels)
    ln_b = model.decoder.look_up(model.encode(pixels))[:, 3:]
    torch.testing.assert_close(ln_b.exp(), torch.full_like(ln_b, 0.2))


def test_what_lies_around_a_patch_does_not_matter():
    kinds = torch.rand(9, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    pixels, which = pictures_of(kinds)
    logits = started(pixels).logits(pixels).movedim(1, -1).flatten(0, 2)
    for kind in range(9):
        alike = logits[which.flatten() == kind]
        assert len(alike) > 2
        torch.testing.assert_close(alike, alike[:1].expand_as(alike), rtol=1e-4, atol=1e-3)


def test_two_centres_of_points_in_a_row_come_to_the_middles_of_its_halves():
    points = torch.arange(200.0)[:, None]
    for seed in range(5):
        found = k_means(points, torch.ones(200), 2, torch.Generator().manual_seed(seed))
        assert found.flatten().sort().values.tolist() == pytest.approx([49.5, 149.5], abs=1)


def test_centres_begin_at_the_commonest_patch(monkeypatch):
    monkeypatch.setattr(start, "ROUNDS", 0)
    points, weights = torch.rand(50, 4), torch.arange(50.0).roll(7) + 1
    torch.testing.assert_close(k_means(points, weights, 1, torch.Generator())[0], points[weights.argmax()])
