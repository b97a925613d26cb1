"""AdamW against the book, and the averaged weights."""

import math

import pytest
import torch
from torch import nn

from dalle.optim import AdamW, Average

BETAS, DECAY = (0.9, 0.96), 4.5e-2  # the paper's, App. B.2


class Book:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) with the paper's limit, one number at a time."""

    def __init__(self, model, betas=BETAS, decay=DECAY, limit=math.inf):
        self.betas, self.decay, self.limit, self.t = betas, decay, limit, 0
        self.weights = {n: p.detach().double().flatten().tolist() for n, p in model.named_parameters()}
        self.m = {n: [0.0] * len(w) for n, w in self.weights.items()}
        self.v = {n: [0.0] * len(w) for n, w in self.weights.items()}
        self.decayed = {n for n, p in model.named_parameters() if p.ndim > 1}

    def step(self, grads, lr):
        self.t += 1
        b1, b2 = self.betas
        for name, weights in self.weights.items():
            for i, g in enumerate(grads[name].double().flatten().tolist()):
                m = self.m[name][i] = b1 * self.m[name][i] + (1 - b1) * g
                v = self.v[name][i] = min(b2 * self.v[name][i] + (1 - b2) * g * g, self.limit)
                update = (m / (1 - b1**self.t)) / (math.sqrt(v / (1 - b2**self.t)) + 1e-8)
                if name in self.decayed:
                    update += self.decay * weights[i]
                weights[i] -= lr * update

    def check(self, model):
        for name, p in model.named_parameters():
            expected = torch.tensor(self.weights[name], dtype=torch.float64)
            torch.testing.assert_close(p.detach().double().flatten(), expected, rtol=1e-5, atol=1e-6)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3), nn.Linear(3, 2))


def gradients(model, seed, norm=1.0):
    """Random gradients of a given joint norm, with one entry that holds most of it."""
    noise = torch.Generator().manual_seed(seed)
    grads = {n: 0.05 * torch.randn(p.shape, generator=noise) for n, p in model.named_parameters()}
    grads["0.weight"][1, 2] = 1.0
    total = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
    return {n: g * norm / total for n, g in grads.items()}


def step(model, optimizer, grads, lr):
    for name, p in model.named_parameters():
        p.grad = grads[name].clone(memory_format=torch.preserve_format)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.grad_norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("betas", [BETAS, (0.8, 0.999)])
def test_it_is_adamw_by_the_book(betas):
    model = net()
    optimizer, book = AdamW(model, betas=betas, weight_decay=DECAY), Book(model, betas)
    for t in range(7):
        lr, grads = 1e-2 / (t + 1), gradients(model, t)
        step(model, optimizer, grads, lr)
        book.step(grads, lr)
        book.check(model)


def test_gains_and_biases_are_not_decayed_and_matrices_are():
    model = net()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = AdamW(model, betas=BETAS, weight_decay=0.5)
    step(model, optimizer, {n: torch.zeros_like(p) for n, p in before.items()}, lr=0.1)
    for name, p in model.named_parameters():
        factor = 0.95 if p.ndim > 1 else 1.0  # 1 − lr·decay, free of the gradient: decoupled
        torch.testing.assert_close(p.detach(), before[name] * factor)


def test_the_running_variance_is_limited_to_5_before_both_updates():
    model = net()
    optimizer = AdamW(model, betas=BETAS, weight_decay=DECAY, variance_limit=5.0)
    book, free = Book(model, limit=5.0), Book(model)
    for t in range(40):
        # at the clipped norm of 4 the variance tends to 16; the pauses let it fall below 5 again
        grads = gradients(model, t, norm=4.0 if t % 20 < 15 else 0.3)
        for each in (book, free):
            each.step(grads, 1e-2)
        step(model, optimizer, grads, 1e-2)
        book.check(model)
        largest = optimizer.state[model[0].weight]["exp_avg_sq"].max().item()
        assert largest == pytest.approx(max(book.v["0.weight"]), rel=1e-5)
        if t == 14:
            assert largest == pytest.approx(5.0, rel=1e-6)
            assert max(free.v["0.weight"]) > 6
    with pytest.raises(AssertionError):
        free.check(model)


def test_without_a_limit_variances_grow_freely():
    model = net()
    optimizer, book = AdamW(model, betas=BETAS, weight_decay=DECAY), Book(model)
    for t in range(20):
        grads = gradients(model, t, norm=4.0)
        step(model, optimizer, grads, 1e-2)
        book.step(grads, 1e-2)
    book.check(model)
    assert optimizer.state[model[0].weight]["exp_avg_sq"].max() > 6


