"""The discrete VAE, as released; its parameters bear the names of OpenAI's weights.

Source: paper, App. A.1; openai/DALL-E, dall_e/encoder.py, decoder.py and utils.py.
"""

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dalle.checkpoint import load_model
from dalle.initial import draw_seed, draw_weights
from dalle.precision import as_they_are, fp32_linear, fp32_products
from dalle.threads import Threads, cores
from stage1_dvae.config import DVAEConfig
from stage1_dvae.likelihood import map_pixels, reconstruction


class Conv2d(nn.Module):
    """A convolution with stride 1 and "same" zero padding. The model draws the weights, N(0, 1/fan-in).

    Args:
        fp32: compute in fp32 even where the rest runs in 16 bit: the two layers beside the codes.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, *, fp32: bool = False) -> None:
        super().__init__()
        self.fp32, self.padding = fp32, (kernel - 1) // 2
        self.spread = 1 / math.sqrt(c_in * kernel**2)
        self.w = nn.Parameter(torch.empty(c_out, c_in, kernel, kernel))
        self.b = nn.Parameter(torch.zeros(c_out))

    def forward(self, x: Float[Tensor, "b c_in h w"]) -> Float[Tensor, "b c_out h w"]:
        last = x.permute(0, 2, 3, 1)
        if self.padding == 0 and x.device.type == "cpu" and last.is_contiguous() and not x.is_contiguous():
            # With channels last a 1×1 convolution is a product of matrices, which CPUs are faster in.
            product = fp32_linear if self.fp32 else F.linear
            return product(last, self.w.flatten(1), self.b).permute(0, 3, 1, 2)
        if not self.fp32:
            return F.conv2d(x, self.w, self.b, padding=self.padding)
        with as_they_are(x.device):
            return F.conv2d(x.float(), self.w, self.b, padding=self.padding)


class ResBlock(nn.Module):
    """id(x) + gain · res(x), where res is four ReLU–convolution pairs at a quarter of the width.

    The encoder's blocks have kernels (3, 3, 3, 1), the decoder's (1, 3, 3, 3). The identity path has
    no ReLU, only a 1×1 convolution where the width changes. With `recompute` the backward pass computes
    what lies within once more, and only the blocks' inputs are kept.
    """

    recompute = False

    def __init__(self, c_in: int, c_out: int, kernels: tuple[int, int, int, int], gain: float) -> None:
        super().__init__()
        widths = (c_in, c_out // 4, c_out // 4, c_out // 4, c_out)
        self.gain = gain
        self.id_path = Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.res_path = nn.ModuleDict(
            {f"conv_{i + 1}": Conv2d(widths[i], widths[i + 1], k) for i, k in enumerate(kernels)}
        )

    def forward(self, x: Float[Tensor, "b c_in h w"]) -> Float[Tensor, "b c_out h w"]:
        if not self.recompute:
            return self._sum(x)
        return checkpoint(self._sum, x, use_reentrant=False, preserve_rng_state=False)

    def _sum(self, x: Tensor) -> Tensor:
        y = x
        for conv in self.res_path.values():
            y = conv(F.relu(y))
        return self.id_path(x) + self.gain * y


class Output(nn.Module):
    """ReLU and a 1×1 convolution."""

    def __init__(self, c_in: int, c_out: int, *, fp32: bool = False) -> None:
        super().__init__()
        self.conv = Conv2d(c_in, c_out, 1, fp32=fp32)

    def forward(self, x: Float[Tensor, "b c_in h w"]) -> Float[Tensor, "b c_out h w"]:
        return self.conv(F.relu(x))


def _groups(
    config: DVAEConfig, c_in: int, widths: list[int], kernels: tuple[int, int, int, int], resize: nn.Module
) -> dict[str, nn.Module]:
    """The groups of resblocks; every one but the last ends in `resize`."""
    groups: dict[str, nn.Module] = {}
    for g, width in enumerate(widths):
        parts: dict[str, nn.Module] = {}
        for b in range(config.blocks_per_group):
            parts[f"block_{b + 1}"] = ResBlock(c_in, width, kernels, config.resblock_gain)
            c_in = width
        if g < len(widths) - 1:
            parts["resize"] = resize
        groups[f"group_{g + 1}"] = nn.Sequential(OrderedDict(parts))
    return groups


class Encoder(nn.Module):
    """Mapped pixels → logits over the codes."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        widths = [config.hidden * 2**g for g in range(config.groups)]
        self.patch = config.patch
        kernel = 7 if config.patch == 1 else 3  # patches are wide enough on their own
        self.blocks = nn.Sequential(
            OrderedDict(
                {
                    "input": Conv2d(3 * config.patch**2, config.hidden, kernel),
                    **_groups(config, config.hidden, widths, (3, 3, 3, 1), nn.MaxPool2d(2)),
                    "output": Output(widths[-1], config.vocab_size, fp32=True),
                }
            )
        )

    def forward(self, mapped: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b v grid grid"]:
        return self.blocks(F.pixel_unshuffle(mapped, self.patch))


class Decoder(nn.Module):
    """Codes, relaxed or hard → the parameters μ and ln b of every pixel's distribution."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.patch = config.patch
        widths = [config.hidden * 2**g for g in reversed(range(config.groups))]
        upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.blocks = nn.Sequential(
            OrderedDict(
                {
                    "input": Conv2d(config.vocab_size, config.codebook_width, 1, fp32=True),
                    **_groups(config, config.codebook_width, widths, (1, 3, 3, 3), upsample),
                    "output": Output(config.hidden, 6 * config.patch**2),
                }
            )
        )

    def forward(self, codes: Float[Tensor, "b v grid grid"]) -> Float[Tensor, "b 6 h w"]:
        return F.pixel_shuffle(self.blocks(codes), self.patch)

    def look_up(self, codes: Int[Tensor, "b grid grid"]) -> Float[Tensor, "b 6 h w"]:
        """The same for hard codes: a row of the first layer's table instead of a one-hot product.

        The channels stay last in memory, as in a one-hot tensor: the same bits, and faster on CPUs.
        """
        table: Any = self.blocks.input
        y = F.embedding(codes, table.w[:, :, 0, 0].t()) + table.b
        return F.pixel_shuffle(self.blocks[1:](y.permute(0, 3, 1, 2)), self.patch)


class DVAE(nn.Module):
    """Pixels in [0, 1] ↔ a grid of codes."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        seed = draw_seed()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.threads = Threads(1)
        draw_weights(((m.w, m.spread) for m in self.modules() if isinstance(m, Conv2d)), seed)

    @classmethod
    def load(cls, folder: Path | str, device: torch.device | str = "cpu") -> "DVAE":
        """The model in `folder` (R/dvae), ready to encode and decode.

        Raises:
            CheckpointError: there is none, it is damaged, or its parts do not fit.
            ConfigError: its config.json describes another kind of model.
        """
        return load_model(Path(folder), cls, DVAEConfig, torch.device(device))

    def for_speed(self) -> "DVAE":
        """The same model, with channels last in memory and pictures shared out to the threads of a CPU.

        Another order of sums: what it computes differs from the released form in the last bits.
        """
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.share_out()
        return self

    def share_out(self) -> None:
        """Let the threads of a CPU have pictures of their own."""
        self.threads = Threads(cores(next(self.parameters()).device))

    def logits(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b v grid grid"]:
        """Unnormalised log-probabilities of the codes, fp32.

        Raises:
            ValueError: pixels of another shape or type.
        """
        return self.encoder(self._mapped(pixels))

    def recompute(self) -> None:
        """Train with less memory and a third more time: no resblock keeps what it computes inside."""
        for module in self.modules():
            if isinstance(module, ResBlock):
                module.recompute = True

    def _mapped(self, pixels: Tensor) -> Tensor:
        size = self.config.image_size
        if pixels.shape[1:] != (3, size, size) or pixels.dtype != torch.float32:
            raise ValueError(
                f"expected float32 pixels of shape (batch, 3, {size}, {size}), "
                f"got {pixels.dtype} of shape {tuple(pixels.shape)}"
            )
        return map_pixels(pixels)

    def codebook(self) -> Float[Tensor, "v c"]:
        """The decoder's vector for every code: rows of its first layer."""
        table: Any = self.decoder.blocks.input
        return table.w.detach()[:, :, 0, 0].t()

    @torch.no_grad()
    @fp32_products("ieee")
    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b grid grid"]:
        """The most probable code of every cell (no noise: paper, §2.2).

        fp32 layers multiply their operands as they are, also where training in bf16 rounds them: codes that
        decode almost alike are told apart by the last digits of their logits. The resblocks run in the
        precision that the caller has set.

        Raises:
            ValueError: pixels of another shape or type.
        """

        def of_some(pixels: Tensor) -> Tensor:
            return most_probable(self.logits(pixels).permute(0, 2, 3, 1))

        return self.threads.apply(of_some, pixels)

    def decode(self, codes: Int[Tensor, "b grid grid"]) -> Float[Tensor, "b 3 h w"]:
        """The picture for given codes, pixels in [0, 1].

        Raises:
            ValueError: codes of another shape, or outside the vocabulary.
        """
        grid, vocab = self.config.grid, self.config.vocab_size
        if codes.shape[1:] != (grid, grid):
            raise ValueError(f"expected codes of shape (batch, {grid}, {grid}), got {tuple(codes.shape)}")
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= vocab):
            raise ValueError(
                f"expected codes from 0 to {vocab - 1}, got {int(codes.min())} to {int(codes.max())}"
            )
        return reconstruction(self.threads.apply(self.decoder.look_up, codes))


def most_probable(logits: Float[Tensor, "*n v"]) -> Int[Tensor, "*n"]:
    """The argmax over the codes, in two steps: first the best of 64 in a row, then the one among them.

    A maximum takes a tenth of an argmax's time, which on a CPU looks at one logit after the other.
    """
    at_once = math.gcd(64, logits.shape[-1])
    runs = logits.unflatten(-1, (-1, at_once))
    run = runs.amax(-1).argmax(-1)
    best = runs.take_along_dim(run[..., None, None], -2).squeeze(-2)
    return run * at_once + best.argmax(-1)


@torch.no_grad()
def matrix_flops(model: DVAE) -> int:
    """Of the convolutions that encode one picture and decode its relaxed codes, as PyTorch counts them."""
    size = model.config.image_size
    with FlopCounterMode(display=False) as counter:
        model.decoder(model.logits(torch.zeros(1, 3, size, size, device=next(model.parameters()).device)))
    return int(counter.get_total_flops())
