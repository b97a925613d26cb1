"""What the prior minimises."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dalle.precision import arithmetic
from dalle.runs import StageRun
from dalle.scenes.source import Scenes
from dalle.text import cut_or_pad
from dalle.threads import Threads, using
from stage2_prior import loss
from stage2_prior.config import PRESETS, PriorTraining
from stage2_prior.loss import losses, weighted
from stage2_prior.train import Codec, Stage2, _prepare
from tests import oracles, tiny


def by_hand(model, tokens, codes) -> tuple[list[float], list[float]]:
    """Cross-entropies of all the words there are, and of all cells."""
    words, cells = [], []
    for caption, picture in zip(tokens, codes, strict=True):
        caption, picture = oracles.numbers(caption), oracles.numbers(picture)
        text, image = oracles.Prior(model).logits(caption, picture)
        words += [oracles.cross_entropy(text[i], token) for i, token in enumerate(caption) if token >= 0]
        cells += [oracles.cross_entropy(image[i], code) for i, code in enumerate(picture)]
    return words, cells


def test_each_loss_is_the_mean_over_the_tokens_of_its_kind():
    model = tiny.prior(grid=2)
    tokens, codes = tiny.batch(model, 4)
    words, cells = by_hand(model, tokens, codes)
    assert (len(words), len(cells)) == (0 + 2 + 4 + 6, 4 * 4)
    text, image = losses(model, tokens, codes)
    assert text.item() == pytest.approx(sum(words) / 12, rel=1e-5)
    assert image.item() == pytest.approx(sum(cells) / 16, rel=1e-5)


def test_a_caption_shorter_or_longer_weighs_by_its_words():
    model = tiny.prior(grid=2)
    tokens, codes = tiny.batch(model, 4)
    sums = [
        losses(model, t[None], c[None])[0].item() * int((t >= 0).sum())
        for t, c in zip(tokens, codes, strict=True)
    ]
    assert losses(model, tokens, codes)[0].item() == pytest.approx(sum(sums) / 12, rel=1e-5)


def test_captions_without_a_word_cost_nothing():
    model = tiny.prior(grid=2)
    tokens, codes = tiny.batch(model, 1)
    text, image = losses(model, tokens, codes)
    assert text.item() == 0
    (text + image).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_padding_is_no_target_but_is_seen():
    model = tiny.prior(grid=2)
    tokens, codes = tiny.batch(model, 3)
    text, image = losses(model, tokens[1:2], codes[1:2])
    text.backward(retain_graph=True)
    assert not model.padding.weight.grad.any()  # it stands behind all words
    image.backward()
    empty = (tokens[1] < 0).tolist()
    assert [bool(row.any()) for row in model.padding.weight.grad] == [False, *empty]


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("held", [1, 13, 2 * 13, 3 * 13 + 1, 1000])
def test_cross_entropy_a_few_rows_at_a_time_is_torchs(rows, held, monkeypatch):
    monkeypatch.setitem(loss.AT_ONCE, "cpu", held)
    random = torch.Generator().manual_seed(rows)
    head = torch.nn.Linear(5, 13)
    tiny.randomise(head)
    states = (9 * torch.randn(rows, 5, generator=random)).requires_grad_()  # some logits far apart
    targets = torch.randint(13, (rows,), generator=random)
    ours = loss.cross_entropy(states, head.weight, head.bias, targets)
    torchs = F.cross_entropy(head(states), targets, reduction="sum")
    torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-6)
    inputs = (states, head.weight, head.bias)
    expected = torch.autograd.grad(0.3 * torchs, inputs)
    found = torch.autograd.grad(0.3 * ours, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "products"), [(torch.enable_grad, 3), (torch.no_grad, 1), (torch.inference_mode, 1)]
)
def test_no_gradient_is_computed_where_none_is_wanted(mode, products):
    """A Function is told that parameters need gradients, even where these are off."""
    states, weight = torch.randn(6, 5), torch.randn(7, 5).requires_grad_()
    with mode(), FlopCounterMode(display=False) as counter:
        loss.cross_entropy(states, weight, torch.zeros(7, requires_grad=True), torch.arange(6))
    assert counter.get_total_flops() == products * 2 * 6 * 5 * 7


@pytest.mark.parametrize("sure", [0.0, 9.0])
def test_cross_entropy_in_bf16_rounds_the_gradient_and_never_swamps_it(sure):
    """Of a target that is all but certain, too: its gradient is a small difference of large numbers."""
    random = torch.Generator().manual_seed(1)
    head = torch.nn.Linear(16, 70)
    torch.nn.init.normal_(head.weight, generator=random)
    targets = torch.randint(70, (40,), generator=random)
    states = torch.randn(40, 16, generator=random) + sure / 16 * head.weight[targets].detach()
    states = states.bfloat16().float().requires_grad_()  # what is rounded besides is not the matter here
    with torch.no_grad():
        head.weight.copy_(head.weight.bfloat16())
    inputs = (states, head.weight, head.bias)
    exact = F.cross_entropy(head(states), targets, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss.cross_entropy(states, head.weight, head.bias, targets, at_once=16 * 70)
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)
    expected, found = torch.autograd.grad(exact, inputs), torch.autograd.grad(ours, inputs)
    for one, other in zip(expected, found, strict=True):
        assert (one - other).norm() < 0.005 * one.norm()
    by_row = (expected[0] - found[0]).norm(dim=1) / expected[0].norm(dim=1)
    assert by_row.max() < 0.02


@pytest.mark.parametrize("channels", [0, 5])
def test_on_threads_losses_and_gradients_are_those_of_the_whole_batch(channels):
    model = tiny.prior(grid=2, code_channels=channels)
    tokens, codes = tiny.batch(model, 4)  # captions of 0, 2, 4 and 6 words: no two halves have as many
    parameters = [*model.parameters()]

    def passed(threads):
        text, image = losses(model, tokens, codes, threads=threads)
        return text, image, *torch.autograd.grad(text / 8 + image, parameters)

    torch.testing.assert_close(passed(Threads(2)), passed(None), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("precision", "limit"), [("bf16", 0.01), ("fp16", 0.0015)])
@pytest.mark.parametrize("channels", [0, 5])
@pytest.mark.parametrize("backend", ["dense", "block"])
def test_gradients_in_16_bits_are_those_of_fp32_but_for_rounding(precision, limit, channels, backend):
    """2^-9 or 2^-12 in each of some dozen products: 0.4 % and 0.05 % of all were measured, and up to 2 % and
    0.3 % of one parameter's."""
    model = tiny.prior(code_channels=channels)
    model.attend_by(backend)
    tokens, codes = tiny.batch(model, 4)

    def loss(model):
        text, image = losses(model, tokens, codes)
        return text / 8 + 7 * image / 8

    exact, found = (tiny.gradients(model, PriorTraining(batch_size=4), p, loss) for p in ("fp32", precision))
    assert 1e-4 < tiny.apart(found.values(), exact.values()) < limit
    assert max(tiny.apart([found[name]], [exact[name]]) for name in exact) < 4 * limit


