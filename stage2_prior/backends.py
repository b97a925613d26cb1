"""Attention over whole sequences, in several ways that give the same numbers: `masks.allowed` defines them.

    dense   one product with a Boolean mask: the reference, which saves nothing where the mask is False
    block   neighbouring queries together, against all text and the few image slots that these can see
    flex    PyTorch's FlexAttention, which leaves out empty tiles of 128 × 128: for CUDA

A layer holds one of them; layers of the same kind share what it needs of the mask.
"""

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from dalle.console import warn
from dalle.errors import ConfigError
from dalle.precision import as_they_are
from dalle.threads import cores, using
from stage2_prior.config import Backend, PriorConfig
from stage2_prior.masks import Kind, allowed, dense, kinds

# Queries of a block: fewer make products too small, more look at slots in vain. In 16 bits products are fast
# for their size, and what they cost besides counts more.
TOGETHER, TOGETHER_IN_16_BITS = 64, 128
# Compiled forms of FlexAttention, at most: beyond dynamo's own limit of 8 it would run uncompiled. There are
# three masks, times the batch sizes of `choose`, training and evaluation, with gradients and without.
FORMS = 64
TRIES = 5


@runtime_checkable
class Attend(Protocol):
    """Queries, keys and values of all heads → what each slot gathers."""

    def __call__(self, qkv: Float[Tensor, "b t three_w"], heads: int) -> Float[Tensor, "b t w"]:
        """Attend within the first t slots; t is the whole sequence, or shorter at its end."""


class Dense:
    """The reference."""

    def __init__(self, config: PriorConfig, kind: Kind) -> None:
        self.config, self.kind = config, kind

    def __call__(self, qkv: Float[Tensor, "b t three_w"], heads: int) -> Float[Tensor, "b t w"]:
        q, k, v = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=heads)
        c, t = self.config, qkv.shape[1]
        mask = _mask(self.kind, c.text_length, c.grid, c.kernel, qkv.device)[:t, :t]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return rearrange(y, "b h t d -> b t (h d)")


@contextmanager
def _lasting() -> Iterator[None]:
    """What is kept here outlives an evaluation, or a step without data, that may ask for it first."""
    with torch.inference_mode(False), unset_fake_temporarily():
        yield


@cache
def _mask(kind: Kind, text: int, grid: int, kernel: int, device: torch.device) -> Tensor:
    with _lasting():
        return dense(kind, text, grid, kernel).to(device)


class Block(Dense):
    """The structured form: about `TOGETHER` queries at a time against the text and one window of image slots.

    The row mask reaches back one row in raster order, the convolutional mask half its kernel. Column layers
    take the picture column by column.
    """

    def __call__(self, qkv: Float[Tensor, "b t three_w"], heads: int) -> Float[Tensor, "b t w"]:
        c = self.config
        if qkv.shape[1] != c.length:
            return super().__call__(qkv, heads)  # a shorter sequence
        layout = _layout(self.kind, c.text_length, c.grid, c.kernel, qkv.device, qkv.dtype)
        y: Tensor = _BlockAttention.apply(qkv, heads, layout)
        return y


@dataclass(frozen=True)
class _Tile:
    """Queries of consecutive slots, and what they see: the beginning of the text, and a window behind it."""

    queries: slice
    text: int
    window: slice
    bias: Tensor  # 0 where allowed, −∞ elsewhere; queries × (text, then window)


@dataclass(frozen=True)
class _Layout:
    """An order of the slots in which every window is consecutive, and the tiles."""

    text: int
    grid: int
    by_column: bool
    tiles: tuple[_Tile, ...]

    def sort(self, x: Float[Tensor, "*n t d"]) -> Float[Tensor, "*n t d"]:
        """From raster order to the layout's, or back: they swap rows and columns, or nothing."""
        if not self.by_column:
            return x
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        y[..., : self.text, :] = x[..., : self.text, :]
        image, square = slice(self.text, None), (self.grid, self.grid)
        y[..., image, :].unflatten(-2, square).copy_(x[..., image, :].unflatten(-2, square).transpose(-2, -3))
        return y


