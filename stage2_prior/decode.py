"""The prior as it draws: one image slot at a time, each layer remembering only what it can still see.

The text passes through once and serves all pictures of its prompt. Of the picture a layer keeps the last
slots that any later slot of its mask reaches, in a ring: grid + 1 of them in a row layer, the last rows in a
convolutional one. What a slot reads has the same size at every position, and so does its cost.

Slots are tensors, nothing branches on them: on a GPU a step can be recorded once and replayed.
"""

import math
import time
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dalle.boundary import opened
from dalle.precision import as_they_are, fp32_products
from dalle.text import NO_TOKEN
from dalle.threads import using
from stage2_prior.activation import around_silu, gelu
from stage2_prior.linear import ROUNDED, Fast, Weights, fastest, resolve
from stage2_prior.masks import Kind, visible
from stage2_prior.model import Layer, Prior

TRIES = 4  # steps with each number of threads; the best one counts
Text = list[Float[Tensor, "two p h text d"]]  # keys and values of every layer


@dataclass(frozen=True)
class Window:
    """What each image slot of one kind of layer reads: places in a ring of the last slots.

    Args:
        ring: how many slots are kept; slot i lies at place i mod ring.
        places: to be read for every slot; None where it is always the whole ring, in its order.
        bias: 0 for a place that the slot sees, −∞ for one that it does not.
    """

    ring: int
    places: Int[Tensor, "cells seen"] | None
    bias: Float[Tensor, "cells seen"]

    @classmethod
    def of(cls, kind: Kind, grid: int, kernel: int, device: torch.device) -> "Window":
        """The window of a mask, found from its definition."""
        with torch.inference_mode(False):
            slots = torch.arange(grid**2)[:, None]
            seen = pad_sequence(visible(kind, grid, kernel), batch_first=True, padding_value=-1)
            hidden = seen < 0
            seen = torch.where(hidden, slots, seen)  # itself once more, hidden by the bias
            ring = int((slots - seen).max()) + 1
            places = seen % ring
            if seen.shape[1] < ring:
                bias = torch.zeros(seen.shape).masked_fill(hidden, -torch.inf)
                return cls(ring, places.to(device), bias.to(device))
            bias = torch.full((grid**2, ring), -torch.inf).scatter(1, places, 0.0)
            return cls(ring, None, bias.to(device))


@dataclass
class Cache:
    """Keys and values of one layer for p prompts × n pictures.

    All pictures of a prompt attend in one product to its text and to the windows of all of them; a mask
    leaves each its own window. `read` is that product's operand. The ring is a part of it where a slot
    sees all of the ring, otherwise it lies beside it.
    """

    read: tuple[Float[Tensor, "p h slots d"], Float[Tensor, "p h slots d"]]  # keys and values, one memory
    windows: Float[Tensor, "seen p n two h d"]  # the end of both
    ring: Float[Tensor, "ring p n two h d"]

    @property
    def bytes(self) -> int:
        """Memory of the keys and values; a view counts once."""
        own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*self.read, self.ring)}
        return sum(own.values())


@dataclass
class State:
    """What drawing remembers of the slots before: a cache for every layer, a mask for every kind."""

    caches: list[Cache]
    masks: dict[Kind, Float[Tensor, "n slots"]]
    own: dict[Kind, Float[Tensor, "n seen"]]  # of each mask what every picture's own window is under

    @property
    def bytes(self) -> int:
        """Memory of all caches."""
        return sum(cache.bytes for cache in self.caches)


@dataclass(frozen=True)
class FastLayer:
    """One layer as a row for each picture passes through it."""

    kind: Kind
    attention_norm: Fast
    qkv: Fast
    out: Fast
    mlp_norm: Fast
    up: Fast
    down: Fast


def _norm(norm: nn.LayerNorm) -> Fast:
    """Without a module's call, which takes as long as normalizing a row."""
    shape, weight, bias, eps = list(norm.normalized_shape), norm.weight, norm.bias, norm.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)


