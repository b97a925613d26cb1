"""The prior as it draws: one image slot at a time, each layer remembering only what it can still see.

The text passes through once and serves all pictures of its prompt (`stage2_prior.cache`). A step is compiled
on a CPU (`stage2_prior.step`). Slots are tensors, nothing branches on them: on a GPU a step can be recorded
once and replayed.
"""

import time
from itertools import chain

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from dalle.boundary import opened
from dalle.precision import Arithmetic, as_they_are, fp32_products, tiles
from dalle.text import NO_TOKEN
from dalle.threads import using
from stage2_prior.activation import STEEPNESS, quick_gelu
from stage2_prior.cache import Cache, State, Window
from stage2_prior.linear import ROUNDED, Weights, fastest, resolve
from stage2_prior.model import Layer, Prior
from stage2_prior.step import LayerStep, Step, compiled, silu_

TRIES = 6  # steps with each number of threads
Text = list[Float[Tensor, "two p h text d"]]  # keys and values of every layer


class Decoder:
    """A prior ready to draw. Its parameters are read here: once they change, make another one.

    Args:
        rows: pictures that will be drawn side by side; the linear layers' form is chosen for it.
        weights: see `stage2_prior.linear`.
        precision: what the device computes in: on a CPU with AMX also keys and values beside int8 and int4,
            on a GPU what `auto` stands for.

    Raises:
        ConfigError: the device has no such weights.
    """

    @torch.inference_mode()
    def __init__(
        self, model: Prior, rows: int = 1, weights: Weights = "auto", precision: Arithmetic = "fp32"
    ) -> None:
        model = model.folded()
        c = self.config = model.config
        self.model, self.rows = model, rows
        self.device = model.start_of_text.device
        self.layers = [layer for layer in model.layers if isinstance(layer, Layer)]
        linears = [
            (layer.attention.qkv, layer.attention.out, layer.mlp.up, layer.mlp.down) for layer in self.layers
        ]
        everything = [model.image_head, *chain(*linears)]
        self.weights = resolve(weights, precision, everything)
        rounded = self.weights in ROUNDED
        # x·sigmoid(sx) is silu(sx) / s: one pass, where the factors go into weights that are rounded anyway.
        s = STEEPNESS
        factors = [(1.0, 1.0), (1.0, 1.0), (s, s), (1 / s, 1.0)] if rounded else 4 * [(1.0, 1.0)]
        with fp32_products("ieee"), as_they_are(self.device):  # as when it draws, whatever is around it now
            # Logits are fp32 whatever the rest runs in (paper, App. D), but for those of int4.
            of_head: dict[Weights, Weights] = {"bf16": "fp32", "int8": "fp16"}
            (head,) = fastest([model.image_head], of_head.get(self.weights, self.weights), rows)
            products = [
                fastest(alike, self.weights, rows, times)
                for alike, times in zip(zip(*linears, strict=True), factors, strict=True)
            ]
        # Of few rows other CPUs make the products of attention slower in bf16.
        in_bf16 = self.weights == "bf16" or (rounded and precision == "bf16" and tiles())
        self.dtype = torch.bfloat16 if in_bf16 else torch.float32  # of keys, values and attention
        kinds = [layer.attention.kind for layer in self.layers]
        self.windows = {kind: Window.of(kind, c.grid, c.kernel, self.device) for kind in dict.fromkeys(kinds)}
        numbers = [list(self.windows).index(kind) for kind in kinds]
        steps = [
            LayerStep(layer, forms, silu_ if rounded else quick_gelu, self.dtype)
            for layer, *forms in zip(self.layers, *products, strict=True)
        ]
        step = Step(model, list(self.windows.values()), numbers, steps, head)
        self.run = compiled(step) if self.device.type == "cpu" else step
        self.threads = self._fastest_threads()

    def _fastest_threads(self) -> int:
        """How many make a step fastest, found by trying: to wake another may take longer than its work.

        All tries count, not the best one: where others use the cores, threads mostly wait for each other.
        """
        most = torch.get_num_threads()
        if self.device.type != "cpu" or most == 1:
            return most
        nothing = torch.full((1, self.config.text_length - 1), NO_TOKEN)
        state, slot = self.state(self.read(nothing), self.rows), torch.zeros(1, dtype=torch.long)
        codes = torch.full((self.rows,), self.start)
        seconds = {most: 0.0, 1: 0.0}  # at a tie, the user's own number
        for turn in range(1 + TRIES):  # the first one warms up
            for count in seconds:
                with using(count):
                    began = time.perf_counter()
                    self.step(codes, state, slot)
                    if turn:
                        seconds[count] += time.perf_counter() - began
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
        caches = [
            Cache.of(kv, self.windows[layer.attention.kind], pictures)
            for layer, kv in zip(self.layers, text, strict=True)
        ]
        masks, own = [], []
        for window in self.windows.values():
            seen, t = window.bias.shape[1], self.config.text_length
            mask = torch.full((pictures, t + pictures * seen), -torch.inf, dtype=self.dtype)
            mask[:, :t] = 0
            masks.append(mask.to(self.device))
            own.append(masks[-1][:, t:].unflatten(1, (pictures, seen)).diagonal().t())
        return State(caches, masks, own)

    @torch.inference_mode()
    def step(self, codes: Int[Tensor, " b"], state: State, slot: Int[Tensor, " 1"]) -> Float[Tensor, "b v"]:
        """Logits of one image slot of all pictures, given the codes of the cell before it.

        Args:
            codes: `start` for the first slot.
            state: of the slots before; this one joins it.
        """
        with as_they_are(self.device), fp32_products("ieee"):
            logits: Tensor = self.run(codes, slot, state.tensors)
        return logits
