"""Where the arithmetic happens and in which type, decided by asking the device."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch

from dalle.errors import ConfigError
from dalle.threads import using

Arithmetic = Literal["fp32", "bf16", "fp16"]  # of matrix products; weights are fp32 in each
Precision = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES: dict[Arithmetic, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def best_device() -> torch.device:
    """CUDA where there is one, with convolutions in fp32 where they would take TF32 for it; or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda")


def choose(precision: Precision, device: torch.device) -> Arithmetic:
    """Resolve `auto`, and refuse what the device cannot do.

    On a CPU the answer is measured, because torch reports bf16 support on machines that emulate it
    many times slower than fp32: 512³ products in both types by one thread, as handing work over would
    hide how fast bf16 is; a quarter of a second at worst.
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
    return "bf16" if 2 * _seconds(torch.bfloat16) < _seconds(torch.float32) else "fp32"


def as_they_are(device: torch.device) -> AbstractContextManager[object]:
    """The context in which products have the types of their operands, whatever is around them.

    Where only shapes count there is no data, and no autocast of its device.
    """
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


def _seconds(dtype: torch.dtype) -> float:
    a = torch.ones(512, 512, dtype=dtype)
    times = []
    with using(1):
        for _ in range(4):  # the first one warms up; the best of the rest is the least disturbed
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
    return min(times[1:])


@contextmanager
def products(precision: Arithmetic, device: torch.device) -> Iterator[None]:
    """The context of everything that is computed beside the 16-bit products, backward passes included.

    With bf16 on a CPU, products of fp32 operands take these rounded to bf16; sums and results stay fp32.
    That is for such a CPU what TF32 is for a GPU: the heads cost half. It holds for all threads.
    """
    if precision != "bf16" or device.type != "cpu":
        yield
        return
    onednn: Any = torch.backends.mkldnn
    kinds = (onednn.matmul, onednn.conv)
    before = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "bf16"
        yield
    finally:
        for kind, was in zip(kinds, before, strict=True):
            kind.fp32_precision = was


@contextmanager
def arithmetic(precision: Arithmetic, device: torch.device) -> Iterator[None]:
    """The context in which forward passes run: matrix products in 16 bits, the rest and all weights fp32."""
    # A pass uses each weight once. A cache of their casts would hold all of them to its end, which at twelve
    # billion parameters is 24 GB.
    half = precision != "fp32"
    cast = torch.autocast(device.type, DTYPES[precision], cache_enabled=False) if half else nullcontext()
    with products(precision, device), cast:
        yield
