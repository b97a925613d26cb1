"""What one update does to a model: gradients, clipping, AdamW, the averaged weights.

The loop and the stages know only the methods used here. A distributed engine has the same ones.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from dalle.errors import DalleError
from dalle.optim import AdamW, Average
from dalle.precision import Arithmetic, arithmetic
from dalle.scaling import REST, Scaling

PATIENCE = 20  # updates in a row that may be dropped for a non-finite gradient before the run stops
PATIENCE_WITH_SCALES = 4 * REST  # the same while the gradient scales can still shrink: to a quarter by then


class Engine:
    """One process, one device."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: AdamW,
        average: Average,
        *,
        clip: float | None,
        precision: Arithmetic,
        scaling: Scaling | None = None,
    ) -> None:
        self.model, self.optimizer, self.average = model, optimizer, average
        self.clip, self.precision, self.scaling = clip, precision, scaling
        self.parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.dropped = 0  # updates dropped in a row

    def arithmetic(self) -> AbstractContextManager[object]:
        """The context for forward passes."""
        return arithmetic(self.precision, self.device)

    def backward(self, loss: Tensor, micro_batches: int) -> None:
        """Add the gradient of one of `micro_batches` micro-batches; their losses are averaged."""
        (loss / micro_batches).backward()

    def pieces(self) -> list[tuple[str, Tensor]]:
        """Names of parameters with what this process holds of their gathered gradients."""
        return [(n, p.grad) for n, p in self.model.named_parameters() if p.grad is not None]

    def update(self, lr: float, step: int) -> dict[str, float]:
        """Apply the gathered gradient as update number `step` (counted from 1).

        Returns the gradient's norm before clipping. An update with a non-finite gradient is dropped:
        weights and moments stay as they are.

        Raises:
            DalleError: the gradient was non-finite `PATIENCE` times in a row, or `PATIENCE_WITH_SCALES` times
                while smaller gradient scales might have mended it.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        overflowed = self.scaling is not None and self.scaling.update(self.pieces())
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        grad_norm = norm.item()
        if math.isfinite(grad_norm) and not overflowed:
            self.dropped = 0
            if self.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
            self.optimizer.limit_variance(grad_norm if self.clip is None else min(grad_norm, self.clip))
            self.optimizer.step()
        else:
            self.dropped += 1
            mendable = self.scaling is not None and overflowed and self.scaling.mendable
            if self.dropped >= (PATIENCE_WITH_SCALES if mendable else PATIENCE):
                raise DalleError(self._diagnosis())
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(self.parameters, step)
        return {"grad_norm": grad_norm, "dropped_updates": float(self.dropped)}

    def _diagnosis(self) -> str:
        bad = [
            name
            for name, p in self.model.named_parameters()
            if p.grad is not None and not p.grad.isfinite().all()
        ]
        where = f"first in {bad[0]} ({len(bad)} parameters in all)" if bad else "in its norm alone"
        if self.scaling is not None and self.scaling.overflowed:
            where += f", though smaller gradient scales were tried: {self.scaling.describe_overflow()}"
        precision = "" if self.precision == "fp32" else " or use --set precision=fp32"
        return (
            f"the gradient was not finite in {self.dropped} updates in a row, {where}: "
            f"lower the step size (--set lr=…){precision}"
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
            with torch.inference_mode(), arithmetic(self.precision, self.device):
                yield self.model
        finally:
            self.model.train()
            self._assign(trained)

    @torch.no_grad()
    def _assign(self, weights: list[Tensor]) -> None:
        torch._foreach_copy_(self.parameters, weights)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that resuming needs, as {file: {name: tensor}}."""
        names = [n for n, p in self.model.named_parameters() if p.requires_grad]
        return {
            "weights": {n: p.detach() for n, p in zip(names, self.parameters, strict=True)},
            "average": dict(zip(names, self.average.weights, strict=True)),
            "moments": self.optimizer.moments(),
            **({} if self.scaling is None else {"scaling": self.scaling.tensors()}),
        }

    def load(self, saved: dict[str, dict[str, Tensor]]) -> None:
        """Take back what `tensors` gave."""
        names = [n for n, p in self.model.named_parameters() if p.requires_grad]
        self._assign([saved["weights"][n].to(self.device) for n in names])
        torch._foreach_copy_(self.average.weights, [saved["average"][n].to(self.device) for n in names])
        self.optimizer.load_moments(saved["moments"])
        if self.scaling is not None and "scaling" in saved:
            self.scaling.load(saved["scaling"])
