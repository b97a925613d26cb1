"""The prior against an oracle in plain loops, and what may influence what."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from dalle.errors import ConfigError
from stage2_prior.attention import Attention
from stage2_prior.config import PRESETS, PriorConfig, PriorTraining
from stage2_prior.flops import matrix_flops
from stage2_prior.loss import losses
from stage2_prior.model import MLP, Prior
from tests import oracles, tiny

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # fp32 against float64, logits of about 10
every_kind = pytest.mark.parametrize("kind", ["row", "column", "conv"])


@torch.no_grad()
def logits(model: Prior, tokens: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    text, image = model(tokens, codes)
    return model.text_logits(text), model.image_logits(image)


@every_kind
@torch.no_grad()
def test_attention_equals_loops_over_heads_and_slots(kind):
    config = tiny.prior(grid=3).config
    layer = Attention(config, kind)
    tiny.randomise(layer)
    model = torch.nn.Module()
    model.config, model.it = config, layer
    x = torch.randn(2, config.length, config.width, generator=torch.Generator().manual_seed(1))
    expected = [oracles.Prior(model).attention("it", kind, row.double().numpy()) for row in x]
    torch.testing.assert_close(layer(x).double(), torch.from_numpy(np.stack(expected)), **CLOSE)


@pytest.mark.parametrize(("depth", "grid", "channels"), [(1, 4, 0), (3, 2, 5), (7, 3, 0)])
def test_the_whole_forward_equals_the_oracle(depth, grid, channels):
    model = tiny.prior(depth=depth, grid=grid, code_channels=channels)
    tokens, codes = tiny.batch(model, 3)
    for given, *found in zip(tokens, codes, *logits(model, tokens, codes), strict=True):
        expected = oracles.Prior(model).logits(oracles.numbers(given), oracles.numbers(found.pop(0)))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.double(), torch.from_numpy(theirs), **CLOSE)


def test_a_sample_does_not_depend_on_its_neighbours_in_the_batch():
    model = tiny.prior()
    tokens, codes = tiny.batch(model, 3)
    together = logits(model, tokens, codes)
    for i in range(3):
        for whole, alone in zip(together, logits(model, tokens[i : i + 1], codes[i : i + 1]), strict=True):
            torch.testing.assert_close(whole[i : i + 1], alone, **CLOSE)


@pytest.mark.parametrize("words", [0, 2, 5])
def test_every_empty_text_slot_holds_the_padding_of_its_own_place(words):
    model = tiny.prior()
    tokens = torch.full((1, 6), -1)
    tokens[0, :words] = torch.arange(words)
    table = model.padding.weight + model.text_positions.weight
    embedded = model.embed_text(tokens)[0]
    assert torch.equal(embedded[words + 1 :], table[words + 1 :])
    said = model.text_tokens.weight[:words] + model.text_positions.weight[1 : words + 1]
    assert torch.equal(embedded[1 : words + 1], said)
    assert torch.equal(embedded[0], model.start_of_text + model.text_positions.weight[0])
    assert len({tuple(row.tolist()) for row in model.padding.weight}) == 7  # no two are the same vector


@pytest.mark.parametrize("slot", range(7))
def test_a_padding_vector_counts_exactly_where_its_slot_is_empty(slot):
    model = tiny.prior()
    tokens, codes = tiny.batch(model, 4)
    before = logits(model, tokens, codes)
    with torch.no_grad():
        model.padding.weight[slot] += 1
    after = logits(model, tokens, codes)
    for i, caption in enumerate(tokens):
        empty = slot > 0 and int(caption[slot - 1]) == -1
        assert torch.equal(before[1][i], after[1][i]) is not empty
        assert torch.equal(before[0][i, :slot], after[0][i, :slot])


def test_what_stands_after_the_end_of_a_caption_is_no_token():
    """A caption's length is told by its tokens alone: filling a slot replaces its padding."""
    model = tiny.prior()
    tokens, codes = tiny.batch(model, 1)  # an empty caption
    filled = tokens.clone()
    filled[0, 3] = 0
    short, longer = (logits(model, t, codes) for t in (tokens, filled))
    assert torch.equal(short[0][0, :4], longer[0][0, :4])
    assert not torch.isclose(short[0][0, 4], longer[0][0, 4]).all()