def _seen(x: Float[Tensor, "n t d"], tile: _Tile) -> Float[Tensor, "n keys d"]:
    """Of keys or values, those that the tile's queries see; no copy where text and window touch."""
    if tile.window.start == tile.text:
        return x[:, : tile.window.stop]
    return torch.cat([x[:, : tile.text], x[:, tile.window]], 1)


@cache
def _layout(
    kind: Kind, text: int, grid: int, kernel: int, device: torch.device, dtype: torch.dtype
) -> _Layout:
    cells = grid**2
    together = max(1, (TOGETHER if dtype == torch.float32 else TOGETHER_IN_16_BITS) // grid) * grid
    by_column = kind == "column" and together < cells
    reach = {"row": grid, "column": 0, "conv": kernel // 2 * (grid + 1)}[kind]

    def tile(start: int, stop: int, first: int) -> _Tile:
        keys = torch.cat([slots[: min(text, stop)], slots[first:stop]])
        see = allowed(kind, text, grid, slots[start:stop, None], keys[None], kernel)
        bias = torch.zeros(see.shape).masked_fill(~see, -torch.inf)
        return _Tile(slice(start, stop), min(text, stop), slice(first, stop), bias.to(device, dtype))

    with _lasting():
        image = torch.arange(cells).view(grid, grid)
        slots = torch.cat([torch.arange(text), text + (image.t() if by_column else image).flatten()])
        words = [(at, min(text, at + TOGETHER)) for at in range(0, text, TOGETHER)]
        patches = [(at, min(cells, at + together)) for at in range(0, cells, together)]
        tiles = [tile(start, stop, stop) for start, stop in words]
        tiles += [tile(text + a, text + b, text + max(0, a - reach)) for a, b in patches]
    return _Layout(text, grid, by_column, tuple(tiles))


class _BlockAttention(torch.autograd.Function):
    """Written out, because autograd would copy, fill and add several times as much as is needed."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, layout: _Layout) -> Tensor:
        x = layout.sort(rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=heads))
        x = x.flatten(1, 2).contiguous()
        q, k, v = x
        y, shares = torch.empty_like(q), []
        with as_they_are(qkv.device):
            for tile in layout.tiles:
                bias, keys = tile.bias.expand(len(q), -1, -1), _seen(k, tile)
                scores = torch.baddbmm(bias, q[:, tile.queries], keys.mT, alpha=q.shape[-1] ** -0.5)
                share = torch.softmax(scores, -1)
                y[:, tile.queries] = torch.bmm(share, _seen(v, tile))
                shares.append(share)
        ctx.save_for_backward(x, *shares)
        ctx.heads, ctx.layout = heads, layout
        return rearrange(layout.sort(y.unflatten(0, (-1, heads))), "b h t d -> b t (h d)")

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, *shares = ctx.saved_tensors
        heads, layout = ctx.heads, ctx.layout
        dy = layout.sort(rearrange(dy, "b t (h d) -> b h t d", h=heads)).flatten(0, 1)
        (q, k, v), dx = x, torch.empty_like(x)
        wide = torch.promote_types(x.dtype, torch.float32)  # for sums of many tiles
        dq, (dk, dv) = dx[0], torch.zeros_like(x[1:], dtype=wide)
        scaled = dy * q.shape[-1] ** -0.5
        through_softmax = torch.ops.aten._softmax_backward_data  # dp, p -> p (dp - Σ p dp)
        with as_they_are(dy.device):
            for tile, share in zip(layout.tiles, shares, strict=True):
                here = tile.queries
                dshare = torch.bmm(scaled[:, here], _seen(v, tile).mT)
                dscores = through_softmax(dshare, share, -1, share.dtype)
                dq[:, here] = torch.bmm(dscores, _seen(k, tile))
                for total, left, right in ((dk, dscores, q[:, here]), (dv, share, dy[:, here])):
                    part = torch.bmm(left.mT, right)
                    total[:, : tile.text] += part[:, : tile.text]
                    total[:, tile.window] += part[:, tile.text :]
        dx[1], dx[2] = dk, dv
        dx = layout.sort(dx.unflatten(1, (-1, heads)))
        return rearrange(dx, "three b h t d -> b t (three h d)"), None, None


class Flex(Dense):
    """PyTorch's FlexAttention: one kernel, compiled from the mask's definition, that skips empty tiles."""

    def __call__(self, qkv: Float[Tensor, "b t three_w"], heads: int) -> Float[Tensor, "b t w"]:
        c = self.config
        if qkv.shape[1] != c.length:
            return super().__call__(qkv, heads)  # a shorter sequence
        q, k, v = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=heads)
        mask = _block_mask(self.kind, c.text_length, c.grid, c.kernel, qkv.device)
        # Here, since newer torch holds such a limit for one thread, and a backward pass that computes anew
        # has a thread of its own.
        with torch._dynamo.config.patch(recompile_limit=FORMS):
            y = _compiled()(q, k, v, block_mask=mask)
        return rearrange(y, "b h t d -> b t (h d)")


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


@cache
def _block_mask(kind: Kind, text: int, grid: int, kernel: int, device: torch.device) -> Any:
    length = text + grid**2
    see = inspect.unwrap(allowed)  # without the checks of shapes that tests wrap it in: it is compiled
    with _lasting():
        return create_block_mask(
            lambda batch, head, q, k: see(kind, text, grid, q, k, kernel),
            None, None, length, length, device=str(device),
        )  # fmt: skip


BACKENDS: dict[str, Callable[[PriorConfig, Kind], Attend]] = {"dense": Dense, "block": Block, "flex": Flex}


def choose(
    wanted: Backend, config: PriorConfig, pictures: int, dtype: torch.dtype, device: torch.device
) -> Backend:
    """Resolve `auto`: the fastest here, measured by some passes over `pictures` sequences in each form.

    Forms that fail, for want of memory or of a compiler, are out.

    Raises:
        ConfigError: FlexAttention is asked for where it cannot train.
    """
    if wanted == "flex" and device.type != "cuda":
        raise ConfigError("attention=flex trains on CUDA only; use attention=auto")
    if wanted != "auto":
        return wanted
    usable: list[Backend] = ["dense", "block", "flex"] if device.type == "cuda" else ["dense", "block"]
    qkv = torch.randn(pictures, config.length, 3 * config.width, dtype=dtype, device=device)
    layers = {
        name: [BACKENDS[name](config, kind) for kind in sorted(set(kinds(config.depth)))] for name in usable
    }
    best: dict[Backend, float] = {}
    # As in training, where each core has pictures of its own.
    with using(1 if cores(device) > 1 else torch.get_num_threads()):
        for name in usable:
            try:
                _seconds(layers[name], config.heads, qkv)  # warms up
                best[name] = float("inf")
            except torch.AcceleratorError:
                raise  # the GPU's state is lost, and whatever is tried next would fail for it
            except Exception as error:  # compilers fail in many ways
                reason = str(error).partition("\n")[0]
                warn(f"attention={name} does not work here: {type(error).__name__}: {reason}")
        for _ in range(TRIES):
            for name in best:
                best[name] = min(best[name], _seconds(layers[name], config.heads, qkv))
    if not best:
        raise ConfigError("no form of attention works here: see the warnings above")
    return min(best, key=best.__getitem__)


def _seconds(layers: list[Attend], heads: int, qkv: Tensor) -> float:
    """Of a forward and a backward pass through each of the layers."""
    qkv = qkv.clone().requires_grad_()
    start = time.perf_counter()
    torch.stack([layer(qkv, heads) for layer in layers]).sum().backward()
    if qkv.is_cuda:
        torch.cuda.synchronize(qkv.device)
    return time.perf_counter() - start
