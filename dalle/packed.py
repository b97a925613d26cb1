"""AdamW that keeps the moments of large matrices, and on demand the matrices too, in 16 bits."""

import math
import zlib
from collections.abc import Collection
from typing import Any

import torch
from jaxtyping import Float16, Float32
from torch import Tensor, nn

from dalle.minifloat import SIGNED, UNSIGNED
from dalle.optim import AdamW, full_shape, make_room
from dalle.piece import gradient_of

# Numbers unpacked at a time. On a CPU they stay in the cache from unpacking to packing, a GPU wants work.
CHUNK = {"cpu": 2**16, "cuda": 2**24}
SMALL = 8192  # tensors of fewer numbers keep fp32 moments


class PackedAdamW(AdamW):
    """`AdamW` with running means in 1-6-9 and running variances in 0-6-10 where that pays.

    The moments are unpacked to fp32, updated by the same fused kernel and packed again, a chunk at a time:
    four bytes a parameter instead of eight. Gains, biases and what else is not in `matrices` keep fp32
    moments, and so does whatever has fewer than `SMALL` numbers. All parameters of a group have moments of
    one kind, so that an engine may join and cut the parameters of a group.

    With `halved` these matrices themselves are held in fp16 and nowhere else: 2 + 2 + 2 bytes a parameter. An
    update is computed in fp32 and rounded to one of the two neighbours in fp16 at random, the nearer the
    likelier: one that is far smaller than the distance between neighbours would otherwise be lost.

    Args:
        model: whose parameters are trained.
        matrices: names of the parameters whose moments may be packed.
        halved: hold them in fp16. Their gradients are then gathered by `dalle.boundary`.

    Source: paper, §3 and App. D; the limit of 8,192 is openai/blocksparse's.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        matrices: Collection[str],
        halved: bool = False,
        betas: tuple[float, float],
        weight_decay: float,
        variance_limit: float | None = None,
    ) -> None:
        super().__init__(model, betas=betas, weight_decay=weight_decay, variance_limit=variance_limit)
        large = {
            name: p
            for name, p in model.named_parameters()
            if name in matrices
            and p.requires_grad
            and math.prod(full_shape(p)) >= SMALL
            and p.is_contiguous()
        }
        self.packed = frozenset(large)
        chosen = set(map(id, large.values()))
        for group in self.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in chosen]
        for p in large.values() if halved else ():
            p.data = p.data.half()
        if large:
            self.add_param_group({"params": list(large.values()), "packed": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """See `AdamW.step`."""
        with self.groups("packed", False):
            loss = super().step(closure)
        with self.groups("packed") as groups:
            for group in [] if self.skip else groups:
                for p in group["params"]:
                    if (grad := gradient_of(p)) is not None:
                        self._update(p, grad, group)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, those of matrices in fp16 too."""
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for p in group["params"]:
                p.main_grad = None

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            for kind in ("exp_avg", "exp_avg_sq"):
                state[kind] = torch.zeros_like(p, dtype=torch.uint16)
        state["step"] += 1
        (beta1, beta2), limit = group["betas"], self.variance_limit
        noise = None
        if p.dtype == torch.float16:  # the same noise in every process, and in a run that was resumed
            key = zlib.crc32(f"{self.names[id(p)]}/{self.number}".encode())
            noise = torch.Generator(p.device).manual_seed(key)
        parts = (
            t.view(-1).split(CHUNK[p.device.type]) for t in (p, grad, state["exp_avg"], state["exp_avg_sq"])
        )
        for weights, gradient, means, variances in zip(*parts, strict=True):
            mean, variance = SIGNED.unpack(means), UNSIGNED.unpack(variances)
            if limit is not None and self.grad_norm**2 > limit:
                make_room(variance, gradient, beta2, limit)
            wide = weights.float()  # itself where it is fp32
            torch._fused_adamw_(
                [wide], [gradient], [mean], [variance], [], [state["step"]],
                lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"],
                eps=group["eps"], amsgrad=False, maximize=False,
            )  # fmt: skip
            if noise is not None:
                weights.copy_(rounded_at_random(wide, noise))
            means.copy_(SIGNED.pack(mean))
            variances.copy_(UNSIGNED.pack(variance))


def rounded_at_random(values: Float32[Tensor, "*n"], noise: torch.Generator) -> Float16[Tensor, "*n"]:
    """One of each value's two neighbours in fp16, such that the mean is the value; what fp16 has stays."""
    exponent = (values.view(torch.int32) >> 23) & 0xFF
    exponent.clamp_(127 - 14)  # below, neighbours keep their distance
    distance = ((exponent - 10) << 23).view(torch.float32)
    # fp32 has 13 bits more: with as many bits of noise the sum is exact.
    up = torch.randint(2**13, values.shape, generator=noise, device=values.device).to(values) / 2**13
    return ((values / distance + up).floor_() * distance).clamp_(-65504.0, 65504.0).half()
