"""The prior's cross-entropy: an eighth for the text, the rest for the picture."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dalle.precision import as_they_are
from dalle.threads import Threads
from stage2_prior.model import Prior

# Logits held at a time: what a core's cache holds; enough for a GPU. Products in bf16 want more rows, since
# each of them rounds the whole head anew.
AT_ONCE = {"cpu": 2**19, "cuda": 2**26}
AT_ONCE_IN_BF16 = 2**21


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
        text, image = model(tokens, codes, tables, hidden)
        real, words_head = tokens >= 0, model.text_head
        return torch.stack([
            cross_entropy(text[:, :-1][real], words_head.weight, words_head.bias, tokens[real]),
            cross_entropy(image.flatten(0, 1), tables.head, model.image_head.bias, codes.flatten()),
        ])[None]  # fmt: skip

    threads = threads or Threads(1)
    behind = {id(p) for p in model.of_codes()}  # the tables
    parameters = [*tables, *(p for p in model.parameters() if id(p) not in behind)]
    columns = (tokens, codes) if hidden is None else (tokens, codes, hidden)
    text, image = threads.apply(sums, *columns, parameters=parameters).sum(0)
    shared = int((tokens >= 0).sum()) if words is None else words
    return text / (shared or 1), image / codes.numel()


def cross_entropy(
    states: Float[Tensor, "n w"],
    weight: Float[Tensor, "v w"],
    bias: Float[Tensor, " v"],
    targets: Int[Tensor, " n"],
    at_once: int | None = None,
) -> Float[Tensor, ""]:
    """Sum of −ln p(target) over the rows, in fp32 whatever the rest runs in (paper, App. D).

    The logits, the largest tensors of a step, are made for some rows at a time and used up at once: the
    gradient is computed with them, so neither they nor their softmax are ever held or computed again.

    Args:
        at_once: how many logits; what suits the device unless it is given.
    """
    rows = max(1, (at_once or _at_once(states.device)) // len(weight))
    total: Tensor = _CrossEntropy.apply(states.float(), weight.float(), bias.float(), targets, rows)
    return total


def _at_once(device: torch.device) -> int:
    in_bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return AT_ONCE_IN_BF16 if device.type == "cpu" and in_bf16 else AT_ONCE[device.type]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: int) -> Tensor:
        total, wanted = states.new_zeros(()), any(ctx.needs_input_grad)
        if wanted:
            # The first rows overwrite the table: to fill it with 0 takes as long as a product.
            table = torch.empty_like(weight) if len(states) else torch.zeros_like(weight)
            grads = [torch.empty_like(states), table, torch.zeros_like(bias)]
        with as_they_are(states.device):
            for at in range(0, len(states), rows):
                x, target = states[at : at + rows], targets[at : at + rows, None]
                logits = torch.addmm(bias, x, weight.t())
                p = torch.softmax(logits, 1)
                # ln Σ exp from the largest entry, whose probability cannot underflow
                total += (logits.amax(1) - p.amax(1).log()).sum() - logits.gather(1, target).sum()
                if wanted:
                    grad = p.scatter_add_(1, target, p.new_full(target.shape, -1.0))
                    torch.mm(grad, weight, out=grads[0][at : at + rows])
                    grads[1].addmm_(grad.t(), x, beta=float(at > 0))
                    grads[2] += grad.sum(0)
        ctx.save_for_backward(*(grads if wanted else ()))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(grad * g for g in ctx.saved_tensors), None, None
