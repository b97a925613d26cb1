"""The prior: one transformer over text tokens and image tokens.

Slot 0 is the start of text, slots 1 … hold the caption, each slot without a token a padding token of its
own. Image slot 0 is the start of the image, slot i holds code i−1. Every slot predicts what belongs to
its own place: text slot i the i-th text token, image slot i the code of cell i.

Source: paper, §2.2 and App. B.1.
"""

import math
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle.boundary import LayerNorm, Linear, residual
from dalle.checkpoint import load_model
from dalle.initial import draw_seed, draw_weights
from dalle.optim import full_shape
from dalle.precision import as_they_are
from stage2_prior.activation import gelu
from stage2_prior.attention import Attention
from stage2_prior.backends import BACKENDS
from stage2_prior.code_vectors import CodeVectors, principal_components
from stage2_prior.config import Backend, PriorConfig
from stage2_prior.masks import Kind, kinds

HEAD_SPREAD = 0.1  # of the logits at the start where the head does not begin at 0 (see `start_from`)
SPREAD = 0.125  # variance of weights × fan-in, as in Sparse Transformers, which the paper follows


class MLP(nn.Module):
    """Linear to four times the width, x·sigmoid(1.702x), linear back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = Linear(width, 4 * width)
        self.down = Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "*b w"]) -> Float[Tensor, "*b w"]:
        return self.down(gelu(self.up(x)))


class Layer(nn.Module):
    """An attention resblock and an MLP resblock, both normalised at their input."""

    def __init__(self, config: PriorConfig, kind: Kind) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.width)
        self.attention = Attention(config, kind)
        self.mlp_norm = LayerNorm(config.width)
        self.mlp = MLP(config.width)

    def forward(self, x: Float[Tensor, "b t w"], recompute: bool = False) -> Float[Tensor, "b t w"]:
        """With `recompute` each resblock keeps its input alone for the backward pass."""
        for resblock in ((self.attention_norm, self.attention), (self.mlp_norm, self.mlp)):
            if recompute:
                x = checkpoint(residual, x, *resblock, use_reentrant=False, preserve_rng_state=False)
            else:
                x = residual(x, *resblock)
        return x


class CodeTables(NamedTuple):
    """What the prior knows of every code: `image_vocab width` each."""

    embedding: Tensor
    head: Tensor


class Prior(nn.Module):
    """The joint distribution of a caption's tokens and a picture's codes."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        seed = draw_seed()
        self.config = config
        self.recompute = False
        width = config.width
        self.start_of_text = nn.Parameter(torch.empty(width))
        self.start_of_image = nn.Parameter(torch.empty(width))
        self.text_tokens = nn.Embedding(config.text_vocab, width)
        self.padding = nn.Embedding(config.text_length, width)  # one for every text slot (§2.2)
        self.text_positions = nn.Embedding(config.text_length, width)
        self.image_tokens = nn.Embedding(config.image_vocab, width)
        self.rows = nn.Embedding(config.grid, width)
        self.columns = nn.Embedding(config.grid, width)
        self.layers = nn.ModuleList(Layer(config, kind) for kind in kinds(config.depth))
        self.norm = nn.LayerNorm(width)
        self.text_head = nn.Linear(width, config.text_vocab)
        self.image_head = nn.Linear(width, config.image_vocab)
        self.code_vectors = CodeVectors(config) if config.code_channels else None
        draw_weights(self.spreads(), seed)

    def spreads(self) -> Iterator[tuple[Tensor, float]]:
        """Every weight that is drawn at the start, with its standard deviation; 0 for those that start at 0.

        As in Sparse Transformers; the paper does not give its own (docs/paper.md).
        """
        width, residual = self.config.width, 2 * self.config.depth
        token_std = math.sqrt(SPREAD / width)
        for table in (self.text_tokens, self.padding, self.image_tokens):
            yield table.weight, token_std
        for start in (self.start_of_text, self.start_of_image):
            yield start, token_std
        yield self.text_positions.weight, token_std
        for table in (self.rows, self.columns):  # two of them are summed
            yield table.weight, token_std / math.sqrt(2)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            inner = ((layer.attention.qkv, 1), (layer.mlp.up, 1))
            outer = ((layer.attention.out, residual), (layer.mlp.down, residual))
            for linear, share in (*inner, *outer):
                yield linear.weight, math.sqrt(SPREAD / linear.in_features / share)
                yield linear.bias, 0.0
        for head in (self.text_head, self.image_head):
            yield head.weight, 0.0
            yield head.bias, 0.0
        if self.code_vectors is not None:
            yield from self.code_vectors.spreads(token_std, 0.0)

    def matrices(self) -> dict[str, int]:
        """The resblocks' matrices by name: all weights but gains, biases, embeddings and heads.

        These are what the paper stores in 16 bits and compresses between machines (App. D and E). Each comes
        with the number of matrices that lie below one another in it: three in that of q, k and v.
        """
        found = [f"layers.{name}" for name, p in self.layers.named_parameters() if len(full_shape(p)) > 1]
        return {name: 3 if name.endswith("attention.qkv.weight") else 1 for name in found}

    def of_codes(self) -> list[Tensor]:
        """The parameters from which the codes' tables are made; nothing else depends on them."""
        shared = [] if self.code_vectors is None else list(self.code_vectors.parameters())
        return [self.image_tokens.weight, self.image_head.weight, *shared]

    def code_tables(self) -> CodeTables:
        """The embedding of every code and its row of the head, as they are now."""
        embedding, head = self.image_tokens.weight, self.image_head.weight
        if self.code_vectors is None:
            return CodeTables(embedding, head)
        of_embedding, of_head = self.code_vectors()
        return CodeTables(embedding + of_embedding, head + of_head)

    @torch.no_grad()
    def folded(self) -> "Prior":
        """This prior for drawing: with the codes' tables as they are now in place of code vectors.

        All else is shared with it, and without code vectors it is the same prior.
        """
        if self.code_vectors is None:
            return self
        tables, twin = self.code_tables(), copy(self)
        twin.config = replace(self.config, code_channels=0)
        twin._modules = {
            **self._modules,
            "code_vectors": None,
            "image_tokens": _with_weight(self.image_tokens, tables.embedding),
            "image_head": _with_weight(self.image_head, tables.head),
        }
        return twin

    @torch.no_grad()
    def start_from(self, vectors: Float[Tensor, "v c"], seed: int) -> None:
        """Begin with embeddings, and rows of the image head, that are alike for codes whose vectors are.

        What is learned of one code then holds for its neighbours from the first update. Without code vectors
        the tables begin as the vectors' principal components, turned at random, so that every channel and
        head has a share of each.
        """
        width, vectors = self.config.width, vectors.float().cpu()
        of_embedding, of_head = math.sqrt(SPREAD / width), HEAD_SPREAD / math.sqrt(width)
        if self.code_vectors is not None:
            self.image_tokens.weight.zero_()
            self.code_vectors.start_from(vectors, of_head, seed)
            return
        turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed))).Q
        placed = principal_components(vectors, width) @ turn
        placed /= placed.std().clamp_min(1e-6)
        self.image_tokens.weight.copy_(placed * of_embedding)
        self.image_head.weight.copy_(placed * of_head)

    def resblocks(self) -> dict[str, tuple[nn.Module, nn.Module]]:
        """The two resblocks of every layer by name, in the order of the forward pass (`dalle.scaling`)."""
        return {
            f"layers.{i}.{branch}": (getattr(layer, f"{branch}_norm"), getattr(layer, branch))
            for i, layer in enumerate(self.layers)
            for branch in ("attention", "mlp")
        }

    @classmethod
    def load(cls, folder: Path | str, device: torch.device | str = "cpu") -> "Prior":
        """The model in `folder` (R/prior), ready to draw.

        Raises:
            CheckpointError: there is none, it is damaged, or its parts do not fit.
            ConfigError: its config.json describes another kind of model.
        """
        return load_model(Path(folder), cls, PriorConfig, torch.device(device))

    def attend_by(self, backend: Backend) -> None:
        """Compute attention over whole sequences in another way; see `stage2_prior.backends`."""
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.attention.attend = BACKENDS[backend](self.config, layer.attention.kind)

    def embed_text(self, tokens: Int[Tensor, "b words"]) -> Float[Tensor, "b text w"]:
        """The text slots; `tokens` has one column less than there are slots, −1 where there is no token."""
        words = torch.where(
            (tokens >= 0)[..., None], self.text_tokens(tokens.clamp_min(0)), self.padding.weight[1:]
        )
        start = self.start_of_text.expand(len(tokens), 1, -1)
        return torch.cat([start, words], 1) + self.text_positions.weight

    def embed_image(
        self,
        codes: Int[Tensor, "b cells"],
        table: Float[Tensor, "v w"],
        hidden: Bool[Tensor, "b cells"] | None = None,
    ) -> Float[Tensor, "b cells w"]:
        """The image slots: the start, then every code but the last, each at its slot's row and column.

        Of a hidden code there is nothing but its place.
        """
        start = self.start_of_image.expand(len(codes), 1, -1)
        places = (self.rows.weight[:, None] + self.columns.weight[None]).flatten(0, 1)
        before = F.embedding(codes[:, :-1], table)
        if hidden is not None:
            before = before.masked_fill(hidden[:, :-1, None], 0.0)
        return torch.cat([start, before], 1) + places

    def forward(
        self,
        tokens: Int[Tensor, "b words"],
        codes: Int[Tensor, "b cells"],
        tables: CodeTables | None = None,
        hidden: Bool[Tensor, "b cells"] | None = None,
    ) -> tuple[Float[Tensor, "b text w"], Float[Tensor, "b cells w"]]:
        """Final states of the text slots and of the image slots; the heads turn them into logits.

        Args:
            tables: `code_tables()`, from a caller that has them already.
            hidden: codes that no slot sees, for training.

        Raises:
            ValueError: tokens or codes of another shape.
        """
        c = self.config
        if tokens.shape[1:] != (c.text_length - 1,) or codes.shape[1:] != (c.cells,):
            raise ValueError(
                f"expected tokens (b, {c.text_length - 1}) and codes (b, {c.cells}), "
                f"got {tuple(tokens.shape)} and {tuple(codes.shape)}"
            )
        table = (tables or self.code_tables()).embedding
        x = torch.cat([self.embed_text(tokens), self.embed_image(codes, table, hidden)], 1)
        for layer in self.layers:
            x = layer(x, self.recompute)
        x = self.norm(x)
        return x[:, : c.text_length], x[:, c.text_length :]

    def text_logits(self, states: Float[Tensor, "*b w"]) -> Float[Tensor, "*b v"]:
        """The text head of these states, in fp32 whatever the rest runs in (paper, App. D)."""
        return _in_fp32(states, self.text_head.weight, self.text_head.bias)

    def image_logits(self, states: Float[Tensor, "*b w"]) -> Float[Tensor, "*b v"]:
        """The image head of these states, likewise."""
        return _in_fp32(states, self.code_tables().head, self.image_head.bias)


def _with_weight(module: nn.Module, weight: Tensor) -> nn.Module:
    twin = copy(module)
    twin._parameters = {**module._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
    return twin


def _in_fp32(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with as_they_are(states.device):
        return F.linear(states.float(), weight.float(), bias.float())
