"""Drawing: one code after another, each given the text and the codes before."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle.errors import ConfigError
from dalle.text import NO_TOKEN
from dalle.threads import using
from stage2_prior.decode import Decoder, Text

COLD = 1e-6  # below this temperature logits over it overflow, and the likeliest code is drawn anyway


@dataclass(frozen=True)
class Sampling:
    """How a code is drawn from its distribution. The paper draws with temperature 1 and no cuts (§3.1).

    Classifier-free guidance g makes the logits u + g·(c − u), c those given the caption and u those given
    none (Ho and Salimans 2021, arXiv:2207.12598): beyond 1 what the caption asks for counts more. The paper
    has none. For top_p and guidance None stands for the run's own (see `TextToImage.resolve`), and 1 does
    nothing.
    """

    temperature: float = 1.0  # 0: always the most probable code
    top_k: int | None = None  # only the k most probable codes
    top_p: float | None = None  # only the most probable codes that together reach probability p
    guidance: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature} must be a number of at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.guidance is not None and not 0 <= self.guidance < float("inf"):
            raise ConfigError(f"guidance={self.guidance} must be a number of at least 0")

    @property
    def texts(self) -> int:
        """How many texts a picture is drawn from: with guidance its caption and the empty one."""
        return 1 if self.guidance in (None, 1) else 2


def noise(seed: int, pictures: range, cells: int) -> Float[Tensor, "n cells"]:
    """One number in [0, 1) for every cell of every picture, a function of (seed, picture, cell) alone.

    So picture 3 of 16 is picture 3 of 4, whatever is drawn together with it.
    """
    rows = [np.random.default_rng((seed, picture)).random(cells, dtype=np.float32) for picture in pictures]
    return torch.from_numpy(np.stack(rows))


def choose_codes(
    logits: Float[Tensor, "b v"], uniform: Float[Tensor, " b"], how: Sampling
) -> Int[Tensor, " b"]:
    """Draw a code from each row: the one in whose share of [0, 1) the row's uniform number falls."""
    if how.temperature < COLD or how.top_k == 1:
        return logits.argmax(-1)
    if how.temperature != 1:
        logits = logits / how.temperature
    if how.top_k is not None and how.top_k < logits.shape[-1]:
        # By place, not by value: of coarse logits several may be equal to the least of the k.
        kept = logits.topk(how.top_k, dim=-1).indices
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept, logits.gather(-1, kept))
    p = torch.softmax(logits, -1)
    if how.top_p is not None and how.top_p < 1:
        p = p.masked_fill(p < _least(p, how.top_p), 0.0)
    edges = p.contiguous().cumsum(-1, dtype=torch.float64)
    end = edges[:, -1:].contiguous()
    drawn = torch.searchsorted(edges, uniform[:, None] * end, right=True)
    # A uniform number rounded up to the last edge would fall beyond it, or onto codes of probability 0.
    return torch.minimum(drawn, torch.searchsorted(edges, end))[:, 0]


def _least(p: Float[Tensor, "b v"], together: float) -> Float[Tensor, "b 1"]:
    """Of each row's most probable codes that together reach `together`, the probability of the last.

    Codes that are as probable as that one stay as well: none of them comes first.
    """
    # numpy sorts 25 times as fast, since it leaves out the places
    ordered = p.sort(-1).values if p.is_cuda else torch.from_numpy(np.sort(p.numpy(), -1))
    sums = ordered.cumsum(-1)
    above = sums[:, -1:] - sums  # 0 for the most probable code, which always stays
    return ordered.gather(-1, (above >= together).sum(-1, keepdim=True))


def read(decoder: Decoder, tokens: Int[Tensor, "prompts words"], how: Sampling) -> Text:
    """Keys and values of p prompts, and of as many empty ones behind them where drawing so needs them."""
    return decoder.read(torch.cat([tokens, torch.full_like(tokens, NO_TOKEN)][: how.texts]))


@torch.inference_mode()
def draw(
    decoder: Decoder, text: Text, uniform: Float[Tensor, "b cells"], how: Sampling
) -> Iterator[Int[Tensor, " b"]]:
    """Draw b = p·n pictures, n of each prompt in turn; yields the codes cell by cell, in raster order.

    On a GPU nothing waits for the host but the end of a row.

    Args:
        text: p prompts, as `read` gives them.
        uniform: the noise, one row a picture (see `noise`).

    Raises:
        ConfigError: the logits are not finite: the model's weights are broken.
    """
    cells, grid, device = decoder.config.cells, decoder.config.grid, decoder.device
    pictures, prompts = len(uniform), text[0].shape[1] // how.texts
    state = decoder.state(text, pictures // prompts)
    uniform = uniform.t().contiguous().to(device)
    codes = torch.full((how.texts, pictures), decoder.start, device=device)
    slot = torch.zeros(1, dtype=torch.long, device=device)
    sums = torch.zeros(cells, device=device)  # of all logits of a cell: one infinity or NaN is enough

    def one_cell() -> None:
        logits = decoder.step(codes.view(-1), state, slot)
        if how.guidance is not None and how.texts == 2:
            given, without = logits.chunk(2)
            logits = torch.lerp(without, given, how.guidance)
        sums.index_copy_(0, slot, logits.sum()[None])
        codes.copy_(choose_codes(logits, uniform.index_select(0, slot).view(-1), how))
        slot.add_(1)

    def start_over() -> None:
        codes.fill_(decoder.start)
        slot.zero_()

    checked = 1 if device.type == "cpu" else grid  # cells between two looks at `sums`
    go = one_cell if device.type == "cpu" else _recorded(one_cell, start_over, device)
    for cell in range(cells):
        with using(decoder.threads):
            go()
        if (cell + 1) % checked == 0 and not math.isfinite(sums[cell + 1 - checked : cell + 1].sum()):
            broken = int(sums.isfinite().int().argmin())
            raise ConfigError(f"the prior's logits are not finite at cell {broken}: its weights are broken")
        yield codes[0].clone()


def _recorded(
    step: Callable[[], None], start_over: Callable[[], None], device: torch.device
) -> Callable[[], None]:
    """`step` as a CUDA graph: its hundreds of small kernels are launched at once.

    It runs a few times first, as recording demands, and `start_over` undoes that.
    """
    with torch.cuda.device(device):  # on any other one nothing would be recorded
        beside = _stream(device)
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(3):
                start_over()
                step()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=beside, capture_error_mode="thread_local"):  # others may work
            step()
    start_over()
    return graph.replay


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one on which all drawings are recorded: cuBLAS keeps memory for each stream that it met."""
    return torch.cuda.Stream(device)