def stage(tmp_path, model, precision="fp32", **settings) -> Stage2:
    training = PriorTraining(precision=precision, **settings)
    plan = StageRun(tmp_path, "tiny", "scenes", model.config, training, resumed=False)
    grid = model.config.grid
    dvae = Codec(
        16, grid, 13, lambda p: (p[:, 0, :grid, :grid] * 12).round().long(), lambda c: c, torch.eye(13), "0"
    )
    words = tiny.tokenizer()
    heldout = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    tokens = torch.from_numpy(cut_or_pad(words.encode("red"), model.config.text_length - 1)[0]).repeat(2, 1)
    return Stage2(model, plan, dvae, words, (heldout, tokens), ["red"], precision)


@pytest.mark.parametrize(("weights", "threads"), [("fp32", 2), ("fp16", 1)])
def test_gradients_that_are_gathered_beside_autograd_come_from_one_thread(weights, threads, tmp_path):
    with using(2):
        task = stage(tmp_path, tiny.prior(text_vocab=280), "fp16", moments="16bit", weights=weights)
    assert task.threads.count == threads


def test_the_text_counts_one_eighth_and_the_picture_seven():
    nothing, eight = torch.tensor(0.0), torch.tensor(8.0)
    assert weighted(eight, nothing).item() == 1
    assert weighted(nothing, eight).item() == 7
    assert weighted(eight, torch.tensor(4.0), text_weight=0.25).item() == 5


def test_a_picture_has_the_same_codes_in_training_and_held_out(tmp_path):
    """Codes that decode alike differ by the last digits of their logits, which other types would change."""
    task, types = stage(tmp_path, tiny.prior(text_vocab=280), "bf16"), []

    def encode(pixels):
        types.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return torch.zeros(len(pixels), 4, 4, dtype=torch.long)

    task.codec.encode = encode
    pixels = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    task.encode(pixels)
    with arithmetic("bf16", torch.device("cpu")):
        task.encode(pixels)
    assert types == [torch.bfloat16] * 2


def test_every_preset_keeps_the_papers_weights():
    assert {training.text_weight for _, training in PRESETS.values()} == {1 / 8}


