"""The prior's cross-entropy, of the text and of the picture."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dalle.precision import as_they_are, rounding
from dalle.threads import Threads
from stage2_prior.model import Prior

# Logits held at a time, at most. On a CPU they are no more than twice the head's weights, which every product
# brings into another order: fewer would cost more of that, more would leave the caches.
AT_ONCE = {"cpu": 2**23, "cuda": 2**26}


def losses(
    model: Prior,
    tokens: Int[Tensor, "b words"],
    codes: Int[Tensor, "b cells"],
    words: float | None = None,
    threads: Threads | None = None,
    hidden: Bool[Tensor, "b cells"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Text and image cross-entropy in nats per token, each a mean over the tokens of its kind.

    Slots without a text token are no targets; each kind has its own head, computed only where it is
    needed. Source: paper, §2.2.

    Args:
        words: what the sum over the text tokens is divided by; their own number unless it is given. Where a
            batch is taken in parts, with the mean number of a part the mean of the parts' losses is the
            batch's, whatever the parts.
        threads: share out the batch; the losses are those of the whole of it.
        hidden: codes that no slot sees; they are targets like all others.
    """
    tables = model.code_tables()  # once for all threads

    def sums(tokens: Tensor, codes: Tensor, hidden: Tensor | None = None) -> Tensor:
        # Before the model runs: a GPU's host waits for this, and then has the whole pass to be ahead again.
        real = (tokens.flatten() >= 0).nonzero()[:, 0]
        text, image = model(tokens, codes, tables, hidden)
        states, targets = text[:, :-1].flatten(0, 1)[real], tokens.flatten()[real]
        return torch.stack([
            cross_entropy(states, model.text_head.weight, model.text_head.bias, targets),
            cross_entropy(image.flatten(0, 1), tables.head, model.image_head.bias, codes.flatten()),
        ])[None]  # fmt: skip

    threads = threads or Threads(1)
    behind = {id(p) for p in model.of_codes()}  # the tables
    parameters = [*tables, *(p for p in model.parameters() if id(p) not in behind)]
    columns = (tokens, codes) if hidden is None else (tokens, codes, hidden)
    text, image = threads.apply(sums, *columns, parameters=parameters).sum(0)
    shared = int((tokens >= 0).sum()) if words is None else words
    return text / (shared or 1), image / codes.numel()


def weighted(text: Tensor, image: Tensor, text_weight: float = 1 / 8) -> Tensor:
    """What is minimised: `text_weight` of the text loss, in the paper 1/8, and the rest of the image loss."""
    return text_weight * text + (1 - text_weight) * image


def cross_entropy(
    states: Float[Tensor, "n w"],
    weight: Float[Tensor, "v w"],
    bias: Float[Tensor, " v"],
    targets: Int[Tensor, " n"],
    at_once: int | None = None,
) -> Float[Tensor, ""]:
    """Sum of −ln p(target) over the rows, in fp32 whatever the rest runs in (paper, App. D).

    The logits, the largest tensors of a step, are made for some rows at a time and used up at once: the
    gradient is computed with them, so neither they nor their softmax are ever held or computed again. Under
    bf16 on a CPU it is rounded for its products, as all others are there.

    Args:
        at_once: how many logits; what suits the device unless it is given.
    """
    most, product = AT_ONCE[states.device.type], torch.bfloat16 if rounding(states.device) else torch.float32
    if states.device.type == "cpu":
        most = min(most, 2 * weight.numel())
    rows = max(1, (at_once or most) // len(weight))
    wanted = product if torch.is_grad_enabled() else None  # which a Function cannot ask inside
    total: Tensor = _CrossEntropy.apply(states.float(), weight.float(), bias.float(), targets, rows, wanted)
    return total


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        rows: int,
        product: torch.dtype | None,  # of the gradient's products; None: no gradient is wanted
    ) -> Tensor:
        total = states.new_zeros(())
        if product is not None:
            of_states, of_weight, of_bias = torch.empty_like(states), None, torch.zeros_like(bias)
            rounded = weight.to(product)
        with as_they_are(states.device):
            for at in range(0, len(states), rows):
                x, target = states[at : at + rows], targets[at : at + rows, None]
                logits = torch.mm(x, weight.t()).add_(bias)  # addmm would write the bias out first
                most, chosen = logits.amax(1), logits.gather(1, target)[:, 0]
                p = torch.softmax(logits, 1, out=logits)
                total += (most - p.amax(1).log() - chosen).sum()  # most − ln p(most) is ln Σ exp
                if product is not None:
                    of_logits = p.scatter_add_(1, target, p.new_full(target.shape, -1))
                    of_bias += of_logits.sum(0)
                    wide = of_logits.to(product)
                    of_states[at : at + rows] = wide @ rounded
                    part = wide.t() @ x.to(product)
                    of_weight = part.float() if of_weight is None else of_weight.add_(part)
        if product is not None:
            of_weight = torch.zeros_like(weight) if of_weight is None else of_weight
            ctx.save_for_backward(of_states, of_weight, of_bias)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(grad * g for g in ctx.saved_tensors), None, None, None
