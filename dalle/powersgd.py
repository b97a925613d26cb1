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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dalle.console import warn
from dalle.low_rank import Matrix, compressed, orthonormal
from dalle.minifloat import SIGNED
from dalle.optim import full_shape
from dalle.overlap import InTurn, Work, blocks, finished
from dalle.piece import Piece, device_of
from dalle.precision import fp32_products
from dalle.wire import Wire

SCALE = 2.0**-10  # of factors in 1-6-9 on the wire, which hold sums of up to 2^14 then, and down to 2^-50
LOSSES = 3  # samples in a row in which a plain mean was faster, before the user is told


@dataclass(frozen=True)
class Receipt:
    """What one reduction did.

    Args:
        norm: of the whole reduced gradient; infinite where anything was not finite on any machine.
        bytes: handed over for means by this process.
        plain_bytes: what a plain mean of its gradients hands over.
        seconds: taken; of a GPU's host alone where no plain mean was made to compare with.
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


@dataclass
class _Block:
    """Gradients whose means are under way, and what is known of them so far."""

    low: list[tuple[Matrix, Tensor]] = field(default_factory=list)  # compressed, and the gradients' numbers
    full: list[Tensor] = field(default_factory=list)  # averaged in full
    bad_gradients: list[Tensor] = field(default_factory=list)  # of each in `low`: not finite here
    bad_sums: list[Tensor] = field(default_factory=list)
    bad_factors: list[Tensor] = field(default_factory=list)
    bases: list[Tensor] = field(default_factory=list)
    q: list[Tensor] = field(default_factory=list)
    means: list[Tensor] = field(default_factory=list)  # of `full`

    def add(self, gradient: Tensor, matrices: Sequence[Matrix]) -> None:
        """A gradient of which these matrices are compressed, in its order; the rest is averaged in full."""
        if not matrices:
            self.full.append(gradient)
            return
        flat = gradient.view(-1)
        self.low += [(matrix, flat[matrix.begin : matrix.end]) for matrix in matrices]
        begins = [0, *(matrix.end for matrix in matrices)]
        ends = [*(matrix.begin for matrix in matrices), flat.numel()]
        self.full += [flat[a:b] for a, b in zip(begins, ends, strict=True) if a < b]


class PowerSGD:
    """Turns the mean over a machine into the mean over all machines, in low rank.

    Args:
        between: the processes of the same ordinal on all machines.
        within: the processes of this machine, where each holds another share; None where each holds all.
        matrices: names of the parameters that are compressed, and how many matrices lie below one another in
            each.
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
        matrices: Mapping[str, int],
        rank: int,
        factors: Literal["fp32", "16bit"] = "16bit",
        start: int = 0,
        sample: int = 0,
        seed: int = 0,
        feedback: bool = True,
    ) -> None:
        self.within, self.wire = within, Wire(between)
        self.matrices, self.rank, self.packed = dict(matrices), rank, factors == "16bit"
        self.start, self.sample, self.seed, self.feedback = start, sample, seed, feedback
        self.owes = False  # has a single machine something to add that a run on several left unsent?
        self.lost = 0  # samples in a row in which a plain mean was faster
        self._matrices: dict[str, list[Matrix]] = {}  # of each parameter's share
        self._errors: dict[Matrix, Tensor] = {}  # E, as they are held
        self._projections: dict[Matrix, Tensor] = {}  # Q₀ likewise
        self._exchanged: list[_Block] = []  # of the update that is going on
        self._seconds = 0.0  # spent on it
        self._number: int | None = None  # of it; None before the first one since the start

    @property
    def dtype(self) -> torch.dtype:
        """How error sums are held and saved."""
        return torch.uint16 if self.packed else torch.float32

    @property
    def early(self) -> bool:
        """May `exchange` be called for the gradients of this update before all of them are there?

        Not for the first one since the start, whose number is not known yet, and not for one that is compared
        with a plain mean, so that both are timed alike.
        """
        return self.wire.machines > 1 and self._number is not None and not self._sampled(self._number)

    def exchange(self, pieces: Sequence[Piece]) -> Work[None]:
        """Find the means of some gradients over all machines; `reduce` puts them into their places.

        All machines hold the same pieces in the same order, and do so in the same order.
        """
        return self._timed(self._exchange(pieces))

    def reduce(self, pieces: Sequence[Piece], step: int) -> Receipt | None:
        """Make `pieces` the mean over all machines, in place, for update number `step` (counted from 1).

        All machines hold the same pieces in the same order: either all of them were given to `exchange`
        before, or none. What is not finite on any machine makes the norm infinite, which drops the update.
        Beyond that:

        - A gradient that is not finite never enters an error sum; those of the other machines go on as ever.
        - Where P or Q is not finite, each machine keeps its error sum, unless that itself is not finite: only
          then it begins again at zero. To zero them more often hurts, says the paper.

        A single machine has nothing to compress: it adds what a run on several has left unsent, until it is
        told that the update was made (`applied`), and gives no receipt.

        Source: paper, App. E.2.
        """
        if self.wire.machines == 1:
            self._add_the_rest(pieces)
            return None
        self._number = step
        true, plain_seconds = self._plain_means(pieces) if self._sampled(step) else ([], None)
        if not self._exchanged:
            in_turn = InTurn()
            for some in blocks(pieces, lambda piece: piece.grad.nbytes):
                in_turn.begin(self.exchange(some))
            in_turn.finish()
        exchanged, self._exchanged = self._exchanged, []
        with self._clock():
            norm = self._put(exchanged, device_of(pieces))
        low = [each for block in exchanged for each in block.low]
        cosine = None
        if true:
            means = zip(true, pieces, strict=True)
            cosine = self._cosine(low, [mean for mean, piece in means for _ in self._compressed(piece)])
        plain_bytes = sum(piece.grad.nbytes for piece in pieces)
        self._warn_if_it_loses(self._seconds, plain_seconds if low else None)
        receipt = Receipt(norm, self.wire.bytes, plain_bytes, self._seconds, plain_seconds, cosine)
        self._number, self._seconds, self.wire.bytes = step + 1, 0.0, 0
        return receipt

    def applied(self) -> None:
        """The update was made, not dropped."""
        if self.wire.machines == 1:
            self._errors.clear()
            self.owes = False

    @property
    def sums_matter(self) -> bool:
        """Are there error sums to save? The same in all processes, whatever each holds."""
        return self.wire.machines > 1 or self.owes

    def sums(self) -> dict[str, tuple[int, Tensor]]:
        """The error sums over all machines by parameter, and where they begin in it when it is flattened.

        An update depends on nothing but these sums. So a run that is saved goes on with an equal part of them
        on each machine, as one that is resumed does, on whatever number of machines.

        Source: paper, App. E.4.
        """
        found: dict[str, tuple[int, Tensor]] = {}
        for name, matrices in self._matrices.items():
            for matrix in matrices:
                if (error := self._errors.get(matrix)) is None:
                    continue
                total = self._held(self.wire.sum(self._seen(error)))
                self._errors[matrix] = self._held(self._seen(total) / self.wire.machines)
                if name not in found:
                    numel = matrices[-1].offset + matrices[-1].numel - matrix.offset
                    # All 0 between two matrices if the one there is averaged in full.
                    found[name] = matrix.offset, total.new_zeros(numel)
                begin, sums = found[name]
                sums[matrix.offset - begin :][: matrix.numel] = total
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
        self.owes = self.wire.machines == 1
        for matrix in self._plan(name, shape, offset, numel):
            sums = saved.flatten()[matrix.offset :][: matrix.numel]
            sums = SIGNED.unpack(sums) if sums.dtype == torch.uint16 else sums
            self._errors[matrix] = self._held(sums / machines)

    def _of(self, piece: Piece) -> list[Matrix]:
        return self._plan(piece.name, full_shape(piece.parameter), piece.offset, piece.grad.numel())

    def _plan(self, name: str, shape: tuple[int, ...], offset: int, numel: int) -> list[Matrix]:
        """What is compressed of a share."""
        if name not in self._matrices:
            stacked = self.matrices.get(name, 0)
            found = compressed(name, shape, offset, numel, self.rank, stacked) if stacked else []
            self._matrices[name] = found
        return self._matrices[name]

    def _compressed(self, piece: Piece) -> list[Matrix]:
        """What is compressed of it in this update."""
        assert self._number is not None
        return self._of(piece) if self._number > self.start else []

    def _sampled(self, step: int) -> bool:
        return bool(self.sample) and step % self.sample == 0

    @contextmanager
    def _clock(self) -> Iterator[None]:
        exactly = self._number is not None and self._sampled(self._number)
        began = _now(exactly)
        yield
        self._seconds += _now(exactly) - began

    def _timed(self, work: Work[None]) -> Work[None]:
        going = True
        while going:
            # As it is beside a backward pass that rounds its operands, so it is after that.
            with self._clock(), fp32_products("ieee"):
                going = next(work, self) is not self
            if going:
                yield

    def _exchange(self, pieces: Sequence[Piece]) -> Work[None]:
        block = _Block()
        self._exchanged.append(block)
        for piece in pieces:
            block.add(piece.grad, self._compressed(piece))
        matrices = [matrix for matrix, _ in block.low]
        self._add_to_errors(block)
        p, bad_p = yield from self._mean_factors(
            matrix.of(self._error(matrix)) @ self._projection(matrix) for matrix in matrices
        )
        block.bases = [self._rounded(orthonormal(each)) for each in p]
        block.q, bad_q = yield from self._mean_factors(
            matrix.of(self._error(matrix)).t() @ basis
            for matrix, basis in zip(matrices, block.bases, strict=True)
        )
        block.bad_factors = [a | b for a, b in zip(bad_p, bad_q, strict=True)]
        block.means = yield from self.wire.mean(block.full)

    def _put(self, exchanged: Sequence[_Block], device: torch.device) -> float:
        """Put the means into the gradients' places, what is left into the error sums; the means' norm."""
        # Infinities do not survive on the wire; the flags tell of them.
        bad_factors = self.wire.any(_stack((bad for b in exchanged for bad in b.bad_factors), device))
        flags = iter(bad_factors)
        for block in exchanged:
            for (matrix, gradient), basis, q, bad_sum in zip(
                block.low, block.bases, block.q, block.bad_sums, strict=True
            ):
                matrix.of(gradient).copy_(basis @ q.t())
                self._subtract(matrix, gradient, next(flags), bad_sum)
            for gradient, mean in zip(block.full, block.means, strict=True):
                gradient.copy_(mean)
        # The squares of P·Qᵀ are those of Q, since P is orthonormal.
        squares = _squares([each for block in exchanged for each in (*block.q, *block.full)], device)
        bad_gradients = _stack((bad for b in exchanged for bad in b.bad_gradients), device)
        bad = torch.cat([bad_gradients, bad_factors, ~squares.isfinite()[None]]).any()[None]
        return self._whole_norm(squares, bad)

    def _add_the_rest(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            for matrix in self._of(piece):
                if (error := self._errors.get(matrix)) is not None:
                    own = piece.grad.view(-1)[matrix.begin : matrix.end]
                    own += self._seen(error.to(own.device))

    def _warn_if_it_loses(self, seconds: float, plain_seconds: float | None) -> None:
        if plain_seconds is None:
            return
        self.lost = self.lost + 1 if plain_seconds < seconds else 0
        if self.lost == LOSSES:
            warn(
                f"compressing the gradients between machines takes {seconds:.3g} s, a plain mean "
                f"{plain_seconds:.3g} s: another run with compression_rank=0 would be faster here"
            )

    def _held(self, values: Tensor) -> Tensor:
        return SIGNED.pack(values) if self.packed else values

    def _seen(self, held: Tensor) -> Tensor:
        return SIGNED.unpack(held) if self.packed else held

    def _rounded(self, values: Tensor) -> Tensor:
        return self._seen(self._held(values))

    def _projection(self, matrix: Matrix) -> Tensor:
        if matrix not in self._projections:
            drawn = matrix.projection(self.seed).to(self._errors[matrix].device)
            self._projections[matrix] = self._held(drawn)
        return self._seen(self._projections[matrix])

    def _error(self, matrix: Matrix) -> Tensor:
        return self._seen(self._errors[matrix])

    def _add_to_errors(self, block: _Block) -> None:
        """E += G where G is finite."""
        for matrix, gradient in block.low:
            bad = ~_finite(gradient)
            total = torch.where(bad, 0.0, gradient)
            if (held := self._errors.get(matrix)) is not None and self.feedback:
                total = total + self._seen(held.to(total.device))
            block.bad_gradients.append(bad)
            block.bad_sums.append(~_finite(total))
            self._errors[matrix] = self._held(total)

    def _mean_factors(self, factors: Iterable[Tensor]) -> Work[tuple[list[Tensor], list[Tensor]]]:
        """The means of these over the machines, and whether this machine's were not finite."""
        mine = list(factors)
        bad = [~_finite(each) for each in mine]
        largest, scale = SIGNED.largest, SCALE if self.packed else 1.0
        mine = [torch.nan_to_num(each * scale, largest, largest, -largest) for each in mine]
        means = yield from self.wire.mean(mine, packed=self.packed)
        return [each / scale for each in means], bad

    def _subtract(self, matrix: Matrix, sent: Tensor, bad_factors: Tensor, bad_sum: Tensor) -> None:
        """E −= Ĝ, or what the rules say."""
        total = self._error(matrix)
        kept = torch.where(bad_sum, 0.0, total)
        self._errors[matrix] = self._held(torch.where(bad_factors, kept, total - sent))

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
        wire.any(torch.zeros(1, device=device_of(pieces)))  # or the time would hold the wait for the slowest
        began = _now()
        means = finished(wire.mean([piece.grad for piece in pieces]))
        return means, _now() - began

    def _cosine(self, low: Sequence[tuple[Matrix, Tensor]], true: Sequence[Tensor]) -> float | None:
        if not low:
            return None
        pairs = [(g.flatten(), t.flatten()[m.begin : m.end]) for (m, g), t in zip(low, true, strict=True)]
        sums = torch.stack([torch.stack([g @ t, g @ g, t @ t]) for g, t in pairs]).sum(0)
        if self.within is not None:
            dist.all_reduce(sums, group=self.within)
        product, reduced, wanted = sums.tolist()
        return product / math.sqrt(reduced * wanted) if reduced * wanted else None


def _now(exactly: bool = True) -> float:
    """The time; exactly, once a GPU is done with what it was given."""
    if exactly and torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _finite(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, math.inf).isfinite()


def _stack(flags: Iterable[Tensor], device: torch.device) -> Tensor:
    found = list(flags)
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.bool, device=device)


def _squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The sum of the squares of all numbers."""
    if not tensors:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(list(tensors))).square().sum()