class Decoder:
    """A prior ready to draw. Its parameters are read here: once they change, make another one.

    Args:
        rows: pictures that will be drawn side by side; the linear layers' form is chosen for it.
        weights: see `stage2_prior.linear`.
        precision: what the device computes in: of keys and values beside int8 and int4, and `auto` on a GPU.

    Raises:
        ConfigError: the device has no such weights.
    """

    @torch.inference_mode()
    def __init__(
        self, model: Prior, rows: int = 1, weights: Weights = "auto", precision: str = "fp32"
    ) -> None:
        model = model.folded()
        c = self.config = model.config
        self.model, self.rows = model, rows
        self.device = model.start_of_text.device
        self.layers = [layer for layer in model.layers if isinstance(layer, Layer)]
        linears: list[tuple[nn.Linear, ...]] = [
            (layer.attention.qkv, layer.attention.out, layer.mlp.up, layer.mlp.down) for layer in self.layers
        ]
        everything = [model.image_head, *chain(*linears)]
        self.weights = resolve(weights, "bf16" if precision == "bf16" else "fp32", everything)
        self.activate: Fast = gelu
        if self.weights in ROUNDED:
            linears = [(qkv, out, *around_silu(up, down)) for qkv, out, up, down in linears]
            self.activate = partial(F.silu, inplace=True)
        with fp32_products("ieee"):
            # Logits are fp32 whatever the rest runs in (paper, App. D), but for those of int4.
            of_head: dict[Weights, Weights] = {"bf16": "fp32", "int8": "fp16"}
            (self.head,) = fastest([model.image_head], of_head.get(self.weights, self.weights), rows)
            products = [fastest(alike, self.weights, rows) for alike in zip(*linears, strict=True)]
        self.norm = _norm(model.norm)
        self.fast = [
            FastLayer(
                layer.attention.kind, _norm(layer.attention_norm), qkv, out, _norm(layer.mlp_norm), up, down
            )
            for layer, qkv, out, up, down in zip(self.layers, *products, strict=True)
        ]
        in_bf16 = self.weights in ROUNDED and "bf16" in (self.weights, precision)
        self.dtype = torch.bfloat16 if in_bf16 else torch.float32  # of keys, values and attention
        # The start of the image is one more code, so that the first slot is like the others.
        self.codes = torch.cat([model.image_tokens.weight, model.start_of_image[None]])
        self.places = (model.rows.weight[:, None] + model.columns.weight[None]).flatten(0, 1)
        self.windows = {
            kind: Window.of(kind, c.grid, c.kernel, self.device)
            for kind in dict.fromkeys(layer.attention.kind for layer in self.layers)
        }
        self.threads = self._fastest_threads()

    def _fastest_threads(self) -> int:
        """With how many a step takes least, tried: to wake a second one takes longer than small products."""
        most = torch.get_num_threads()
        if self.device.type != "cpu" or most == 1:
            return most
        nothing = torch.full((1, self.config.text_length - 1), NO_TOKEN)
        state, slot = self.state(self.read(nothing), self.rows), torch.zeros(1, dtype=torch.long)
        codes = torch.full((self.rows,), self.start)
        seconds = {most: math.inf, 1: math.inf}  # at a tie, the user's own number
        for _ in range(TRIES):
            for count in seconds:
                with using(count):
                    began = time.perf_counter()
                    self.step(codes, state, slot)
                    seconds[count] = min(seconds[count], time.perf_counter() - began)
        return min(seconds, key=seconds.__getitem__)

    @property
    def start(self) -> int:
        """The code that stands before the first one."""
        return self.config.image_vocab

    @torch.inference_mode()
    def read(self, tokens: Int[Tensor, "p words"]) -> Text:
        """Keys and values of p prompts in every layer."""
        text: Text = []
        rounded = self.dtype == torch.bfloat16
        cast = torch.autocast(self.device.type, torch.bfloat16, enabled=rounded)
        with opened(self.model), cast, fp32_products("ieee"):
            x = self.model.embed_text(tokens)
            for layer in self.layers:
                qkv = layer.attention.qkv(layer.attention_norm(x)).to(self.dtype)
                qkv = rearrange(qkv, "p t (three h d) -> three p h t d", three=3, h=self.config.heads)
                text.append(qkv[1:].clone())  # without the queries' memory
                if len(text) == len(self.layers):
                    break  # the last layer's outputs are for the text head alone
                y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
                x = x + layer.attention.out(rearrange(y, "p h t d -> p t (h d)"))
                x = x + layer.mlp(layer.mlp_norm(x))
        return text

    @torch.inference_mode()
    def state(self, text: Text, pictures: int) -> State:
        """Room for so many pictures of each prompt, before their first slot."""
        caches = []
        for layer, kv in zip(self.layers, text, strict=True):
            window = self.windows[layer.attention.kind]
            seen = window.bias.shape[1]
            _, p, h, t, d = kv.shape
            read = kv.new_zeros(2, p, h, t + pictures * seen, d)
            read[:, :, :, :t] = kv
            windows = rearrange(read[:, :, :, t:], "two p h (n seen) d -> seen p n two h d", n=pictures)
            apart = window.places is not None
            ring = kv.new_zeros(window.ring, p, pictures, 2, h, d) if apart else windows
            caches.append(Cache((read[0], read[1]), windows, ring))
        masks, own = {}, {}
        for kind, window in self.windows.items():
            seen = window.bias.shape[1]
            mask = torch.full((pictures, t + pictures * seen), -torch.inf, dtype=self.dtype)
            mask[:, :t] = 0
            masks[kind] = mask.to(self.device)
            own[kind] = masks[kind][:, t:].unflatten(1, (pictures, seen)).diagonal().t()
        return State(caches, masks, own)

    @torch.inference_mode()
    def step(self, codes: Int[Tensor, " b"], state: State, slot: Int[Tensor, " 1"]) -> Float[Tensor, "b v"]:
        """Logits of one image slot of all pictures, given the codes of the cell before it.

        Args:
            codes: `start` for the first slot.
            state: of the slots before; this one joins it.
        """
        with as_they_are(self.device), fp32_products("ieee"):
            read = {kind: self._open(kind, state.own[kind], slot) for kind in self.windows}
            x = self.codes.index_select(0, codes) + self.places.index_select(0, slot)
            for layer, cache in zip(self.fast, state.caches, strict=True):
                y = layer.qkv(layer.attention_norm(x))
                x = x + layer.out(self._attend(y, cache, state.masks[layer.kind], *read[layer.kind]))
                x = x + layer.down(self.activate(layer.up(layer.mlp_norm(x))))
            return self.head(self.norm(x)).float()

    def _open(self, kind: Kind, own: Tensor, slot: Tensor) -> tuple[Tensor, Tensor | None]:
        """Let the mask show what this slot sees; where the slot is written, and what is read of the ring."""
        window = self.windows[kind]
        own.copy_(window.bias.index_select(0, slot))
        places = None if window.places is None else window.places.index_select(0, slot).view(-1)
        return slot % window.ring, places

    def _attend(
        self, qkv: Tensor, cache: Cache, mask: Tensor, place: Tensor, places: Tensor | None
    ) -> Float[Tensor, "b w"]:
        _, p, n, _, h, d = cache.ring.shape
        qkv = qkv.to(self.dtype).view(1, p, n, 3, h, d)
        cache.ring.index_copy_(0, place, qkv.narrow(3, 1, 2))
        if places is not None:
            torch.index_select(cache.ring, 0, places, out=cache.windows)
        q = qkv.select(3, 0).squeeze(0).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, *cache.read, attn_mask=mask)
        return y.transpose(1, 2).reshape(p * n, h * d)
