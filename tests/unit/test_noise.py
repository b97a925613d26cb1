"""Keyed noise: numbers between 0 and 1, a function of their key alone."""

import pytest
import torch

from dalle import noise
from dalle.noise import keyed, noise_of, uniform

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", [keyed, noise_of])
def test_numbers_are_uniform_and_have_logarithms(kind):
    numbers = uniform(kind(CPU, 3, 7), torch.empty(1001, 999))
    assert numbers.min() > 0
    assert numbers.max() < 1
    expected = numbers.numel() / 64
    for found in (numbers, numbers[:, 1:] - numbers[:, :-1], numbers * 2**12):
        # the numbers, how neighbours differ, and what is left of them behind their first twelve bits
        counts = torch.histc(found.frac() + (found < 0), 64, 0, 1)
        chi_square = ((counts - expected).square() / expected).sum() * numbers.numel() / found.numel()
        assert chi_square < 104  # 63 degrees of freedom: exceeded once in a thousand seeds


@pytest.mark.parametrize("kind", [keyed, noise_of])
@pytest.mark.parametrize("shape", [(5,), (1,), (0,), (3, 7)])
def test_any_shape_is_filled_from_the_same_key_alike(kind, shape):
    first, second, other = (uniform(kind(CPU, 1, key), torch.full(shape, -1.0)) for key in (2, 2, 3))
    assert first.shape == shape
    assert (first > 0).all()
    assert torch.equal(first, second)
    assert not first.numel() or not torch.equal(first, other)


@pytest.mark.parametrize("kind", [keyed, noise_of])
@pytest.mark.parametrize("n", [6, 7])
def test_pieces_of_rows_get_what_the_whole_gets(kind, n):
    whole, pieces = uniform(kind(CPU, 5), torch.empty(9, n)), torch.empty(9, n)
    generator = kind(CPU, 5)
    for piece in pieces.split([1, 5, 3]):
        uniform(generator, piece)
    assert torch.equal(pieces, whole)


def test_a_part_of_a_larger_tensor_is_filled_in_place():
    rows = torch.full((3, 8), -1.0)
    uniform(noise_of(CPU, 1), rows[1])
    assert (rows > 0).tolist() == [[False] * 8, [True] * 8, [False] * 8]


@pytest.mark.parametrize("kind", [keyed, noise_of])
@pytest.mark.parametrize("by_numpy", [True, False])
def test_gumbel_noise_is_the_double_logarithm_of_these_numbers(monkeypatch, kind, by_numpy):
    monkeypatch.setattr(noise, "X86", by_numpy)
    rows = torch.zeros(3, 4096)
    found = noise.negative_gumbel(kind(CPU, 3), rows[1:])
    assert found.data_ptr() == rows[1:].data_ptr()
    assert not rows[0].any()
    exact = (-uniform(kind(CPU, 3), torch.empty(2, 4096)).double().log()).log()
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


def test_a_generator_is_a_function_of_its_key_alone():
    def draw(*key):
        return torch.rand(9, generator=keyed(CPU, *key)).tolist()

    assert draw(0, 5, 1) == draw(0, 5, 1)
    keys = [(s, t, m) for s in range(3) for t in range(5) for m in range(3)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)
