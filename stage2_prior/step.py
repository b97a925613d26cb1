"""One image slot of all pictures on its way through the prior.

On a CPU TorchScript runs it: of the time that the two hundred small operations of one picture take, a fifth
is Python's. So what is here, and the forms of linear layers (`stage2_prior.linear`), keep to what it
compiles, and out of reach of the tests' type checks, which it does not.
"""

import warnings
from collections.abc import Callable
from typing import Any, no_type_check

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage2_prior.cache import Window
from stage2_prior.model import Layer, Prior


@no_type_check
def silu_(x: Tensor) -> Tensor:
    """x·sigmoid(x), in place."""
    return F.silu(x, inplace=True)


@no_type_check
def _normalized(x: Tensor, norm: tuple[Tensor, Tensor, float]) -> Tensor:
    weight, bias, eps = norm
    return torch.layer_norm(x, weight.shape, weight, bias, eps)


def _norm(layer: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    """Gain, bias and epsilon, not a module: to compile one takes longer than this."""
    return layer.weight.detach(), layer.bias.detach(), layer.eps


@no_type_check
class LayerStep(nn.Module):
    """One layer as a row for each picture passes through it.

    Args:
        products: its linear layers, from queries, keys and values to the last one.
        dtype: of attention.
    """

    def __init__(
        self,
        layer: Layer,
        products: list[nn.Module],
        activate: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = _norm(layer.attention_norm), _norm(layer.mlp_norm)
        self.qkv, self.out, self.up, self.down = products
        self.activate = activate
        self.dtype = dtype

    def forward(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        windows: Tensor,
        ring: Tensor,
        mask: Tensor,
        place: Tensor,
        places: Tensor | None,
    ) -> Tensor:
        """Rows `b w` to rows; the other tensors as in `Cache`, `State` and `Window`."""
        _, p, n, _, h, d = ring.shape
        qkv = self.qkv(_normalized(x, self.attention_norm)).to(self.dtype).view(1, p, n, 3, h, d)
        ring.index_copy_(0, place, qkv.narrow(3, 1, 2))  # keys and values
        if places is not None:
            torch.index_select(ring, 0, places, out=windows)
        q = qkv.select(3, 0).squeeze(0).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).reshape(p * n, h * d))
        return x + self.down(self.activate(self.up(_normalized(x, self.mlp_norm))))


@no_type_check
class Step(nn.Module):
    """All layers, from the code of the cell before to the logits of this one.

    Args:
        kinds: the number of each layer's window.
    """

    def __init__(
        self, model: Prior, windows: list[Window], kinds: list[int], layers: list[LayerStep], head: nn.Module
    ) -> None:
        super().__init__()
        # The start of the image is one more code, so that the first slot is like the others.
        self.embeddings = torch.cat([model.image_tokens.weight, model.start_of_image[None]])
        self.positions = (model.rows.weight[:, None] + model.columns.weight[None]).flatten(0, 1)
        self.kinds = kinds
        self.windows, self.layers = nn.ModuleList(windows), nn.ModuleList(layers)
        self.norm, self.head = _norm(model.norm), head

    def forward(self, codes: Tensor, slot: Tensor, tensors: list[Tensor]) -> Tensor:
        """Codes `b` of the cell before, its successor `1`, and `State.tensors`; to logits `b v`."""
        place: list[Tensor] = []
        places: list[Tensor | None] = []
        for i, window in enumerate(self.windows):
            written, read = window(slot, tensors[2 * i + 1])
            place.append(written)
            places.append(read)
        x = self.embeddings.index_select(0, codes) + self.positions.index_select(0, slot)
        at = 2 * len(self.windows)
        for number, layer in enumerate(self.layers):
            i = self.kinds[number]
            keys, values, windows, ring = tensors[at : at + 4]
            x = layer(x, keys, values, windows, ring, tensors[2 * i], place[i], places[i])
            at += 4
        logits: Tensor = self.head(_normalized(x, self.norm)).float()
        return logits


def compiled(step: Step) -> Callable[..., Tensor]:
    """The same operations on the same numbers, without Python between them."""
    jit: Any = torch.jit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its successors take a minute to compile a step
        script = jit.script(step)

    def run(*inputs: Any) -> Tensor:
        with jit.optimized_execution(False):  # fusing would round otherwise, and takes a tenth of a second
            logits: Tensor = script(*inputs)
        return logits

    return run