def test_saved_moments_continue_bit_exactly():
    straight = net()
    optimizer = AdamW(straight, betas=BETAS, weight_decay=DECAY, variance_limit=5.0)
    for t in range(4):
        step(straight, optimizer, gradients(straight, t, norm=4.0), 1e-2)
    resumed = net(seed=1)
    resumed.load_state_dict(straight.state_dict())
    again = AdamW(resumed, betas=BETAS, weight_decay=DECAY, variance_limit=5.0)
    saved = {name: moment.clone() for name, moment in optimizer.moments().items()}
    assert set(saved) == {
        f"{n}/{kind}" for n, _ in straight.named_parameters() for kind in ("step", "exp_avg", "exp_avg_sq")
    }
    again.load_moments(saved.items())
    for t in range(4, 9):
        for model, each in ((straight, optimizer), (resumed, again)):
            step(model, each, gradients(model, t, norm=4.0), 1e-2)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(moment, again.moments()[name]) for name, moment in optimizer.moments().items())


def test_moments_of_channels_last_weights_continue_bit_exactly():
    """The fused kernel reads memory in order; files hold tensors contiguous."""

    def conv():
        torch.manual_seed(0)
        return nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)

    def train(model, optimizer, steps):
        for t in steps:
            torch.manual_seed(t)
            pixels = torch.randn(2, 3, 7, 5).to(memory_format=torch.channels_last)
            model(pixels).square().mean().backward()
            step(model, optimizer, {n: p.grad for n, p in model.named_parameters()}, 0.1)

    straight, resumed = conv(), conv()
    optimizer, again = (AdamW(m, betas=BETAS, weight_decay=DECAY) for m in (straight, resumed))
    train(straight, optimizer, range(2))
    resumed.load_state_dict(straight.state_dict())
    again.load_moments((name, moment.contiguous().clone()) for name, moment in optimizer.moments().items())
    train(straight, optimizer, range(2, 4))
    train(resumed, again, range(2, 4))
    assert not straight.weight.is_contiguous()
    assert torch.equal(straight.weight, resumed.weight)


def test_a_parameter_without_saved_moments_starts_afresh():
    model = net()
    optimizer = AdamW(model, betas=BETAS, weight_decay=DECAY)
    optimizer.load_moments([])
    book, grads = Book(model), gradients(model, 0)
    step(model, optimizer, grads, 1e-2)
    book.step(grads, 1e-2)
    book.check(model)


def test_frozen_parameters_are_left_out():
    model = net()
    model[0].requires_grad_(False)
    optimizer = AdamW(model, betas=BETAS, weight_decay=DECAY)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4


def test_the_average_by_hand():
    weights = [torch.tensor([1.0, 8.0])]
    average = Average(weights, decay=0.99, every=1)
    expected = weights[0].clone()
    for n in range(1, 6):
        weights = [torch.tensor([float(n), -float(n)])]
        decay = (1 + n) / (10 + n)
        expected = decay * expected + (1 - decay) * weights[0]
        average.update(weights, n)
        torch.testing.assert_close(average.weights[0], expected)


def test_the_averages_decay_ends_at_its_own():
    average = Average([torch.zeros(1)], decay=0.5, every=1)
    average.update([torch.ones(1)], 8)  # (1+8)/(10+8) = ½
    assert average.weights[0].item() == pytest.approx(0.5)
    average.update([torch.ones(1)], 900)
    assert average.weights[0].item() == pytest.approx(0.75)


def test_the_average_copies_at_every_25th_update_only():
    average = Average([torch.zeros(1)], decay=0.99, every=25)
    moved = []
    for t in range(1, 101):
        before = average.weights[0].clone()
        average.update([torch.full((1,), float(t))], t)
        if not torch.equal(before, average.weights[0]):
            moved.append(t)
    assert moved == [25, 50, 75, 100]
    expected = 0.0
    for n in (1, 2, 3, 4):  # counted in copies, not in updates
        expected += (1 - (1 + n) / (10 + n)) * (25 * n - expected)
    assert average.weights[0].item() == pytest.approx(expected)


def test_the_average_is_fp32_and_does_not_move_with_the_weights():
    weights = [torch.ones(3, dtype=torch.bfloat16)]
    average = Average(weights, decay=0.9, every=1)
    weights[0].zero_()
    assert average.weights[0].dtype == torch.float32
    assert torch.equal(average.weights[0], torch.ones(3))


def test_weights_in_16_bits_enter_the_average_as_those_in_fp32_do():
    average = Average([torch.zeros(2).half(), torch.zeros(1)], decay=0.99, every=1)
    average.update([torch.full((2,), 11.0).half(), torch.full((1,), 11.0)], 1)  # by 1 − 2/11
    torch.testing.assert_close(torch.cat(average.weights), torch.full((3,), 9.0))
