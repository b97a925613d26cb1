"""Where the arithmetic happens and in which type, decided by asking the device."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dalle.errors import ConfigError
from dalle.threads import using

Arithmetic = Literal["fp32", "bf16", "fp16"]  # of matrix products; weights are fp32 in each
Precision = Literal["auto", "fp32", "bf16", "fp16"]
WORTH = 1.5  # how much faster than in fp32 a CPU must be in bf16
SOUND_CUDNN = 92600  # the first version whose attention is right at every length
DTYPES: dict[Arithmetic, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def best_device() -> torch.device:
    """CUDA where there is one, set up; or the CPU."""
    return set_up(torch.device("cuda")) if torch.cuda.is_available() else torch.device("cpu")


def set_up(device: torch.device) -> torch.device:
    """The same device; on CUDA with convolutions in fp32 where they would take TF32 for it.

    And without cuDNN's attention where it reads beyond its memory (pytorch#169849) or gives NaN for gradients
    under a mask (pytorch#196678); there are other kernels.
    """
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        if (torch.backends.cudnn.version() or 0) < SOUND_CUDNN:
            torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def choose(precision: Precision, device: torch.device) -> Arithmetic:
    """Resolve `auto`, and refuse what the device cannot do.

    On a CPU the answer is measured, because torch reports bf16 support on machines that emulate it
    many times slower than fp32: 512³ products in both types on one thread, since sharing them out would
    hide the difference; a quarter of a second at worst. CPUs measured so far make them a third as fast in
    bf16 as in fp32, 2.1 and 4.5 times as fast; at 2.1 training is 1.4 to 1.7 times as fast: hence `WORTH`.
    """
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "bf16" and not able:
            raise ConfigError("precision=bf16: this GPU has no bf16 arithmetic; use precision=fp32")
        if precision != "auto":
            return precision
        return "bf16" if able else "fp32"
    if precision != "auto":
        return precision
    return "bf16" if WORTH * _seconds(torch.bfloat16) < _seconds(torch.float32) else "fp32"


def as_they_are(device: torch.device) -> AbstractContextManager[object]:
    """The context in which products have the types of their operands, whatever is around them.

    Where only shapes count there is no data, and no autocast of its device.
    """
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


def tiles() -> bool:
    """Whether this CPU has AMX, whose products of bf16 are fast at any shape."""
    ask = getattr(torch.cpu, "_is_amx_tile_supported", None)  # torch has no public question for it
    return ask is not None and bool(ask())


def rounding(device: torch.device) -> bool:
    """Whether matrix products are made in bf16 here, on a CPU."""
    autocast = device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return autocast and torch.get_autocast_dtype("cpu") == torch.bfloat16


def fp32_linear(
    x: Float[Tensor, "*n i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None = None
) -> Float[Tensor, "*n o"]:
    """A linear layer in fp32, whatever is around it.

    Only its gradients are products in bf16 where all others are so on a CPU: in fp32 those take more than
    twice as long, and have no use for the digits.
    """
    rounded = rounding(x.device) and torch.is_grad_enabled()
    with as_they_are(x.device):
        linear: Callable[..., Tensor] = _Fp32Linear.apply if rounded else F.linear
        return linear(x.float(), weight, bias)


class _Fp32Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (of_x, of_weight, of_bias) = ctx.saved_tensors, ctx.needs_input_grad
        grad = grads[0].flatten(0, -2)
        rounded = grad.bfloat16()
        return (
            (rounded @ weight.bfloat16()).float().view_as(x) if of_x else None,
            (rounded.t() @ x.flatten(0, -2).bfloat16()).float() if of_weight else None,
            grad.sum(0) if of_bias else None,
        )


def _seconds(dtype: torch.dtype) -> float:
    a = torch.ones(512, 512, dtype=dtype)
    with using(1):
        return best_seconds(lambda: a @ a, 3)


def best_seconds(work: Callable[[], object], tries: int) -> float:
    """Of so many tries: the first, before them, warms up, and the best of the rest is the least disturbed."""
    times = []
    for _ in range(1 + tries):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times[1:])


@contextmanager
def fp32_products(how: Literal["rounded", "ieee"]) -> Iterator[None]:
    """While it lasts, products of fp32 operands take these rounded, or as they are.

    Rounded is to TF32 on a GPU, to bf16 on a CPU with AMX; other CPUs leave them whole. Sums and results are
    fp32 either way. It holds for all threads of the process.
    """
    # By the older of torch's two switches, which sets the newer ones: whoever asks the older while only those
    # are set gets an error, and torch.compile asks. It leaves out convolutions.
    onednn: Any = torch.backends.mkldnn
    before = onednn.matmul.fp32_precision, onednn.conv.fp32_precision
    try:
        torch.set_float32_matmul_precision("medium" if how == "rounded" else "highest")
        onednn.conv.fp32_precision = "bf16" if how == "rounded" else "ieee"
        yield
    finally:
        torch.set_float32_matmul_precision({"tf32": "high", "bf16": "medium"}.get(before[0], "highest"))
        onednn.conv.fp32_precision = before[1]


def products(precision: Arithmetic, device: torch.device) -> AbstractContextManager[None]:
    """The context of what is computed beside 16-bit products, backward passes included.

    There the products of fp32 operands may round these: at full length a CPU with AMX would take twice as
    long for the heads, a GPU ten times and more. Not beside fp16 on a CPU, which is there for tests.
    """
    rounded = precision == "bf16" or (precision == "fp16" and device.type == "cuda")
    return fp32_products("rounded") if rounded else nullcontext()


@contextmanager
def arithmetic(precision: Arithmetic, device: torch.device) -> Iterator[None]:
    """The context in which forward passes run: matrix products in 16 bits, the rest and all weights fp32."""
    # A pass uses each weight once. A cache of their casts would hold all of them to its end, which at twelve
    # billion parameters is 24 GB.
    half = precision != "fp32"
    cast = torch.autocast(device.type, DTYPES[precision], cache_enabled=False) if half else nullcontext()
    with products(precision, device), cast:
        yield
