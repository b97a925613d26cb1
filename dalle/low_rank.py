"""What is compressed of a gradient: a matrix, the rank it is given, and the basis that its factor becomes.

Source: paper, §4.2, Table 1 and App. E.
"""

import math
import zlib

import torch
from jaxtyping import Float
from torch import Tensor

IDENTITY = 1e-6  # how much of it is added before orthonormalising


def paper_rank(width: int) -> int:
    """The total rank of the matrices of a model of this width, over all shares.

    The paper lists the least ranks that leave no gap in the training loss, in multiples of 128: 512 for a
    width of 1,920, 640 for 2,688, 896 for 3,968. The smallest multiple of 128 of at least 0.22·width gives
    these; below a width of 1,024, where 128 is coarse, multiples of width/16 are taken.

    Source: paper, Table 1.
    """
    unit = 128 if width >= 1024 else max(1, width // 16)
    return unit * math.ceil(0.22 * width / unit)


class Matrix:
    """The whole rows of a matrix that lie in this process' share of its parameter.

    Args:
        name: of the parameter.
        shape: of the whole parameter.
        offset: where the share begins in the flattened parameter.
        numel: numbers of the share.
        total_rank: of the whole matrix. A share has its part of it: r/m where there are m equal ones.
        rows: those of the parameter that are the matrix; by default all.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        offset: int,
        numel: int,
        total_rank: int,
        rows: range | None = None,
    ) -> None:
        self.name, self.columns = name, math.prod(shape[1:])
        rows = range(shape[0]) if rows is None else rows
        first = max(rows.start, -(-offset // self.columns))
        last = min(rows.stop, (offset + numel) // self.columns)
        self.rows = max(0, last - first)
        self.begin = first * self.columns - offset  # within the share
        self.end = self.begin + self.rows * self.columns
        self.offset = first * self.columns  # within the flattened parameter
        self.short, self.long = sorted((self.rows, self.columns))
        self.rank = min(self.short, max(1, round(total_rank * self.rows / len(rows))))

    @property
    def numel(self) -> int:
        """Numbers of the matrix."""
        return self.rows * self.columns

    @property
    def factors(self) -> int:
        """Numbers of P and Q together."""
        return self.rank * (self.short + self.long)

    def projection(self, seed: int) -> Float[Tensor, "long rank"]:
        """Q₀: a function of the name and the place, the same at all times and on all machines."""
        key = zlib.crc32(f"{seed}/{self.name}/{self.offset}".encode())
        return torch.randn(self.long, self.rank, generator=torch.Generator().manual_seed(key))

    def of(self, flat: Float[Tensor, " n"]) -> Float[Tensor, "short long"]:
        """The numbers with the short side first: then the factor to be orthonormalised is the small one."""
        matrix = flat.view(self.rows, self.columns)
        return matrix if self.rows <= self.columns else matrix.t()


def compressed(
    name: str, shape: tuple[int, ...], offset: int, numel: int, total_rank: int, stacked: int
) -> list[Matrix]:
    """The matrices in a process' share of a parameter that compression makes smaller, in their order.

    Args:
        name: of the parameter.
        shape: of the whole parameter.
        offset: where the share begins in the flattened parameter.
        numel: numbers of the share.
        total_rank: of a whole matrix.
        stacked: matrices that lie below one another in the parameter, each of which is one of its own.
    """
    height = shape[0] // stacked
    parts = (range(i * height, (i + 1) * height) for i in range(stacked))
    matrices = [Matrix(name, shape, offset, numel, total_rank, rows) for rows in parts]
    return [matrix for matrix in matrices if 0 < matrix.factors < matrix.numel]


def orthonormal(p: Float[Tensor, "m r"]) -> Float[Tensor, "m r"]:
    """An orthonormal basis of the columns of P + 1e-6·I, by Householder reflections.

    The identity keeps apart columns that are zero or alike. It is meant relative to the numbers of P, which
    the paper holds near the top of their range by constants chosen by hand; here P is first divided by its
    largest number.
    """
    size = p.abs().amax()
    p = p / torch.where(size > 0, size, 1.0)
    return torch.linalg.qr(p + IDENTITY * torch.eye(*p.shape, device=p.device)).Q
