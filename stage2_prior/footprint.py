"""How much memory a training step of the prior takes, found without taking it.

The step itself runs on tensors without data, and what it holds at any time is added up. So the answer is that
of the code as it stands, for any device and any size of the model.
"""

import itertools
import weakref
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dalle.boundary import Boundary, enclose
from dalle.piece import gradient_of
from dalle.precision import Arithmetic, arithmetic
from stage2_prior.code_vectors import WIDENING
from stage2_prior.config import Backend, PriorConfig
from stage2_prior.flops import LAYER
from stage2_prior.loss import AT_ONCE, cross_entropy
from stage2_prior.model import Prior

SHALLOW, DEEP = 4, 8  # layers that are tried where a model has more: the masks repeat after four


@dataclass(frozen=True)
class Footprint:
    """Bytes at the worst moment of forward and backward pass, beside the weights.

    Args:
        partitioned: where each gradient leaves as soon as it is made (ZeRO 2 and 3).
        whole: where the gradients of all parameters stay until the update.
    """

    partitioned: int
    whole: int


class _Held(TorchDispatchMode):
    """Adds up the tensors that are alive, and apart from them the gradients of parameters."""

    def __init__(self, before: list[Tensor]) -> None:
        super().__init__()
        self.alive: set[int] = set()
        self.now = self.gradients = self.whole = self.partitioned = 0
        for tensor in before:
            self._take(tensor)
        self.before, self.whole, self.partitioned = self.now, 0, 0

    def leaves(self, parameter: Tensor) -> None:
        """The gradient of this parameter is complete."""
        gradient = gradient_of(parameter)
        assert gradient is not None
        self.gradients += gradient.nbytes

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._take(leaf)
        return result

    def _take(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            self.now += size
            self.whole = max(self.whole, self.now)
            self.partitioned = max(self.partitioned, self.now - self.gradients)
            weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


class _Fused(TorchFunctionMode):
    """Attention in one kernel, as on every real device; without data torch would write all scores out."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        mask = torch.zeros(kwargs["attn_mask"].shape, dtype=args[0].dtype)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, attn_mask=mask)[0]


@cache
def footprint(
    config: PriorConfig,
    batch: int,
    recompute: bool,
    precision: Arithmetic = "fp32",
    attention: Backend = "auto",
    halved: bool = False,
) -> Footprint:
    """Of one forward and backward pass over `batch` pictures whose captions fill all text slots.

    Logits are made as on a GPU. `auto` is taken for the block form, which holds most: it keeps what its
    queries attend to. FlexAttention keeps what the dense form does. With `halved` the
    resblocks' matrices are fp16.
    """
    if config.depth <= DEEP:
        return _try(config, batch, recompute, precision, attention, halved)
    few, more = (
        _try(replace(config, depth=depth), batch, recompute, precision, attention, halved)
        for depth in (SHALLOW, DEEP)
    )
    layers = (config.depth - DEEP) / (DEEP - SHALLOW)
    return Footprint(
        round(more.partitioned + (more.partitioned - few.partitioned) * layers),
        round(more.whole + (more.whole - few.whole) * layers),
    )


def _try(
    config: PriorConfig,
    batch: int,
    recompute: bool,
    precision: Arithmetic,
    attention: Backend,
    halved: bool,
) -> Footprint:
    with torch.device("meta"):
        model = Prior(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        model.recompute = recompute
        model.attend_by("block" if attention in ("auto", "block") else "dense")
        if precision == "fp16":
            boundary = Boundary(torch.ones(()), torch.float16)
            for module in itertools.chain(*model.resblocks().values()):
                enclose(module, boundary)
        for name in model.matrices() if halved else ():
            p = model.get_parameter(name)
            p.data = p.data.half()
        tokens = torch.zeros(batch, config.text_length - 1, dtype=torch.long)
        codes = torch.zeros(batch, config.cells, dtype=torch.long)
        with _Held([*model.parameters(), tokens, codes]) as held, _Fused():
            for p in model.parameters():
                p.register_post_accumulate_grad_hook(held.leaves)
            with arithmetic(precision, torch.device("cpu")):
                tables = model.code_tables()
                text, image = model(tokens, codes, tables)
                words, cells = text[:, :-1].flatten(0, 1), image.flatten(0, 1)
                heads = ((words, model.text_head.weight, model.text_head.bias, tokens.flatten()),
                         (cells, tables.head, model.image_head.bias, codes.flatten()))  # fmt: skip
                one, other = (cross_entropy(*head, AT_ONCE["cuda"]) for head in heads)
                loss = one + other
            del text, image, words, cells, tables, heads, one, other
            loss.backward()
    return Footprint(held.partitioned - held.before, held.whole - held.before)


def parameters(config: PriorConfig) -> tuple[int, int]:
    """Numbers in the resblocks' matrices, and in everything else."""
    c = config
    vectors = c.depth * (4 + 9) * c.width  # gains and biases of two norms, biases of four matrices
    tables = 2 * c.text_vocab + 2 * c.image_vocab + 2 * c.text_length + 2 * c.grid + 2 + 2
    shared = 0
    if c.code_channels:
        hidden = WIDENING * c.width
        shared = c.code_channels * (c.image_vocab + hidden) + hidden * (1 + 2 * c.width)
    return (
        LAYER * c.width**2 * c.depth,
        vectors + tables * c.width + c.text_vocab + c.image_vocab + shared,
    )
