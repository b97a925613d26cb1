"""The paper's two 16-bit floating-point formats, packed into uint16.

1-6-9 (sign, 6 bits of exponent, 9 of significand) holds running means, error sums and PowerSGD's factors;
0-6-10 holds running variances. Exponents reach from 2⁻⁶⁰ to 2³, where fp16 ends at 2⁻²⁴: moments of small
gradients survive. There are no subnormals, no infinity and no NaN. All bits 0 mean 0.

Source: paper, App. D (the split of the bits, and a largest 1-6-9 value just under 16); the rest as in
openai/blocksparse, whose kernels' author is one of the paper's.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float32, UInt16
from torch import Tensor

BIAS = 60  # the lowest exponent is 2^−60; fp32 writes it as 127 − 60


@dataclass(frozen=True)
class Minifloat:
    """One of the two formats.

    Values are rounded to the nearest, halves away from 0. What lies below the smallest value becomes 0;
    what lies above the largest one, infinities and NaN become the largest: whoever stores values has to
    ask before whether they are finite.
    """

    name: str
    signed: bool
    significand: int  # bits

    @property
    def largest(self) -> float:
        """Just under 16."""
        return 16.0 - 2.0 ** (3 - self.significand)

    @property
    def smallest(self) -> float:
        """The smallest above 0; all bits but the last are 0 in it."""
        return 2.0**-BIAS * (1 + 2.0**-self.significand)

    @property
    def _shift(self) -> int:
        return 23 - self.significand  # bits of an fp32 significand that are dropped

    @cached_property
    def _highest(self) -> int:
        return int(torch.tensor(self.largest).view(torch.int32))

    @cached_property
    def _vanishing(self) -> float:
        """The fp32 number before the smallest value."""
        return torch.nextafter(torch.tensor(self.smallest), torch.tensor(0.0)).item()

    def pack(self, values: Float32[Tensor, "*n"]) -> UInt16[Tensor, "*n"]:
        """The nearest values of this format."""
        # Elementwise on the bits and in place: the fast operations of every device.
        known = torch.nan_to_num(values, self.largest, math.inf, -math.inf)
        bits = torch.nn.functional.hardshrink(known, self._vanishing).view(torch.int32)
        lowest = (127 - BIAS) << 23
        codes = bits & 0x7FFF_FFFF if self.signed else bits.clone()
        codes.clamp_(lowest, self._highest).add_((1 << (self._shift - 1)) - lowest).bitwise_right_shift_(
            self._shift
        )
        if self.signed:
            codes |= bits.bitwise_right_shift_(16).bitwise_and_(-0x8000)
        return codes.to(torch.int16).view(torch.uint16)

    def unpack(self, codes: UInt16[Tensor, "*n"]) -> Float32[Tensor, "*n"]:
        """Exactly the values that the codes stand for."""
        bits = codes.view(torch.int16).to(torch.int32)
        if not self.signed:
            bits &= 0xFFFF
        bits <<= self._shift
        if self.signed:
            bits &= ~0x6000_0000  # the sign was extended into the two bits below it
        bits += (127 - BIAS) << 23
        return torch.nn.functional.hardshrink(bits.view(torch.float32), 2.0**-BIAS)  # all bits 0: 0


SIGNED = Minifloat("1-6-9", signed=True, significand=9)
UNSIGNED = Minifloat("0-6-10", signed=False, significand=10)