@pytest.mark.parametrize("depth", [1, 3, 5])
@pytest.mark.parametrize("cell", range(16))
def test_a_code_influences_later_slots_only(depth, cell):
    model = tiny.prior(depth=depth)
    tokens, codes = tiny.batch(model, 1)
    before = logits(model, tokens, codes)
    codes[0, cell] = (codes[0, cell] + 1) % 13
    after = logits(model, tokens, codes)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1][:, : cell + 1], after[1][:, : cell + 1])
    if cell < 15:
        assert not torch.isclose(before[1][:, cell + 1], after[1][:, cell + 1]).all()


@pytest.mark.parametrize("word", range(6))
def test_a_word_influences_later_words_and_the_whole_picture(word):
    model = tiny.prior()
    tokens, codes = tiny.batch(model, 2)
    before = logits(model, tokens[1:], codes[1:])
    tokens[1, word] = (tokens[1, word] + 1) % 11
    after = logits(model, tokens[1:], codes[1:])
    assert torch.equal(before[0][:, : word + 1], after[0][:, : word + 1])
    assert not torch.isclose(before[0][:, word + 1], after[0][:, word + 1]).all()
    assert not torch.isclose(before[1], after[1]).all(-1).any()


def test_tokens_and_codes_of_another_shape_are_refused():
    model = tiny.prior()
    tokens, codes = tiny.batch(model, 2)
    for wrong in ((tokens[:, 1:], codes), (tokens, codes[:, 1:])):
        with pytest.raises(ValueError, match=r"expected tokens \(b, 6\) and codes \(b, 16\)"):
            model(*wrong)


def test_before_training_all_tokens_are_equally_likely():
    model = Prior(PriorConfig(**tiny.PRIOR_SHAPE))
    text, image = losses(model, *tiny.batch(model, 3))
    assert text.item() == pytest.approx(math.log(11), abs=1e-6)
    assert image.item() == pytest.approx(math.log(13), abs=1e-6)


def gradients(model: Prior) -> dict[str, Tensor | None]:
    model.zero_grad()
    text, image = losses(model, *tiny.batch(model, 3))
    (text / 8 + 7 * image / 8).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_recomputing_activations_changes_neither_values_nor_gradients():
    model = tiny.prior()
    states, kept = model(*tiny.batch(model, 3)), gradients(model)
    model.recompute = True
    for plain, again in zip(states, model(*tiny.batch(model, 3)), strict=True):
        assert torch.equal(plain, again)
    recomputed = gradients(model)
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_recomputing_does_run_the_layers_twice():
    model = tiny.prior()
    calls: Counter[int] = Counter()
    for i, layer in enumerate(model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, i=i: calls.update([i]))
    for recompute, expected in ((False, 1), (True, 2)):
        calls.clear()
        model.recompute = recompute
        gradients(model)
        assert calls == dict.fromkeys(range(3), expected)


def test_resblocks_are_recomputed_one_by_one_from_the_last_to_the_first():
    model, calls = tiny.prior(), []
    for name, (_, branch) in model.resblocks().items():
        branch.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    model.recompute = True
    gradients(model)
    order = list(model.resblocks())
    assert calls == order + order[::-1]


def test_a_model_that_was_evaluated_first_can_be_trained():
    model = tiny.prior()
    with torch.inference_mode():
        losses(model, *tiny.batch(model, 1))
    tiny.cached_logits(model, *tiny.batch(model, 1))
    assert gradients(model)["layers.0.attention.qkv.weight"].any()


def test_every_parameter_learns_once_the_heads_are_off_zero():
    """At the start only the heads do, for they are zero; slot 0 is never empty, its padding never used."""
    model = Prior(PriorConfig(**tiny.PRIOR_SHAPE))
    heads = {"text_head.weight", "text_head.bias", "image_head.weight", "image_head.bias"}
    assert {name for name, grad in gradients(model).items() if grad.any()} == heads
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad
    grads = gradients(model)
    assert [name for name, grad in grads.items() if grad is None or not grad.any()] == []
    unused = [slot for slot, row in enumerate(grads["padding.weight"]) if not row.any()]
    assert unused == [0]


