"""Linear layers as drawing uses them: weights laid out once so that a few rows pass through them fast.

For a few rows a product takes as long as reading its weights. Which layout is read fastest depends on the
machine, the shape and the rows, so it is tried; the candidates of one kind of weights are the same numbers
and differ in the order of their sums alone.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.errors import ConfigError

# fp32    as they are
# fp16    rounded to 16 bits, every product and sum in fp32; on CPUs
# bf16    weights and inputs in bf16, sums in fp32
# int8    rounded to 8 bits, with a scale for every output; inputs in bf16; on CPUs. Keys and values are bf16
#         on those that compute in it
# int4    rounded to 4 bits, with a scale and an offset for every 32 inputs of an output; otherwise like int8
# auto    on a GPU bf16 where it computes in it; on a CPU fp16 where no weight changes by it, otherwise fp32:
#         what is drawn then depends neither on a trial nor on how many pictures are drawn together
Weights = Literal["auto", "fp32", "fp16", "bf16", "int8", "int4"]
ROUNDED = ("bf16", "int8", "int4")  # anew for drawing, whatever was saved; their inputs are in bf16
Fast = Callable[[Tensor], Tensor]  # rows of inputs to rows of outputs
ROUNDS = 5  # of a trial; the best one of each candidate counts
MARGIN = 0.95  # a later candidate must be at least so much faster than the ones before it
LEAST = 1e-30  # step of what is rounded, where all of it is 0
GROUP = 32  # inputs that share a scale and an offset in int4


def resolve(weights: Weights, precision: Literal["fp32", "bf16"], linears: Sequence[nn.Linear]) -> Weights:
    """What `auto` stands for.

    Raises:
        ConfigError: the device has no such form.
    """
    cpu = linears[0].weight.device.type == "cpu"
    if weights in ("fp16", "int8", "int4") and not cpu:
        raise ConfigError(f"weights={weights} is a form for CPUs; on a GPU use bf16 or fp32")
    if weights != "auto":
        return weights
    if not cpu:
        return "bf16" if precision == "bf16" else "fp32"
    return "fp16" if all(torch.equal(_fp16(x.weight), x.weight) for x in linears) else "fp32"


def fastest(linears: Sequence[nn.Linear], weights: Weights, rows: int) -> list[Fast]:
    """Linear layers of one shape in the form that is fastest for so many rows.

    They are tried one after another, as drawing does it: what fits into a cache then does so here.
    """
    device = linears[0].weight.device
    candidates: list[list[Fast]] = []
    for form in _forms(weights, device):
        with suppress(RuntimeError, NotImplementedError, AttributeError):  # not on this machine
            candidate = [form(x.weight.detach().float(), x.bias.detach(), rows) for x in linears]
            candidate[0](torch.zeros(rows, linears[0].in_features, device=device))
            candidates.append(candidate)
    if len(candidates) == 1:
        return candidates[0]
    x = torch.zeros(rows, linears[0].in_features, device=device)
    seconds = [float("inf")] * len(candidates)
    for _ in range(ROUNDS):
        for i, candidate in enumerate(candidates):
            began = time.perf_counter()
            for linear in candidate:
                linear(x)
            seconds[i] = min(seconds[i], time.perf_counter() - began)
    best = 0
    for i in range(1, len(seconds)):
        best = i if seconds[i] < MARGIN * seconds[best] else best
    return candidates[best]


def _forms(weights: Weights, device: torch.device) -> list[Callable[[Tensor, Tensor, int], Fast]]:
    """The candidates for these weights; the first ones are the simplest."""
    cpu = device.type == "cpu"
    match weights:
        case "fp16":
            widened = [_rounded(form) for form in _forms("fp32", device)]  # best for what fits into a cache
            return [_packed_fp16, *widened] if _has_fbgemm() else widened
        case "int8":
            return [_int8]
        case "int4":
            return [_int4]
        case "bf16":
            # Not tried: among products alone rows seem faster for some shapes, and are not in whole steps.
            return [_blocked_bf16] if cpu and _has_onednn_bf16() else [_by_rows_bf16]
        case _:
            return [_by_rows, _by_columns, _in_parts, _blocked] if cpu else [_by_rows]


def _has_fbgemm() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines


def _has_onednn_bf16() -> bool:
    ops: Any = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and bool(ops._is_mkldnn_bf16_supported())


def _fp16(weight: Tensor) -> Tensor:
    return weight.half().to(weight.dtype)


def _by_rows(weight: Tensor, bias: Tensor, rows: int) -> Fast:
    return lambda x: F.linear(x, weight, bias)


def _by_columns(weight: Tensor, bias: Tensor, rows: int) -> Fast:
    """Inputs × outputs: a row of the table is added to all outputs for each input."""
    table = weight.t().contiguous()
    return lambda x: torch.addmm(bias, x, table)


def _in_parts(weight: Tensor, bias: Tensor, rows: int) -> Fast:
    """A table of some outputs for every thread: BLAS itself leaves the product of one row to one thread."""
    parts = torch.get_num_threads()
    tables = weight.unflatten(0, (parts, -1)).transpose(1, 2).contiguous()
    biases = bias.view(parts, 1, -1)
    return lambda x: (
        torch.baddbmm(biases, x.expand(parts, -1, -1), tables).transpose(0, 1).reshape(len(x), -1)
    )


def _blocked(weight: Tensor, bias: Tensor, rows: int) -> Fast:
    """In oneDNN's blocks for so many rows."""
    ops: Any = torch.ops.mkldnn
    blocks = ops._reorder_linear_weight(weight, rows)
    return lambda x: ops._linear_pointwise(x, blocks, bias, "none", [], "")


