"""What one update does to a model: gradients, clipping, AdamW, the averaged weights.

`Engine` is plain PyTorch: one process, or several that hold the whole model each and average their
gradients. `dalle.zero` partitions it. The loop and the stages know only the public methods here.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle.buckets import Buckets, average_gradients
from dalle.distributed import ALONE, Part, Topology
from dalle.errors import DalleError
from dalle.muon import Muon
from dalle.optim import AdamW, Average, full_shape
from dalle.overlap import Work
from dalle.piece import Piece, gradient_of
from dalle.powersgd import PowerSGD
from dalle.precision import Arithmetic, arithmetic, products
from dalle.scaling import REST, Scaling

R = TypeVar("R")

PATIENCE = 20  # updates in a row that may be dropped for a non-finite gradient before the run stops
PATIENCE_WITH_SCALES = 4 * REST  # the same while the gradient scales can still shrink: to a quarter by then
MOMENTUM_KEY = "/momentum"  # after the name of a parameter, in training states


@runtime_checkable
class Saved(Protocol):
    """A training state to load from; every process reads the same tensors in the same order."""

    def names(self, file: str) -> set[str]:
        """The tensors in this file; none if there is no such file."""

    def read(self, file: str, name: str) -> Tensor:
        """One of them, whole."""


class Engine:
    """The whole model in every process.

    Args:
        topology: the processes whose gradients are averaged.
        compression: averages the gradients of machines, where `topology.shards` is one of them.
        muon: makes the steps of the matrices that the optimizer leaves plain.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: AdamW,
        average: Average,
        *,
        clip: float | None,
        precision: Arithmetic,
        scaling: Scaling | None = None,
        topology: Topology = ALONE,
        compression: PowerSGD | None = None,
        muon: Muon | None = None,
    ) -> None:
        self.model, self.optimizer, self.average = model, optimizer, average
        self.clip, self.precision, self.scaling = clip, precision, scaling
        self.topology, self.compression, self.muon = topology, compression, muon
        self.named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.parameters: list[Tensor] = list(self.named.values())
        self._names = {p: name for name, p in self.named.items()}
        self.device = self.parameters[0].device
        self.dropped = 0  # updates dropped in a row
        self.passes = 0  # backward passes since the last update
        self.buckets = self._make_buckets()
        if self.buckets is not None:
            self._begin_alike()

    def arithmetic(self) -> AbstractContextManager[object]:
        """The context for forward passes."""
        return arithmetic(self.precision, self.device)

    def run(self, function: Callable[..., R], *arguments: object) -> R:
        """Call a function that runs the model. Every process must call it equally often."""
        with self.arithmetic():
            return function(*arguments)

    def backward(self, loss: Tensor, micro_batches: int) -> None:
        """Add the gradient of one of `micro_batches` micro-batches; their losses are averaged."""
        self.passes += 1
        if self.buckets is not None and self.passes == micro_batches:
            self.buckets.expect()
        with products(self.precision, self.device):
            (loss / micro_batches).backward()

    def pieces(self) -> list[Piece]:
        """The gradient of an update, in fp32, between its last `backward` and `update`."""
        return self._pieces_of(list(self.named.values()))

    def _pieces_of(self, parameters: Sequence[nn.Parameter]) -> list[Piece]:
        return [
            Piece(self._names[p], p, gradient, 0)
            for p in parameters
            if (gradient := gradient_of(p)) is not None
        ]

    def update(self, lr: float, step: int) -> dict[str, float]:
        """Apply the gathered gradient as update number `step` (counted from 1).

        Returns what to log: the gradient's norm before clipping, the updates dropped in a row, and what
        compression tells. An update with a non-finite gradient is dropped: weights and moments stay as they
        are.

        Raises:
            DalleError: the gradient was non-finite `PATIENCE` times in a row, or `PATIENCE_WITH_SCALES` times
                while smaller gradient scales might have mended it.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.buckets is not None:
            self.buckets.finish()
        self.passes = 0
        pieces = self.pieces()
        gradients = [piece.grad for piece in pieces]
        overflowed = self.scaling is not None and self.scaling.update((p.name, p.grad) for p in pieces)
        receipt = self.compression.reduce(pieces, step) if self.compression is not None else None
        grad_norm = receipt.norm if receipt is not None else self._norm(gradients)
        finite = math.isfinite(grad_norm) and not overflowed
        if finite:
            self.dropped = 0
            if self.compression is not None:
                self.compression.applied()
            if self.clip is not None and (factor := self.clip / (grad_norm + 1e-6)) < 1:
                torch._foreach_mul_(gradients, factor)
            self.optimizer.number = step
            self.optimizer.grad_norm = grad_norm if self.clip is None else min(grad_norm, self.clip)
            if self.muon is not None:
                self.muon.turn(pieces)
        else:
            self.dropped += 1
            mendable = self.scaling is not None and overflowed and self.scaling.mendable
            if self.dropped >= (PATIENCE_WITH_SCALES if mendable else PATIENCE):
                raise DalleError(self._diagnosis(pieces))
        del pieces, gradients
        self._step(finite)
        self.average.update(self.weights(), step)
        told = receipt.metrics() if receipt is not None else {}
        return {"grad_norm": grad_norm, "dropped_updates": float(self.dropped), **told}

    def weights(self) -> list[Tensor]:
        """What this process holds of the weights, in fp32."""
        return self.parameters

    def _make_buckets(self) -> Buckets | None:
        return Buckets(list(self.named.values()), self._exchange) if self.topology.world > 1 else None

    @torch.no_grad()
    def _begin_alike(self) -> None:
        """Process 0's weights for all: what each finds in data by itself may differ in the last bits."""
        for p in self.model.parameters():
            p.copy_(self.topology.broadcast(p.detach().cpu().contiguous()))
        for average, weight in zip(self.average.weights, self.parameters, strict=True):
            average.copy_(weight)

    def _exchange(self, parameters: Sequence[nn.Parameter]) -> Work[None]:
        """Average some gradients within a machine, and begin with their means over the machines."""
        if dist.get_world_size(self.topology.shards) > 1:
            yield from average_gradients(parameters, self.topology.shards)
        if self.compression is not None and self.compression.early:
            yield from self.compression.exchange(self._pieces_of(parameters))

    def _norm(self, gradients: list[Tensor]) -> float:
        return torch.nn.utils.get_total_norm(gradients).item()

    def _step(self, apply: bool) -> None:
        if apply:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _diagnosis(self, pieces: list[Piece]) -> str:
        mine = [piece.name for piece in pieces if not piece.grad.isfinite().all()]
        anywhere = {name for each in self.topology.gather(mine) for name in each}
        bad = [name for name in self.named if name in anywhere]
        where = f"first in {bad[0]} ({len(bad)} parameters in all)" if bad else "in its norm alone"
        if self.scaling is not None and not self.scaling.outside and self.scaling.overflowed:
            where += f", though smaller gradient scales were tried: {self.scaling.describe_overflow()}"
        precision = "" if self.precision == "fp32" else " or with --set precision=fp32"
        return (
            f"the gradient was not finite in {self.dropped} updates in a row, {where}: "
            f"start another --run with a lower step size (--set lr=…){precision}"
        )

    def per_resblock(self) -> dict[str, list[float]]:
        """What to log of every resblock; nothing where they have no gradient scales."""
        return {} if self.scaling is None else self.scaling.metrics()

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The model in evaluation mode with its averaged weights; the trained ones return after it."""
        trained = [p.detach().clone() for p in self.parameters]
        self._assign(self.average.weights)
        self.model.eval()
        try:
            with torch.inference_mode(), self.arithmetic():
                yield self.model
        finally:
            self.model.train()
            self._assign(trained)

    @torch.no_grad()
    def _assign(self, weights: list[Tensor]) -> None:
        for p, weight in zip(self.parameters, weights, strict=True):
            p.copy_(weight)  # one by one: of several types at a time torch below 2.11 garbles them on CUDA

    def state(self) -> dict[str, dict[str, Part]]:
        """All that resuming needs, as {file: {name: part}}; all processes name the same in the same order."""
        files = {
            "weights": {n: p.detach() for n, p in self.named.items()},
            "average": dict(zip(self.named, self.average.weights, strict=True)),
            "moments": self.optimizer.moments(),
            **self._scales(),
        }
        self._compare_machines()
        parts = {
            file: {name: self._whole(tensor) for name, tensor in group.items()}
            for file, group in files.items()
        }
        parts["moments"] |= self._momenta()
        return self._errors() | parts

    def _momenta(self) -> dict[str, Part]:
        """Muon's mean gradients, so far as this process holds them."""
        if self.muon is None:
            return {}
        parts = {}
        for name, shape in self.muon.shapes.items():
            offset, size = self._share_of(name) if self._tells() else (0, 0)
            momentum = self.muon.momenta.get(name)  # None before the first update that was not dropped
            values = torch.zeros(size) if momentum is None else momentum[:size]
            parts[name + MOMENTUM_KEY] = Part(shape, offset, values)
        return parts

    def _compare_machines(self) -> None:
        """Raises `DalleError` if the machines, which should hold the same weights, differ in a bit."""
        if self.compression is None:
            return
        if self.topology.any(not self.compression.wire.same(self._own_weights())):
            raise DalleError(
                "the machines no longer hold the same weights: one computes otherwise, by its hardware or "
                "its software; the state that was saved last is sound"
            )

    def _own_weights(self) -> list[Tensor]:
        return self.parameters

    def _errors(self) -> dict[str, dict[str, Part]]:
        """The error sums of compressed gradients, so far as this process holds them."""
        if self.compression is None or not self.compression.sums_matter:
            return {}
        held = self.compression.sums()
        empty = torch.empty(0, dtype=self.compression.dtype)
        tells = self._tells()
        parts = {"machines": self._whole(torch.tensor(self.compression.wire.machines))}
        for name in sorted(self.compression.matrices):
            offset, total = held[name] if tells and name in held else (0, empty)
            parts[name] = Part(full_shape(self.named[name]), offset, total)
        return {"errors": parts}

    def _tells(self) -> bool:
        return self.topology.main

    def _load_errors(self, saved: Saved) -> None:
        names = saved.names("errors")
        machines = int(saved.read("errors", "machines")) if names else 1
        for name in sorted(names - {"machines"}):
            tensor = saved.read("errors", name)
            if self.compression is not None and name in self.named:
                self.compression.load(
                    name, full_shape(self.named[name]), *self._share_of(name), tensor, machines
                )

    def _load_momenta(self, saved: Saved) -> None:
        if self.muon is None:
            return
        for name in self.muon.shapes:
            tensor = saved.read("moments", name + MOMENTUM_KEY).to(self.device)
            self.muon.load(name, *self._share_of(name), tensor)

    def _share_of(self, name: str) -> tuple[int, int]:
        """Where this process' share of a parameter's gradient begins, and its length."""
        return 0, self.named[name].numel()

    def _scales(self) -> dict[str, dict[str, Tensor]]:
        return {} if self.scaling is None else {"scaling": self.scaling.tensors()}

    def _whole(self, tensor: Tensor) -> Part:
        """A tensor that all processes hold: the first one gives it."""
        return Part(tuple(tensor.shape), 0, tensor if self.topology.main else tensor.new_empty(0))

    def load(self, saved: Saved) -> None:
        """Take back what `state` gave, whatever engine it was of."""
        for p, average, name in zip(self.parameters, self.average.weights, self.named, strict=True):
            p.detach().copy_(saved.read("weights", name))
            average.copy_(saved.read("average", name))
        names = sorted(name for name in saved.names("moments") if not name.endswith(MOMENTUM_KEY))
        self.optimizer.load_moments((name, saved.read("moments", name)) for name in names)
        self._load_momenta(saved)
        self._load_scales(saved)
        self._load_errors(saved)

    def _load_scales(self, saved: Saved) -> None:
        names = sorted(saved.names("scaling"))
        if self.scaling is not None and names:
            self.scaling.load({name: saved.read("scaling", name) for name in names})
