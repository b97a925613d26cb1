"""Gradients averaged between machines in low rank: PowerSGD with fixed projections, as the paper runs it.

Within a machine the processes partition the model and average their gradients in full. Between machines,
where the wires are far slower, the processes of the same ordinal exchange two thin factors of each matrix:

    E += G                                what this machine adds to all that was not sent so far
    P  = orthonormal(mean of E·Q₀)        Q₀ is Gaussian, drawn once, from the parameter's name
    Q  = mean of Eᵀ·P
    Ĝ  = P·Qᵀ;  E −= Ĝ                    Ĝ takes the gradient's place; the rest waits in E

Gains, biases, embeddings, heads and the ragged ends of shares are averaged in full, in fp32.

Source: paper, §4 and App. E; Vogels et al. 2019.
"""

import math
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from dalle.console import warn
from dalle.minifloat import SIGNED
from dalle.optim import full_shape
from dalle.piece import Piece
from dalle.wire import Wire

IDENTITY = 1e-6  # how much of it is added before orthonormalising
LOSSES = 3  # samples in a row in which a plain mean was faster, before the user is told


@dataclass(frozen=True)
class Receipt:
    """What one reduction did.

    Args:
        norm: of the whole reduced gradient; infinite where anything was not finite on any machine.
        bytes: handed over for means by this process.
        plain_bytes: what a plain mean of its gradients hands over.
        seconds: taken.
        plain_seconds: what a plain mean took, where one was made to compare with.
        cosine: between the reduced gradients of the compressed matrices and their true mean, likewise.
    """

    norm: float
    bytes: int
    plain_bytes: int
    seconds: float
    plain_seconds: float | None = None
    cosine: float | None = None

    def metrics(self) -> dict[str, float]:
        """For the log."""
        told = {
            "between_bytes": float(self.bytes),
            "between_saved": 1 - self.bytes / max(1, self.plain_bytes),
            "between_seconds": self.seconds,
        }
        if self.plain_seconds is not None:
            told["between_plain_seconds"] = self.plain_seconds
        if self.cosine is not None:
            told["between_cosine"] = self.cosine
        return told


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
    """What is compressed of a process' share of a parameter: its whole rows.

    Args:
        name: of the parameter.
        shape: of the whole parameter.
        offset: where the share begins in the flattened parameter.
        numel: numbers of the share.
        total_rank: of the whole parameter. A share has its part of it: r/m where there are m equal ones.
    """

    def __init__(self, name: str, shape: tuple[int, ...], offset: int, numel: int, total_rank: int) -> None:
        self.name, self.columns = name, math.prod(shape[1:])
        first, last = -(-offset // self.columns), (offset + numel) // self.columns
        self.rows = max(0, last - first)
        self.begin = first * self.columns - offset  # within the share
        self.end = self.begin + self.rows * self.columns
        self.offset = first * self.columns  # within the flattened parameter
        self.short, self.long = sorted((self.rows, self.columns))
        self.rank = min(self.short, max(1, round(total_rank * self.rows / shape[0])))

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


def orthonormal(p: Float[Tensor, "m r"]) -> Float[Tensor, "m r"]:
    """An orthonormal basis of the columns of P + 1e-6·I, by Householder reflections.

    The identity keeps apart columns that are zero or alike. It is meant relative to the numbers of P, which
    the paper holds near the top of their range by constants chosen by hand; here P is first divided by its
    largest number.
    """
    size = p.abs().amax()
    p = p / torch.where(size > 0, size, 1.0)
    return torch.linalg.qr(p + IDENTITY * torch.eye(*p.shape, device=p.device)).Q


class PowerSGD:
    """Turns the mean over a machine into the mean over all machines, in low rank.

    Args:
        between: the processes of the same ordinal on all machines.
        within: the processes of this machine, where each holds another share; None where each holds all.
        matrices: names of the parameters that are compressed.
        rank: total rank of a matrix, over its shares.
        factors: how P, Q and the error sums are held and sent: fp32, or 1-6-9.
        start: updates at the beginning that are averaged in full.
        sample: updates between two receipts that compare with a plain mean; 0 for none.
        seed: of the projections.
        feedback: False leaves out the error sums, to show what they do.
    """

    def __init__(
        self,
        between: Any,
        within: Any = None,
        *,
        matrices: Collection[str],
        rank: int,
        factors: Literal["fp32", "16bit"] = "16bit",
        start: int = 0,
        sample: int = 0,
        seed: int = 0,
        feedback: bool = True,
    ) -> None:
        self.within, self.wire = within, Wire(between)
        self.matrices, self.rank, self.packed = frozenset(matrices), rank, factors == "16bit"
        self.start, self.sample, self.seed, self.feedback = start, sample, seed, feedback
        self.lost = 0  # samples in a row in which a plain mean was faster
        self._matrices: dict[str, Matrix | None] = {}
        self._errors: dict[str, Tensor] = {}  # E by name of the parameter, as they are held
        self._projections: dict[str, Tensor] = {}  # Q₀ likewise

    @property
    def dtype(self) -> torch.dtype:
        """How error sums are held and saved."""
        return torch.uint16 if self.packed else torch.float32

    def reduce(self, pieces: Sequence[Piece], step: int) -> Receipt | None:
        """Make `pieces` the mean over all machines, in place, for update number `step` (counted from 1).

        All machines hold the same pieces in the same order. What is not finite on any machine makes the norm
        infinite, which drops the update. Beyond that:

        - A gradient that is not finite never enters an error sum; those of the other machines go on as ever.
        - Where P or Q is not finite, each machine keeps its error sum, unless that itself is not finite: only
          then it begins again at zero. To zero them more often hurts, says the paper.

        A single machine has nothing to compress: it adds what a run on several has left unsent, and gives no
        receipt.

        Source: paper, App. E.2.
        """
        if self.wire.machines == 1:
            self._add_the_rest(pieces)
            return None
        sampled = bool(self.sample) and step % self.sample == 0
        true, plain_seconds = self._plain_means(pieces) if sampled else ([], None)
        began, sent = time.perf_counter(), self.wire.bytes
        matrices = [self._matrix(p) if step > self.start else None for p in pieces]
        low = [(m, p.grad.view(-1)[m.begin : m.end]) for m, p in zip(matrices, pieces, strict=True) if m]
        full = list(_outside(matrices, pieces))

        bad_gradients, bad_sums = self._add_to_errors(low)
        p, bad_p = self._factors(low, lambda m, e: m.of(e) @ self._projection(m))
        bases = dict(zip((m.name for m, _ in low), map(self._rounded, map(orthonormal, p)), strict=True))
        q, bad_q = self._factors(low, lambda m, e: m.of(e).t() @ bases[m.name])
        for gradient, mean in zip(full, self.wire.mean(full), strict=True):
            gradient.copy_(mean)
        # Infinities do not survive on the wire; the flags tell of them.
        bad_factors = self.wire.any(_any_of(bad_p, bad_q))
        for i, (matrix, gradient) in enumerate(low):
            low_rank = bases[matrix.name] @ q[i].t()
            matrix.of(gradient).copy_(low_rank)
            self._subtract(matrix, gradient, bad_factors[i], bad_sums[i])

        squares = _squares([*q, *full], pieces)  # of P·Qᵀ those of Q, since P is orthonormal
        bad = torch.stack([*bad_gradients, *bad_factors, ~squares.isfinite()]).any()[None]
        norm = self._whole_norm(squares, bad)
        seconds = time.perf_counter() - began
        cosine = self._cosine(low, [t for m, t in zip(matrices, true, strict=True) if m]) if true else None
        plain_bytes = sum(piece.grad.nbytes for piece in pieces)
        self._warn_if_it_loses(seconds, plain_seconds if low else None)
        return Receipt(norm, self.wire.bytes - sent, plain_bytes, seconds, plain_seconds, cosine)

    def formula(self, pieces: Sequence[Piece]) -> int:
        """Bytes that an update hands over once it compresses: r·(rows + columns) numbers for each matrix."""
        matrices = [self._matrix(p) for p in pieces]
        factors = sum(m.factors for m in matrices if m)
        rest = sum(p.grad.numel() for p in pieces) - sum(m.numel for m in matrices if m)
        return (2 if self.packed else 4) * factors + 4 * rest

    def sums(self) -> dict[str, tuple[int, Tensor]]:
        """The error sums over all machines by parameter, and where they begin in it when it is flattened.

        An update depends on nothing but these sums. So a run that is saved goes on with an equal part of them
        on each machine, as one that is resumed does, on whatever number of machines.

        Source: paper, App. E.4.
        """
        found = {}
        for name, error in self._errors.items():
            total = self._held(self.wire.sum(self._seen(error)))
            matrix = self._matrices[name]
            assert matrix is not None
            self._errors[name] = self._held(self._seen(total) / self.wire.machines)
            found[name] = matrix.offset, total
        return found

    def load(
        self, name: str, shape: tuple[int, ...], offset: int, numel: int, saved: Tensor, machines: int
    ) -> None:
        """Begin with an equal part of what `sums` gave for a parameter on so many machines.

        Args:
            name: of the parameter.
            shape: of all of it.
            offset: where this process' share of it begins.
            numel: the numbers of that share.
            saved: the sum, which covers all of it.
            machines: how many there were; the mean over the machines is what has not been sent, so the parts
                stay the same where there are others now.
        """
        if matrix := self._plan(name, shape, offset, numel):
            sums = saved.flatten()[matrix.offset :][: matrix.numel]
            sums = SIGNED.unpack(sums) if sums.dtype == torch.uint16 else sums
            self._errors[name] = self._held(sums / machines)

    def _matrix(self, piece: Piece) -> Matrix | None:
        return self._plan(piece.name, full_shape(piece.parameter), piece.offset, piece.grad.numel())

    def _plan(self, name: str, shape: tuple[int, ...], offset: int, numel: int) -> Matrix | None:
        """What is compressed of a share; None where nothing is, or nothing would be saved."""
        if name not in self._matrices:
            matrix = Matrix(name, shape, offset, numel, self.rank) if name in self.matrices else None
            worth_it = matrix is not None and 0 < matrix.factors < matrix.numel
            self._matrices[name] = matrix if worth_it else None
        return self._matrices[name]

    def _add_the_rest(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            matrix, error = self._matrix(piece), self._errors.pop(piece.name, None)
            if matrix and error is not None:
                own = piece.grad.view(-1)[matrix.begin : matrix.end]
                own += self._seen(error.to(own.device))

    def _warn_if_it_loses(self, seconds: float, plain_seconds: float | None) -> None:
        if plain_seconds is None:
            return
        self.lost = self.lost + 1 if plain_seconds < seconds else 0
        if self.lost == LOSSES:
            warn(
                f"compressing the gradients between machines takes {seconds:.3g} s, a plain mean "
                f"{plain_seconds:.3g} s: compression_rank=0 would be faster here"
            )

    def _held(self, values: Tensor) -> Tensor:
        return SIGNED.pack(values) if self.packed else values

    def _seen(self, held: Tensor) -> Tensor:
        return SIGNED.unpack(held) if self.packed else held

    def _rounded(self, values: Tensor) -> Tensor:
        return self._seen(self._held(values))

    def _projection(self, matrix: Matrix) -> Tensor:
        if matrix.name not in self._projections:
            drawn = matrix.projection(self.seed).to(self._errors[matrix.name].device)
            self._projections[matrix.name] = self._held(drawn)
        return self._seen(self._projections[matrix.name])

    def _add_to_errors(self, low: Iterable[tuple[Matrix, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        """E += G where G is finite; for each matrix whether it is not, and whether the sum is not."""
        bad_gradients, bad_sums = [], []
        for matrix, gradient in low:
            bad = ~_finite(gradient)
            total = torch.where(bad, 0.0, gradient)
            if (held := self._errors.get(matrix.name)) is not None and self.feedback:
                total = total + self._seen(held.to(total.device))
            bad_gradients.append(bad)
            bad_sums.append(~_finite(total))
            self._errors[matrix.name] = self._held(total)
        return bad_gradients, bad_sums

    def _factors(
        self, low: Sequence[tuple[Matrix, Tensor]], factor: Callable[[Matrix, Tensor], Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """A factor of every matrix, averaged together, and whether this machine's was not finite."""
        mine = [factor(m, self._seen(self._errors[m.name])) for m, _ in low]
        bad = [~_finite(each) for each in mine]
        largest = SIGNED.largest
        mine = [torch.nan_to_num(each, largest, largest, -largest) for each in mine]
        return self.wire.mean(mine, packed=self.packed), bad

    def _subtract(self, matrix: Matrix, sent: Tensor, bad_factors: Tensor, bad_sum: Tensor) -> None:
        """E −= Ĝ, or what the rules say."""
        total = self._seen(self._errors[matrix.name])
        kept = torch.where(bad_sum, 0.0, total)
        self._errors[matrix.name] = self._held(torch.where(bad_factors, kept, total - sent))

    def _whole_norm(self, squares: Tensor, bad: Tensor) -> float:
        if self.within is not None:
            dist.all_reduce(squares, group=self.within)
            flag = bad.to(torch.uint8)
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.within)
            bad = flag > 0
        # All machines clip by the same number, though each may have added its squares in its own order.
        return math.inf if bool(self.wire.any(bad)) else math.sqrt(float(self.wire.most(squares)))

    def _plain_means(self, pieces: Sequence[Piece]) -> tuple[list[Tensor], float]:
        """The true means, and the seconds that they took; nothing is counted."""
        wire = Wire(self.wire.group)
        wire.any(torch.zeros(1))  # or the time would hold the wait for the slowest
        began = time.perf_counter()
        means = wire.mean([piece.grad for piece in pieces])
        return means, time.perf_counter() - began

    def _cosine(self, low: Sequence[tuple[Matrix, Tensor]], true: Sequence[Tensor]) -> float | None:
        if not low:
            return None
        pairs = [(g.flatten(), t.flatten()[m.begin : m.end]) for (m, g), t in zip(low, true, strict=True)]
        sums = torch.stack([torch.stack([g @ t, g @ g, t @ t]) for g, t in pairs]).sum(0)
        if self.within is not None:
            dist.all_reduce(sums, group=self.within)
        product, reduced, wanted = sums.tolist()
        return product / math.sqrt(reduced * wanted) if reduced * wanted else None


def _outside(matrices: Sequence[Matrix | None], pieces: Sequence[Piece]) -> Iterable[Tensor]:
    """What is averaged in full: whole pieces, and the ragged ends of those with a matrix."""
    for matrix, piece in zip(matrices, pieces, strict=True):
        if matrix is None:
            yield piece.grad
        else:
            flat = piece.grad.view(-1)
            ends = flat[: matrix.begin], flat[matrix.end :]
            yield from (end for end in ends if end.numel())


def _finite(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, math.inf).isfinite()


def _any_of(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    if not one:
        return torch.zeros(0, dtype=torch.bool)
    return torch.stack(list(one)) | torch.stack(list(other))


def _squares(tensors: Sequence[Tensor], pieces: Sequence[Piece]) -> Tensor:
    """The sum of the squares of all numbers."""
    if not tensors:
        return torch.zeros((), device=pieces[0].grad.device if pieces else None)
    return torch.stack(torch._foreach_norm(list(tensors))).square().sum()
