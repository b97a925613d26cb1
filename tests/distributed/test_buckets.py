"""Gradients averaged under the backward pass: the same values, sent while the pass goes on."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dalle.buckets import Buckets, average_gradients
from dalle.piece import Piece
from dalle.powersgd import PowerSGD
from tests.distributed.machines import on_machines

pytestmark = pytest.mark.distributed

WORLD, LAYERS, PASSES = 2, 4, 3
ONE_LAYER = 4 * (6 * 6 + 6)  # bytes


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(LAYERS)), nn.Linear(6, 1))


def inputs(rank: int, i: int) -> torch.Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(10 * rank + i))


def record(model: nn.Module, events: list[str]) -> None:
    """Note from now on whose gradient has been made, and when something is sent."""
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, n=name: events.append(n))
    send = dist.all_reduce

    def recorded(*arguments, **options):
        events.append("sent")
        return send(*arguments, **options)

    dist.all_reduce = recorded


def work(rank: int, size: int = ONE_LAYER, left_out: bool = False) -> tuple[dict, list[str]]:
    """Gradients of some backward passes, and what happened in the last of them, in its order."""
    model, events = net(), []
    parameters = list(model.parameters())
    if left_out:
        parameters.insert(2, nn.Parameter(torch.zeros(3)))
    buckets = Buckets(parameters, average_gradients, size=size)
    record(model, events)
    for i in range(PASSES):
        events.clear()
        if i == PASSES - 1:
            buckets.expect()
        model(inputs(rank, i)).square().sum().backward()
        assert i == PASSES - 1 or "sent" not in events
    buckets.finish()
    return {name: p.grad for name, p in model.named_parameters()}, events


def compressed(rank: int) -> tuple[list[float], list[str]]:
    """Norms of two updates, and what happened in the second one's backward pass."""
    model, events = net(), []
    names = {p: name for name, p in model.named_parameters()}
    powersgd = PowerSGD(
        dist.group.WORLD, matrices={name: 1 for name, p in model.named_parameters() if p.dim() > 1},
        rank=1, factors="fp32",
    )  # fmt: skip

    def pieces(parameters):
        return [Piece(names[p], p, p.grad, 0) for p in parameters]

    buckets = Buckets(list(names), lambda some: powersgd.exchange(pieces(some)), size=1)
    norms = []
    for step in (1, 2):
        if step == 2:
            assert powersgd.early
            record(model, events)
            buckets.expect()
        model.zero_grad()
        model(inputs(rank, step)).square().sum().backward()
        if step == 2:
            buckets.finish()
            sent = list(events)
        norms.append(powersgd.reduce(pieces(names), step).norm)
    return norms, sent


def expected() -> dict[str, torch.Tensor]:
    model = net()
    for rank in range(WORLD):
        for i in range(PASSES):
            (model(inputs(rank, i)).square().sum() / WORLD).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def one_gradient(rank):
    return work(rank, size=1)


def all_at_once(rank):
    return work(rank, size=2**20)


def one_left_out(rank):
    return work(rank, left_out=True)


@pytest.mark.parametrize("how", [work, one_gradient, all_at_once, one_left_out])
def test_every_process_has_the_mean_of_all_passes(tmp_path, how):
    for found, _ in on_machines(WORLD, tmp_path, how):
        for name, mean in expected().items():
            torch.testing.assert_close(found[name], mean, msg=lambda m, n=name: f"{n}: {m}")


def test_a_layer_is_sent_before_the_pass_has_come_to_the_ones_below_it(tmp_path):
    for _, events in on_machines(WORLD, tmp_path, work):
        assert events.count("sent") == LAYERS + 1
        for layer in range(1, LAYERS + 1):
            complete = max(events.index(f"{layer}.weight"), events.index(f"{layer}.bias"))
            assert "sent" in events[complete : events.index(f"{layer - 1}.weight")]


def test_factors_travel_while_the_pass_goes_on(tmp_path):
    results = on_machines(WORLD, tmp_path, compressed)
    for norms, events in results:
        assert norms == results[0][0]
        # Above layer 1: the last layer, which is too small to compress, two biases, and twice P and Q
        assert events[: events.index("0.weight")].count("sent") >= 2 + 2 + 2 * 2
        # In all: those, the biases and both factors of two more
        assert events.count("sent") == 2 + 4 + 4 * 2
