"""Linear layers as drawing uses them: weights laid out once so that a few rows pass through them fast.

For a few rows a product takes as long as reading its weights. Which layout is read fastest depends on the
machine, the shape and the rows, so it is tried; the candidates of one kind of weights are the same numbers
and differ in the order of their sums alone. Their modules keep to what TorchScript compiles (see
`stage2_prior.step.Step`).
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, no_type_check

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.errors import ConfigError
from dalle.precision import Arithmetic

# fp32    as they are
# fp16    rounded to 16 bits, every product and sum in fp32; on CPUs
# bf16    weights and inputs in bf16, sums in fp32
# int8    rounded to 8 bits, with a scale for every output; inputs in bf16; on CPUs. With AMX keys and values
#         are bf16
# int4    rounded to 4 bits, with a scale and an offset for every 32 inputs of an output; otherwise like int8
# auto    on a GPU bf16 where it computes in it; on a CPU fp16 where no weight changes by it, otherwise fp32:
#         their forms differ by the order of sums in fp32 alone, which has changed no picture so far
Weights = Literal["auto", "fp32", "fp16", "bf16", "int8", "int4"]
ROUNDED = ("bf16", "int8", "int4")  # anew for drawing, whatever was saved; their inputs are in bf16
Form = Callable[[Tensor, Tensor, int], nn.Module]  # of weight and bias, for so many rows
ROUNDS = 5  # of a trial; the best one of each candidate counts
MARGIN = 0.95  # a later candidate must be at least so much faster than the ones before it
LEAST = 1e-30  # step of what is rounded, where all of it is 0
GROUP = 32  # inputs that share a scale and an offset in int4


def resolve(weights: Weights, precision: Arithmetic, linears: Sequence[nn.Linear]) -> Weights:
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


def fastest(
    linears: Sequence[nn.Linear], weights: Weights, rows: int, times: tuple[float, float] = (1.0, 1.0)
) -> list[nn.Module]:
    """Linear layers of one shape in the form that is fastest for so many rows.

    They are tried one after another, as drawing does it: what fits into a cache then does so here.

    Args:
        times: factors of the weights and of the biases.

    Raises:
        ConfigError: the machine has no such form.
    """
    device = linears[0].weight.device
    x = torch.zeros(rows, linears[0].in_features, device=device)
    candidates: list[list[nn.Module]] = []
    refused = "no such form"
    for form in _forms(weights, device):
        try:
            candidate = [form(*_scaled(linear, times), rows) for linear in linears]
            candidate[0](x)
            candidates.append(candidate)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError, AttributeError) as error:  # not on this machine
            refused = str(error).partition("\n")[0]
    if not candidates:
        raise ConfigError(f"weights={weights} does not work on this machine ({refused}); use fp32")
    if len(candidates) == 1:
        return candidates[0]
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


def _scaled(linear: nn.Linear, times: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Weight and bias in fp32; not copied where they are so already."""
    weight, bias = linear.weight.detach().float(), linear.bias.detach()
    return (weight, bias) if times == (1, 1) else (weight * times[0], bias * times[1])


def _forms(weights: Weights, device: torch.device) -> list[Form]:
    """The candidates for these weights; the first ones are the simplest."""
    cpu = device.type == "cpu"
    match weights:
        case "fp16":
            widened = [_rounded(form) for form in _forms("fp32", device)]  # best for what fits into a cache
            return [_PackedFp16, *widened] if _has_fbgemm() else widened
        case "int8":
            return [_int8]
        case "int4":
            return [_int4]
        case "bf16":
            # Not tried: among products alone rows seem faster for some shapes, and are not in whole steps.
            return [partial(_InBf16, _Blocked if cpu and _has_onednn_bf16() else _ByRows)]
        case _:
            return [_ByRows, _ByColumns, _InParts, _Blocked] if cpu else [_ByRows]


def _has_fbgemm() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines


def _has_onednn_bf16() -> bool:
    ops: Any = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and bool(ops._is_mkldnn_bf16_supported())


@no_type_check
class _ByRows(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor, rows: int) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@no_type_check
class _ByColumns(nn.Module):
    """Inputs × outputs: a row of the table is added to all outputs for each input."""

    def __init__(self, weight: Tensor, bias: Tensor, rows: int) -> None:
        super().__init__()
        self.table, self.bias = weight.t().contiguous(), bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.table)


@no_type_check
class _InParts(nn.Module):
    """A table of some outputs for every thread: BLAS itself leaves the product of one row to one thread."""

    def __init__(self, weight: Tensor, bias: Tensor, rows: int) -> None:
        super().__init__()
        self.parts = torch.get_num_threads()
        self.tables = weight.unflatten(0, (self.parts, -1)).transpose(1, 2).contiguous()
        self.biases = bias.view(self.parts, 1, -1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.baddbmm(self.biases, x.expand(self.parts, -1, -1), self.tables)
        return y.transpose(0, 1).reshape(len(x), -1)


@no_type_check
class _Blocked(nn.Module):
    """In oneDNN's blocks for so many rows."""

    def __init__(self, weight: Tensor, bias: Tensor, rows: int) -> None:
        super().__init__()
        ops: Any = torch.ops.mkldnn
        self.blocks, self.bias = ops._reorder_linear_weight(weight, rows), bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.blocks, self.bias, "none", [], "")
        return y


@no_type_check
class _PackedFp16(nn.Module):
    """fp16 in memory, widened on the way into fp32 products."""

    def __init__(self, weight: Tensor, bias: Tensor, rows: int) -> None:
        super().__init__()
        ops: Any = torch.ops.quantized
        self.packed = ops.linear_prepack_fp16(weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
        return y


@no_type_check
class _InBf16(nn.Module):
    """A form whose inputs are in bf16."""

    def __init__(self, form: Form, weight: Tensor, bias: Tensor, rows: int) -> None:
        super().__init__()
        self.form = form(weight.bfloat16(), bias.bfloat16(), rows)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.form(x.to(torch.bfloat16))
        return y


@no_type_check
class _Int8(nn.Module):
    """The steps stay 8 bits wide in memory."""

    def __init__(self, steps: Tensor, scale: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.steps, self.scale, self.bias = steps, scale, bias

    def forward(self, x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x.to(torch.bfloat16), self.steps, self.scale).add_(self.bias)


@no_type_check
class _Int4(nn.Module):
    def __init__(self, packed: Tensor, units: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.packed, self.units, self.bias = packed, units, bias
        self.group = GROUP

    def forward(self, x: Tensor) -> Tensor:
        y = torch._weight_int4pack_mm_for_cpu(x.to(torch.bfloat16), self.packed, self.group, self.units)
        return y.add_(self.bias)


def _rounded(form: Form) -> Form:
    """The values of fp16 weights in fp32, widened once."""
    return lambda weight, bias, rows: form(_fp16(weight), bias, rows)


def _fp16(weight: Tensor) -> Tensor:
    return weight.half().to(weight.dtype)


def _int8(weight: Tensor, bias: Tensor, rows: int) -> nn.Module:
    """127 steps either way, with a scale for every output; the kernel is for whole blocks only."""
    scale = (weight.abs().amax(1) / 127).clamp_min(LEAST).bfloat16()
    steps = (weight / scale.float()[:, None]).round().clamp(-127, 127)
    if any(size % 16 for size in weight.shape):
        return _InBf16(_ByRows, steps * scale.float()[:, None], bias, rows)
    return _Int8(steps.to(torch.int8), scale, bias.bfloat16())


def _int4(weight: Tensor, bias: Tensor, rows: int) -> nn.Module:
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
    return _Int4(packed, units, bias.bfloat16())
