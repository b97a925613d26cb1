"""A prior over fine codes that begins with one over coarser codes."""

from dataclasses import replace

import pytest
import torch

from dalle.errors import ConfigError
from stage2_prior.codec import Codec
from stage2_prior.config import PriorConfig
from stage2_prior.grow import Coarse, grow
from tests import tiny

GRID, FINE_CODES = tiny.PRIOR_SHAPE["grid"], 29


def codec_of(grid: int, number: int, seed: int) -> Codec:
    """A stand-in for a dVAE: the code of a cell follows from the picture's mean there."""
    size = tiny.DVAE_SHAPE["image_size"]

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        cells = torch.nn.functional.avg_pool2d(pixels.mean(1, keepdim=True), size // grid)[:, 0]
        return (cells * (1000 + seed)).long() % number

    return Codec(size, grid, number, encode, encode, torch.randn(number, 6), f"codes-{seed}")


def coarse(**shape: int) -> Coarse:
    prior = tiny.prior(seed=1, **shape)
    return Coarse(prior, codec_of(GRID, prior.config.image_vocab, 0), tiny.tokenizer(), "coarse")


def fine_config(**shape: int) -> PriorConfig:
    return PriorConfig(**(tiny.PRIOR_SHAPE | {"grid": 2 * GRID, "image_vocab": FINE_CODES} | shape))


def pictures(n: int = 60) -> torch.Tensor:
    size, random = tiny.DVAE_SHAPE["image_size"], torch.Generator().manual_seed(3)
    return torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=random)


@pytest.mark.parametrize("channels", [0, 5])
def test_a_fine_code_begins_as_the_mean_of_the_coarse_ones_in_whose_place_it_stands(channels):
    begin, codec = coarse(code_channels=4), codec_of(2 * GRID, FINE_CODES, 7)
    fine = tiny.prior(seed=2, grid=2 * GRID, image_vocab=FINE_CODES, code_channels=channels)
    grow(fine, begin, codec, pictures())
    around: dict[int, list[int]] = {}
    for picture in pictures():
        pixels = picture[None] / 255
        small, large = codec.encode(pixels)[0], begin.codec.encode(pixels)[0]
        for y in range(2 * GRID):
            for x in range(2 * GRID):
                around.setdefault(int(small[y, x]), []).append(int(large[y // 2, x // 2]))
    assert len(around) > FINE_CODES / 2
    for own, whole in zip(fine.code_tables(), begin.prior.code_tables(), strict=True):
        for code, places in around.items():
            torch.testing.assert_close(own[code], whole[places].mean(0), rtol=1e-4, atol=1e-5)
        for code in set(range(FINE_CODES)) - set(around):
            assert not own[code].any()
    often = torch.tensor([len(around.get(code, [])) for code in range(FINE_CODES)])
    unlikelier = fine.image_head.bias[0] - fine.image_head.bias
    torch.testing.assert_close(unlikelier.exp(), (1 + often[0]) / (1 + often))


def test_a_row_and_a_column_begin_as_the_coarse_one_they_lie_in():
    begin, fine = coarse(), tiny.prior(seed=2, grid=4 * GRID, image_vocab=FINE_CODES)
    grow(fine, begin, codec_of(4 * GRID, FINE_CODES, 7), pictures(2))
    for own, whole in ((fine.rows, begin.prior.rows), (fine.columns, begin.prior.columns)):
        for i in range(4 * GRID):
            assert torch.equal(own.weight[i], whole.weight[i // 4])


def test_all_that_has_nothing_to_do_with_codes_is_taken_over():
    begin, fine = coarse(), tiny.prior(seed=2, grid=2 * GRID, image_vocab=FINE_CODES)
    grow(fine, begin, codec_of(2 * GRID, FINE_CODES, 7), pictures(2))
    tokens, _ = tiny.batch(begin.prior, 3)
    codes = {model: torch.zeros(3, model.config.cells, dtype=torch.long) for model in (begin.prior, fine)}
    one, other = (model(tokens, codes[model])[0] for model in (begin.prior, fine))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    torch.testing.assert_close(begin.prior.text_logits(one), fine.text_logits(other), rtol=0, atol=0)


def test_over_the_same_codes_it_is_the_same_prior_but_for_how_often_they_come():
    begin = coarse(code_channels=4)
    fine = tiny.prior(seed=2, code_channels=5)
    grow(fine, begin, begin.codec, pictures())
    tokens, _ = tiny.batch(fine, 3)
    shown = begin.codec.encode(pictures(3) / 255).flatten(1)
    one, other = (model(tokens, shown)[1] for model in (begin.prior, fine))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "complaint"),
    [
        ({"width": 24}, "has width=12, the new one width=24: --set width=12"),
        ({"depth": 5}, "has depth=3, the new one depth=5"),
        ({"heads": 4}, "has heads=3, the new one heads=4"),
        ({"text_length": 9}, "has text_length=7, the new one text_length=9"),
        ({"grid": 6}, "4 codes per side do not divide the new one's 6"),
    ],
)
def test_a_prior_that_cannot_begin_the_new_one_is_refused_with_what_differs(shape, complaint):
    config = fine_config(**shape)
    with pytest.raises(ConfigError, match=complaint):
        coarse().check(config, codec_of(config.grid, FINE_CODES, 7))


def test_pictures_of_another_size_are_refused():
    other = codec_of(2 * GRID, FINE_CODES, 7)
    other.image_size = 32
    with pytest.raises(ConfigError, match="have 16 pixels per side, the new one's 32"):
        coarse().check(fine_config(), other)


def test_one_that_fits_is_not_refused():
    coarse().check(replace(fine_config(), code_channels=5), codec_of(2 * GRID, FINE_CODES, 7))