def _rounded(form: Callable[[Tensor, Tensor, int], Fast]) -> Callable[[Tensor, Tensor, int], Fast]:
    """The values of fp16 weights in fp32, widened once."""
    return lambda weight, bias, rows: form(_fp16(weight), bias, rows)


def _packed_fp16(weight: Tensor, bias: Tensor, rows: int) -> Fast:
    """fp16 in memory, widened on the way into fp32 products."""
    ops: Any = torch.ops.quantized
    packed = ops.linear_prepack_fp16(weight, bias)
    return lambda x: ops.linear_dynamic_fp16(x, packed)


def _by_rows_bf16(weight: Tensor, bias: Tensor, rows: int) -> Fast:
    return _in_bf16(_by_rows(weight.bfloat16(), bias.bfloat16(), rows))


def _blocked_bf16(weight: Tensor, bias: Tensor, rows: int) -> Fast:
    return _in_bf16(_blocked(weight.bfloat16(), bias.bfloat16(), rows))


def _in_bf16(linear: Fast) -> Fast:
    return lambda x: linear(x.bfloat16())


def _int8(weight: Tensor, bias: Tensor, rows: int) -> Fast:
    """The steps stay 8 bits wide in memory; the kernel is for whole blocks only."""
    scale = (weight.abs().amax(1) / 127).clamp_min(LEAST).bfloat16()
    steps = (weight / scale.float()[:, None]).round().clamp(-127, 127)
    if any(size % 16 for size in weight.shape):
        return _by_rows_bf16(steps * scale.float()[:, None], bias, rows)
    steps, bias = steps.to(torch.int8), bias.bfloat16()
    return lambda x: torch._weight_int8pack_mm(x.bfloat16(), steps, scale).add_(bias)


def _int4(weight: Tensor, bias: Tensor, rows: int) -> Fast:
    """Sixteen steps from the least to the largest weight of a group; the kernel is for whole blocks only."""
    if weight.shape[0] % 16 or weight.shape[1] % GROUP:
        return _int8(weight, bias, rows)
    groups = weight.unflatten(1, (-1, GROUP))
    least, most = groups.aminmax(dim=2)
    scale = ((most - least) / 15).clamp_min(LEAST).bfloat16()
    middle = (least + 8 * scale.float()).bfloat16()  # the value of step 8
    steps = ((groups - middle.float()[..., None]) / scale.float()[..., None] + 8).round().clamp(0, 15)
    packed = torch._convert_weight_to_int4pack_for_cpu(steps.flatten(1).to(torch.int32), 1)
    units = torch.stack([scale, middle], 2).transpose(0, 1).contiguous()
    bias = bias.bfloat16()
    return lambda x: torch._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, GROUP, units).add_(bias)