def test_logits_are_fp32_where_the_rest_is_bf16():
    model = tiny.prior()
    tokens, codes = tiny.batch(model, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, image = model(tokens, codes)
        found = model.image_logits(image)
        assert model.layers[0].mlp.up(image).dtype == torch.bfloat16
    assert found.dtype == torch.float32
    exact = image.double() @ model.image_head.weight.double().T + model.image_head.bias.double()
    torch.testing.assert_close(found.double(), exact, **CLOSE)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("bpe_captions", 0, "bpe_captions=0 must be at least 1"),
        ("warmup", -1, "warmup=-1 must not be negative"),
        ("patience", -1, "patience=-1 must not be negative"),
        ("lr_end", -1e-5, "lr_end=-1e-05 must not be negative"),
    ],
)
def test_settings_that_cannot_be_are_refused(name, value, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        PriorTraining(**{name: value})


def test_the_papers_model_has_the_papers_matrices_and_slots():
    config = PRESETS["paper"][0]
    with torch.device("meta"):
        model = Prior(config)
    assert config.length == 1280
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    assert sum(p.numel() for p in matrices) == 12 * 3968**2 * 64
    shapes = Counter(tuple(p.shape) for p in matrices)
    assert shapes == dict.fromkeys([(3 * 3968, 3968), (3968, 3968), (4 * 3968, 3968), (3968, 4 * 3968)], 64)
    assert config.width // config.heads == 64
    assert model.text_head.weight.shape == (16_384, 3968)
    assert model.image_head.weight.shape == (8192, 3968)
    assert model.padding.weight.shape == model.text_positions.weight.shape == (256, 3968)
    assert model.rows.weight.shape == model.columns.weight.shape == (32, 3968)


def test_the_weights_at_the_start_have_the_sparse_transformers_spread():
    torch.manual_seed(0)
    depth, width = 3, 96
    model = Prior(
        PriorConfig(**tiny.PRIOR_SHAPE | {"width": width, "heads": 3, "grid": 50, "text_vocab": 99})
    )
    inner, residual = math.sqrt(0.125 / width), math.sqrt(2 * depth)
    for layer in model.layers:
        for linear, std in (
            (layer.attention.qkv, inner),
            (layer.attention.out, inner / residual),
            (layer.mlp.up, inner),
            (layer.mlp.down, inner / 2 / residual),
        ):
            assert linear.weight.std().item() == pytest.approx(std, rel=0.03)
            assert not linear.bias.any()
        for norm in (layer.attention_norm, layer.mlp_norm):
            assert (norm.weight == 1).all()
            assert not norm.bias.any()
    assert model.text_tokens.weight.std().item() == pytest.approx(inner, rel=0.05)
    assert model.image_tokens.weight.std().item() == pytest.approx(inner, rel=0.1)
    for table in (model.rows, model.columns):  # their sum spreads as one table does
        assert table.weight.std().item() == pytest.approx(inner / math.sqrt(2), rel=0.05)


@pytest.mark.parametrize("channels", [5, 40])
def test_codes_that_decode_alike_begin_alike(channels):
    """Embeddings and head keep the angles between the dVAE's vectors, up to the width."""
    model, generator = tiny.prior(width=12), torch.Generator().manual_seed(0)
    vectors = torch.randn(13, channels, generator=generator) * torch.arange(channels, 0, -1) ** 3
    model.start_from(vectors, seed=0)
    centred = vectors - vectors.mean(0)
    for table in (model.image_tokens.weight, model.image_head.weight):
        expected = torch.cdist(centred, centred)
        found = torch.cdist(table, table)
        torch.testing.assert_close(found / found.mean(), expected / expected.mean(), rtol=0, atol=0.05)
    assert model.image_tokens.weight.std().item() == pytest.approx(math.sqrt(0.125 / 12), rel=0.05)
    assert model.image_head.weight.std().item() == pytest.approx(0.1 / math.sqrt(12), rel=0.05)


@pytest.mark.parametrize("channels", [5, 40])
def test_code_vectors_begin_as_the_dvaes(channels):
    """With the distances between them, as far as there are channels; the tables then follow."""
    torch.manual_seed(0)
    shape = tiny.PRIOR_SHAPE | {"width": 48, "image_vocab": 200}
    model = Prior(PriorConfig(**shape, code_channels=8))
    vectors = torch.randn(200, channels) * 0.5 ** torch.arange(channels)
    vectors[1] = vectors[0]
    model.start_from(vectors, seed=0)
    placed = model.code_vectors.vectors.detach()
    assert placed.square().mean().item() == pytest.approx(1, rel=1e-4)
    expected, found = torch.cdist(vectors, vectors), torch.cdist(placed, placed)
    torch.testing.assert_close(found / found.mean(), expected / expected.mean(), rtol=0, atol=0.02)
    tables = model.code_tables()
    assert tables.embedding.std().item() == pytest.approx(math.sqrt(0.125 / 48), rel=0.3)
    assert tables.head.std().item() == pytest.approx(0.1 / math.sqrt(48), rel=0.3)
    for table in tables:
        assert torch.equal(table[0], table[1])
        assert not torch.allclose(table[0], table[2], atol=1e-4)


def test_code_vectors_make_their_tables_in_fp32():
    model = tiny.prior(code_channels=3)
    plain = model.code_tables()
    with torch.autocast("cpu", torch.bfloat16):
        cast = model.code_tables()
    assert torch.equal(cast.embedding, plain.embedding)
    assert torch.equal(cast.head, plain.head)


def test_without_a_start_code_vectors_leave_the_image_head_at_zero():
    model = Prior(PriorConfig(**tiny.PRIOR_SHAPE, code_channels=5))
    assert not model.code_tables().head.any()
    assert model.code_tables().embedding.any()


def test_what_one_code_learns_moves_those_like_it():
    torch.manual_seed(0)
    model = Prior(PriorConfig(**tiny.PRIOR_SHAPE, code_channels=5))
    vectors = torch.randn(13, 5)
    vectors[1] = vectors[0]
    model.start_from(vectors, seed=0)
    grad = torch.autograd.grad(model.code_tables().head[0].sum(), model.code_vectors.head.weight)[0]
    before = model.code_tables().head.detach()
    with torch.no_grad():
        model.code_vectors.head.weight.add_(grad)
    moved = (model.code_tables().head.detach() - before).mean(1)
    assert moved[1] == moved[0]
    assert moved[0] > 0


def test_a_folded_prior_is_the_same_with_plain_tables():
    model = tiny.prior(code_channels=5)
    folded = model.folded()
    assert folded.config.code_channels == 0
    assert not any(name.startswith("code_vectors") for name in folded.state_dict())
    tokens, codes = tiny.batch(model, 3)
    for ours, theirs in zip(logits(folded, tokens, codes), logits(model, tokens, codes), strict=True):
        assert torch.equal(ours, theirs)
    assert model.config.code_channels == 5
    plain = tiny.prior()
    assert plain.folded() is plain
    assert {n: p.shape for n, p in folded.state_dict().items()} == {
        n: p.shape for n, p in plain.state_dict().items()
    }


def test_the_mlps_gradient_is_the_derivative_of_its_values():
    mlp = MLP(6).double()
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    up = mlp.up(x)
    torch.testing.assert_close(mlp(x), mlp.down(up * torch.sigmoid(1.702 * up)))
    assert torch.autograd.gradcheck(mlp, x)
    taped = mlp(x)
    with torch.no_grad():
        assert torch.equal(mlp(x), taped)


@pytest.mark.parametrize("words", [0, 4])
def test_matrix_flops_are_those_of_the_linear_layers_and_of_the_slots_that_are_seen(words):
    model = tiny.prior(depth=6)
    c, counted = model.config, 0

    def count(linear, inputs, _):
        nonlocal counted
        counted += 2 * inputs[0][..., 0].numel() * linear.in_features * linear.out_features

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)
    text, image = model(*tiny.batch(model, 1))
    model.text_head(text[:, :words])
    model.image_head(image)
    seen = [
        oracles.keys_seen(layer.attention.kind, slot, c.text_length, c.grid, c.kernel)
        for layer in model.layers
        for slot in range(c.length)
    ]
    assert matrix_flops(c, words) == counted + 2 * 2 * c.width * sum(map(len, seen))
