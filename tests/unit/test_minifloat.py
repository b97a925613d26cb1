"""The 16-bit formats against tables of exact fractions."""

import bisect
import functools
import math
import struct
from fractions import Fraction

import pytest
import torch

from dalle.minifloat import SIGNED, UNSIGNED

both = pytest.mark.parametrize("format", [SIGNED, UNSIGNED], ids=lambda f: f.name)


def exact(format, code: int) -> Fraction:
    """What a code stands for, by the definition."""
    fields = f"{code:016b}"
    sign = fields[0] if format.signed else "0"
    exponent, significand = fields[format.signed : format.signed + 6], fields[format.signed + 6 :]
    if int(exponent + significand, 2) == 0:
        return Fraction(0)
    value = Fraction(2) ** (int(exponent, 2) - 60) * (
        1 + Fraction(int(significand, 2), 2 ** len(significand))
    )
    return -value if sign == "1" else value


@functools.cache
def magnitudes(format) -> list[Fraction]:
    """All values from 0 up; the place in the list is the code."""
    return [exact(format, code) for code in range(2**15 if format.signed else 2**16)]


def nearest(format, table: list[Fraction], value: float) -> int:
    """The code of the nearest value, halves away from 0, by looking in the table."""
    if math.isnan(value):
        return len(table) - 1
    if value < 0 and not format.signed:
        return 0
    size = table[-1] if math.isinf(value) else min(abs(Fraction(value)), table[-1])
    if size < table[1]:
        return 0
    above = bisect.bisect_left(table, size)
    if above and size - table[above - 1] < table[above] - size:
        above -= 1
    return above + (2**15 if value < 0 else 0)


def check_packing(format, values: list[float]):
    values = [struct.unpack("f", struct.pack("f", v))[0] for v in values]  # as fp32 has them
    table = magnitudes(format)
    packed = format.pack(torch.tensor(values)).tolist()
    for value, code in zip(values, packed, strict=True):
        assert code == nearest(format, table, value), f"{format.name} of {value!r}: {code:016b}"


def test_the_formats_are_those_of_the_source():
    assert SIGNED.largest == 15.984375
    assert UNSIGNED.largest == 15.9921875
    assert SIGNED.smallest == pytest.approx(8.690558e-19, rel=1e-6)
    assert UNSIGNED.smallest == pytest.approx(8.682088e-19, rel=1e-6)


@both
def test_every_code_unpacks_to_its_value(format):
    codes = torch.arange(2**16).to(torch.uint16)
    for code, value in enumerate(format.unpack(codes).tolist()):
        assert Fraction(value) == exact(format, code), f"{code:016b}"


@both
def test_every_code_survives_a_round_trip(format):
    codes = torch.arange(2**16)
    back = format.pack(format.unpack(codes.to(torch.uint16))).to(torch.int64)
    expected = torch.where(codes == 2**15, 0, codes) if format.signed else codes  # −0 is 0
    assert torch.equal(back, expected)


@both
def test_values_between_any_two_neighbours_go_to_the_nearer_one(format):
    table = magnitudes(format)
    between = [
        float(low + (high - low) * share)
        for low, high in zip(table[1::37], table[2::37], strict=False)
        for share in (Fraction(1, 2), Fraction(1, 2) - Fraction(1, 999), Fraction(1, 2) + Fraction(1, 999))
    ]
    check_packing(format, [sign * value for value in between for sign in (1, -1)])


@both
def test_halves_go_away_from_zero_whether_the_last_bit_is_even_or_odd(format):
    step = 2.0**-format.significand
    halves = torch.tensor([1 + 0.5 * step, 1 + 1.5 * step])
    assert format.unpack(format.pack(halves)).tolist() == [1 + step, 1 + 2 * step]


@both
def test_random_values_of_every_exponent_of_fp32(format):
    random = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (20_000,), generator=random).to(torch.int32)
    values = bits.view(torch.float32)
    assert not values.isfinite().all()
    check_packing(format, values.tolist())
    usual = torch.randn(5_000, generator=random) * torch.logspace(-20, 2, 5_000)
    check_packing(format, usual.tolist())


@both
def test_the_ends_of_the_range(format):
    small, large = format.smallest, format.largest
    check_packing(
        format,
        [
            0.0, -0.0, 1e-45, -1e-45, 1.1e-38, 2.0**-60, small * (1 - 2**-23), small, small * (1 + 2**-23),
            small * 1.4, large * (1 - 2**-20), large, large + 1e-3, 16.0, 3e38, -3e38, -small, -large,
            math.inf, -math.inf, math.nan, -math.nan,
        ],
    )  # fmt: skip


@both
def test_infinities_and_nan_become_the_largest_value(format):
    bad = torch.tensor([math.inf, math.nan, -math.nan, -math.inf])
    lowest = -format.largest if format.signed else 0.0
    assert format.unpack(format.pack(bad)).tolist() == [*[format.largest] * 3, lowest]


@both
def test_shapes_stay_and_nothing_is_written_over(format):
    values = torch.rand(3, 0, 5), torch.rand(2, 3), torch.rand(())
    for each in values:
        before = each.clone()
        codes = format.pack(each)
        assert codes.dtype == torch.uint16
        assert codes.shape == each.shape
        kept = codes.clone()
        assert format.unpack(codes).shape == each.shape
        assert torch.equal(each, before)
        assert torch.equal(codes.view(torch.int16), kept.view(torch.int16))