@pytest.mark.parametrize("text_weight", [1 / 8, 0.5])
def test_the_loss_of_a_batch_is_that_of_the_dvaes_codes_in_raster_order(tmp_path, text_weight):
    model = tiny.prior(text_vocab=280)
    task = stage(tmp_path, model, text_weight=text_weight)
    tokens, codes = tiny.batch(model, 3)
    pixels = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
    # Bytes that the stand-in dVAE encodes as these codes.
    pixels[:, 0, :4, :4] = (codes.reshape(3, 4, 4) / 12 * 255).round().byte()
    hidden = torch.arange(16).expand(3, -1) == 4
    batch = (pixels, tokens, torch.tensor([True, False, False]), hidden)
    task.begin([batch], lambda function, *arguments: function(*arguments))
    loss, metrics = task.loss(batch, step=0, positions=range(3))
    text, image = losses(model, tokens, codes)
    expected = text_weight * text.item() + (1 - text_weight) * image.item()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert metrics["text_loss"].item() == pytest.approx(text.item())
    assert metrics["image_loss"].item() == pytest.approx(image.item())
    bits = image.item() * 16 / math.log(2)
    assert metrics["image_bits_per_picture"].item() == pytest.approx(bits)
    assert (task.cut, task.seen) == (1, 3)
    task.config = replace(task.config, code_dropout=0.1)
    _, metrics = task.loss(batch, step=0, positions=range(3))
    assert metrics["image_loss"].item() == pytest.approx(
        losses(model, tokens, codes, hidden=hidden)[1].item()
    )
    assert metrics["image_loss"].item() != pytest.approx(image.item())


def test_captions_are_left_out_as_often_as_asked():
    tokenizer, drawings = tiny.tokenizer(), Scenes("train", 16)

    def words(i: int, left_out: float) -> int:
        _, tokens, cut, hidden = _prepare(
            drawings[i],
            np.random.default_rng(i),
            tokenizer,
            size=16,
            words=99,
            cells=16,
            bpe_dropout=0.1,
            caption_dropout=left_out,
            code_dropout=0.0,
        )
        assert not cut
        assert not hidden.any()
        return int((tokens >= 0).sum())

    n, share = 400, 0.25
    bare = [words(i, share) == 0 for i in range(n)]
    assert abs(sum(bare) / n - share) < 4 * (share * (1 - share) / n) ** 0.5
    assert [words(i, share) == 0 for i in range(n)] == bare
    assert all(words(i, 0.0) for i in range(50))
    assert not any(words(i, 1.0) for i in range(50))


def test_codes_are_hidden_as_often_as_asked():
    how = {"size": 16, "words": 99, "cells": 1000, "bpe_dropout": 0.0, "caption_dropout": 0.0}

    def hidden(i: int, share: float) -> torch.Tensor:
        sample = Scenes("train", 16)[i]
        return _prepare(sample, np.random.default_rng(i), tiny.tokenizer(), **how, code_dropout=share)[3]

    assert abs(hidden(0, 0.2).float().mean() - 0.2) < 4 * (0.2 * 0.8 / 1000) ** 0.5
    assert torch.equal(hidden(0, 0.2), hidden(0, 0.2))
    assert not torch.equal(hidden(0, 0.2), hidden(1, 0.2))


@pytest.mark.parametrize("threads", [1, 2])
def test_hidden_codes_are_targets_that_no_slot_sees(threads):
    model = tiny.prior(grid=3)
    tokens, codes = tiny.batch(model, 4)
    hidden = torch.zeros(codes.shape, dtype=torch.bool)
    hidden[1:, 4] = True
    others = torch.where(hidden, (codes + 1) % model.config.image_vocab, codes)
    seen, same = (model(tokens, some, None, hidden) for some in (codes, others))
    assert all(map(torch.equal, seen, same))
    assert not torch.equal(model(tokens, codes)[1], model(tokens, others)[1])

    expected = F.cross_entropy(model.image_logits(seen[1]).flatten(0, 1), codes.flatten())
    _, image = losses(model, tokens, codes, None, Threads(threads), hidden)
    torch.testing.assert_close(image, expected)


def test_pictures_without_captions_have_an_image_loss_alone():
    model = tiny.prior(grid=2)
    tokens, codes = tiny.batch(model, 4)
    text, image = losses(model, torch.full_like(tokens, -1), codes)
    assert text.item() == 0
    assert image.item() == pytest.approx(
        sum(by_hand(model, torch.full_like(tokens, -1), codes)[1]) / 16, rel=1e-5
    )
