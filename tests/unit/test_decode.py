"""The decoder: equal to the whole forward pass, with caches of what can be seen and no more."""

import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.builtin import FOLDER
from dalle.errors import ConfigError
from dalle.precision import arithmetic, fp32_products
from stage2_prior import decode, linear
from stage2_prior.cache import Window
from stage2_prior.decode import Decoder
from stage2_prior.masks import kinds
from stage2_prior.model import Prior
from stage2_prior.sample import Sampling, draw, noise
from tests import oracles, tiny

every_kind = pytest.mark.parametrize("kind", ["row", "column", "conv"])
shapes = pytest.mark.parametrize(
    "shape",
    [
        {"grid": 5, "depth": 7},  # all masks, two of them in several layers
        {"grid": 7, "depth": 3, "kernel": 5, "text_length": 3},
        {"grid": 6, "depth": 3, "kernel": 11},  # a window wider than the picture
        {"grid": 1, "depth": 2},
        {"grid": 3, "depth": 3, "kernel": 1, "code_channels": 5},
    ],
)


@pytest.fixture(autouse=True)
def a_cpu_with_tiles(monkeypatch):
    """Every machine tests both kinds of keys and values."""
    monkeypatch.setattr(decode, "tiles", lambda: True)


def whole(model: Prior, tokens: Tensor, codes: Tensor) -> Tensor:
    """Logits of every image slot from one forward pass, without a cache."""
    with torch.no_grad():
        repeated = tokens.repeat_interleave(len(codes) // len(tokens), 0)
        return model.image_logits(model(repeated, codes)[1])


def rounded(model: Prior, how) -> Prior:
    """The same model with what `how` makes of the matrices that drawing reads."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for module in (*model.layers.modules(), model.image_head):
            if isinstance(module, nn.Linear):
                module.weight.copy_(how(module.weight))
    return model


@shapes
@pytest.mark.parametrize(("prompts", "pictures"), [(1, 1), (3, 1), (1, 4), (2, 3)])
def test_every_slot_equals_the_forward_pass(shape, prompts, pictures):
    model = tiny.prior(**shape)
    tokens, codes = tiny.batch(model, prompts)[0], tiny.batch(model, prompts * pictures, seed=1)[1]
    expected = whole(model, tokens, codes)
    found = tiny.cached_logits(model, tokens, codes)
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, rtol=1e-5, atol=1e-5)


@shapes
def test_a_model_saved_in_16_bits_loses_nothing_by_fp16_weights(shape):
    model = rounded(tiny.prior(**shape).folded(), lambda w: w.half().float())
    tokens, codes = tiny.batch(model, 2)
    expected, found = whole(model, tokens, codes), tiny.cached_logits(model, tokens, codes, "fp16")
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("weights", "precision", "limit"),
    [
        ("bf16", "bf16", 0.06), ("int8", "fp32", 0.06), ("int8", "bf16", 0.06),
        ("int4", "fp32", 0.3), ("int4", "bf16", 0.3),
    ],
)  # fmt: skip
def test_rounded_inputs_stay_within_their_rounding(weights, precision, limit):
    model = tiny.prior(grid=5, depth=7, width=96)
    tokens, codes = tiny.batch(model, 2)
    expected = whole(model, tokens, codes)
    found = tiny.cached_logits(model, tokens, codes, weights, precision)
    off = (found - expected).std() / expected.std()
    assert 1e-4 < off < limit  # bf16 has 8 bits: 2^-9 in each of some dozen products that grow together


def test_keys_and_values_are_held_in_bf16_where_attention_is_fast_in_it(monkeypatch):
    model = tiny.prior()
    memory = {}
    for weights, precision in (("int8", "fp32"), ("int8", "bf16"), ("int4", "bf16"), ("fp32", "bf16")):
        decoder = Decoder(model, 2, weights, precision)
        text = decoder.read(tiny.batch(model, 1)[0])
        memory[weights, precision] = decoder.state(text, 2).bytes
    assert memory["int8", "fp32"] == memory["fp32", "bf16"] == 2 * memory["int8", "bf16"]
    assert memory["int4", "bf16"] == memory["int8", "bf16"]
    monkeypatch.setattr(decode, "tiles", lambda: False)
    assert [Decoder(model, 2, weights, "bf16").dtype for weights in ("int8", "int4", "bf16")] == [
        torch.float32, torch.float32, torch.bfloat16,
    ]  # fmt: skip


def test_bf16_is_less_than_twice_as_far_off_as_a_forward_pass_in_bf16():
    model = tiny.prior(grid=5, depth=7, width=48)
    tokens, codes = tiny.batch(model, 2)
    exact, found = whole(model, tokens, codes), tiny.cached_logits(model, tokens, codes, "bf16")
    with torch.autocast("cpu", torch.bfloat16):
        same = whole(model, tokens, codes)
    assert (found - exact).std() < 2 * (same - exact).std()


@every_kind
@pytest.mark.parametrize(("grid", "kernel"), [(1, 3), (4, 3), (5, 11), (7, 5)])
def test_a_window_opens_exactly_what_the_mask_allows(kind, grid, kernel):
    window = Window.of(kind, grid, kernel, torch.device("cpu"))
    for slot in range(grid**2):
        kept = {place: s for s in range(slot + 1) for place in [s % window.ring]}  # the last to be written
        places = range(window.ring) if window.places is None else window.places[slot].tolist()
        seen = [kept[p] for p, bias in zip(places, window.bias[slot], strict=True) if bias == 0]
        assert len(seen) == len(set(seen))
        assert set(seen) == oracles.keys_seen(kind, slot, 0, grid, kernel)


@pytest.mark.parametrize(("grid", "kernel"), [(4, 3), (8, 5), (32, 11)])
def test_a_ring_reaches_as_far_back_as_its_mask(grid, kernel):
    half = kernel // 2
    far = {"row": grid, "column": grid * (grid - 1), "conv": half * (grid + 1)}
    for kind, back in far.items():
        assert Window.of(kind, grid, kernel, torch.device("cpu")).ring == back + 1


@pytest.mark.parametrize(("prompts", "pictures"), [(1, 1), (2, 3)])
def test_the_caches_take_the_memory_that_the_masks_ask_for(prompts, pictures):
    model = tiny.prior(grid=8, depth=7, kernel=5)
    tokens, _ = tiny.batch(model, prompts)
    decoder = Decoder(model, prompts * pictures, "fp32")
    state = decoder.state(decoder.read(tokens), pictures)
    kept = {"row": 9, "column": 57 + 8, "conv": 2 * 9 + 1 + 2 * 5 + 3}  # rings, and what is read of them
    floats = sum(2 * 12 * (7 + pictures * kept[kind]) for kind in kinds(7))
    assert state.bytes == 4 * prompts * floats


def test_drawing_takes_the_same_memory_at_every_slot():
    model = tiny.prior(grid=5)
    tokens, codes = tiny.batch(model, 1)
    decoder = Decoder(model, 1, "fp32")
    state = decoder.state(decoder.read(tokens), 1)
    sizes = set()
    for slot in range(25):
        decoder.step(codes[:, slot], state, torch.tensor([slot]))
        sizes.add(state.bytes)
    assert len(sizes) == 1


def test_the_text_is_read_before_and_may_serve_several_drawings():
    model = tiny.prior()
    tokens, _ = tiny.batch(model, 1)
    decoder = Decoder(model, 2, "fp32")
    text, uniform = decoder.read(tokens), noise(0, range(2), 16)
    first, again = (torch.stack(list(draw(decoder, text, uniform, Sampling())), 1) for _ in range(2))
    assert torch.equal(first, again)


def test_a_decoder_for_many_pictures_draws_one():
    model = tiny.prior()
    tokens, _ = tiny.batch(model, 1)
    decoder, uniform = Decoder(model, 16, "fp32"), noise(3, range(1), 16)
    drawn = torch.stack(list(draw(decoder, decoder.read(tokens), uniform, Sampling())), 1)
    assert torch.equal(drawn, tiny.drawn(model, tokens, uniform))


def test_what_rounds_around_it_does_not_reach_into_fp32():
    model = tiny.prior()
    tokens, codes = tiny.batch(model, 2)
    plain = tiny.cached_logits(model, tokens, codes)
    with arithmetic("bf16", torch.device("cpu")):
        assert torch.equal(tiny.cached_logits(model, tokens, codes), plain)


# Torch has oneDNN's blocks and FBGEMM's packed fp16 on some systems only, and blocks of bf16 on some CPUs.
FP32 = [linear._ByRows, linear._ByColumns, linear._InParts]
FP32 += [linear._Blocked] * torch.backends.mkldnn.is_available()
FORMS = {
    "fp32": FP32,
    "fp16": [linear._PackedFp16] * linear._has_fbgemm() + [linear._rounded(form) for form in FP32],
    "int8": [linear._int8],
    "int4": [linear._int4],
    "bf16": [
        partial(linear._InBf16, form)
        for form in [linear._ByRows] + [linear._Blocked] * linear._has_onednn_bf16()
    ],
}


@pytest.mark.parametrize("weights", FORMS)
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_all_forms_of_the_same_weights_are_the_same_product(weights, rows):
    random = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(48, 32, generator=random), torch.randn(48, generator=random)
    x = torch.randn(rows, 32, generator=random)
    exact = F.linear(x, weight, bias)
    close = {"fp32": 1e-6, "fp16": 1e-3, "bf16": 1e-2, "int8": 2e-2, "int4": 0.12}[weights]
    results = [form(weight, bias, rows)(x).float() for form in FORMS[weights]]
    for found in results:
        assert found.shape == exact.shape
        assert (found - exact).std() < close * exact.std()
        torch.testing.assert_close(found, results[0], rtol=1e-2 if weights == "bf16" else 1e-5, atol=1e-5)


def test_int4_keeps_weights_that_lie_on_sixteen_steps():
    random = torch.Generator().manual_seed(0)
    steps = torch.randint(16, (48, 64), generator=random)
    steps[:, ::32], steps[:, 1::32] = 0, 15  # the least and the largest of every group
    scale, least = torch.tensor([0.25, 2.0])[:, None], torch.tensor([-1.0, 0.5])[:, None]
    weight = (steps.unflatten(1, (2, 32)) * scale + least).flatten(1)
    x = torch.randn(3, 64, generator=random).bfloat16()
    found = linear._int4(weight, torch.zeros(48), 3)(x)
    expected = (x.double() @ weight.double().t()).bfloat16()  # every weight is a bf16 number
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-2)


def test_the_fastest_form_is_taken(monkeypatch):
    class Slow(linear._ByRows):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(200):
                F.linear(x, self.weight, self.bias)
            return F.linear(x, self.weight, self.bias)

    layers = [nn.Linear(64, 64) for _ in range(2)]
    monkeypatch.setattr(linear, "_forms", lambda *_: [Slow, missing, linear._ByColumns])
    taken = linear.fastest(layers, "fp32", 1)
    assert [type(fast) for fast in taken] == 2 * [linear._ByColumns]


def missing(weight: Tensor, bias: Tensor, rows: int) -> nn.Module:
    raise NotImplementedError("no kernel")


def too_large(weight: Tensor, bias: Tensor, rows: int) -> nn.Module:
    raise torch.OutOfMemoryError


def test_a_machine_without_any_form_is_told_of_and_one_without_memory_too(monkeypatch):
    layers = [nn.Linear(64, 64)]
    monkeypatch.setattr(linear, "_forms", lambda *_: [missing])
    with pytest.raises(ConfigError, match=r"weights=int4 does not work on this machine \(no kernel\)"):
        linear.fastest(layers, "int4", 1)
    monkeypatch.setattr(linear, "_forms", lambda *_: [linear._ByRows, too_large])
    with pytest.raises(torch.OutOfMemoryError):
        linear.fastest(layers, "fp32", 1)


def test_factors_go_into_weights_and_biases_and_leave_the_layer_as_it_was():
    layer = nn.Linear(8, 4)
    before, x = copy.deepcopy(layer), torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    (scaled,) = linear.fastest([layer], "fp32", 3, (2.0, 4.0))
    torch.testing.assert_close(scaled(x), 2 * (layer(x) - layer.bias) + 4 * layer.bias)
    assert torch.equal(layer.weight, before.weight)
    assert torch.equal(layer.bias, before.bias)


@shapes
@pytest.mark.parametrize("weights", ["fp32", "fp16", "bf16", "int8", "int4"])
def test_the_compiled_step_is_the_one_that_python_runs(monkeypatch, shape, weights):
    """To the last bit: compiling neither reorders nor fuses, and no write into a cache is lost."""
    model = tiny.prior(**shape | {"width": 96})
    tokens, codes = tiny.batch(model, 1)[0], tiny.batch(model, 2, seed=1)[1]
    forms = linear._forms
    monkeypatch.setattr(linear, "_forms", lambda *a: forms(*a)[:1])  # the clock has no say
    compiled = tiny.cached_logits(model, tokens, codes, weights, "bf16")
    monkeypatch.setattr(decode, "compiled", lambda step: step)
    assert torch.equal(compiled, tiny.cached_logits(model, tokens, codes, weights, "bf16"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_auto_rounds_nothing_on_a_cpu(precision):
    model = tiny.prior()
    assert Decoder(model, precision=precision).weights == "fp32"
    exact = rounded(model, lambda w: w.half().float())
    decoder = Decoder(exact, precision=precision)
    assert (decoder.weights, decoder.dtype) == ("fp16", torch.float32)
    with torch.no_grad():
        exact.image_head.weight[3, 3] = 1 + 2**-20
    assert Decoder(exact, precision=precision).weights == "fp32"


def test_weights_that_a_device_has_no_form_for_are_refused():
    elsewhere = nn.Linear(4, 4, device="meta")
    for weights in ("fp16", "int8", "int4"):
        with pytest.raises(ConfigError, match=f"weights={weights} is a form for CPUs"):
            linear.resolve(weights, "fp32", [elsewhere])
    assert linear.resolve("auto", "bf16", [elsewhere]) == "bf16"


@pytest.mark.parametrize(
    ("weights", "limit"), [("fp16", 1e-6), ("bf16", 1e-4), ("int8", 3e-4), ("int4", 1e-2)]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rounding_hardly_moves_the_next_codes_distribution(weights, limit, precision):
    """KL divergence from fp32 in nats, on the built-in model; its weights are fp16, so noise comes first."""
    prior = Prior.load(FOLDER / "prior")
    random = torch.Generator().manual_seed(0)
    prior = rounded(prior, lambda w: w * (1 + 2.0**-11 * (2 * torch.rand(w.shape, generator=random) - 1)))
    tokens = torch.randint(prior.config.text_vocab, (4, prior.config.text_length - 1), generator=random)
    tokens[:, 6:] = -1
    codes = tiny.drawn(prior, tokens, noise(0, range(4), prior.config.cells))
    exact, rough = (
        torch.log_softmax(tiny.cached_logits(prior, tokens, codes, w, precision).double(), -1)
        for w in ("fp32", weights)
    )
    kl = (exact.exp() * (exact - rough)).sum(-1).mean().item()
    assert 1e-10 < kl < limit
    assert math.isfinite(kl)


@pytest.mark.parametrize("form", [linear._int8, linear._int4])
@pytest.mark.parametrize("outputs", [16, 15])  # with and without the kernel for whole blocks
def test_weights_that_are_all_alike_stay_so(form, outputs):
    """Their steps would be 0 wide."""
    weight, x = torch.zeros(outputs, 32), torch.ones(1, 32)
    weight[3:] = 0.5
    found = form(weight, torch.zeros(outputs), 1)(x).float()
    torch.testing.assert_close(found, weight.sum(1)[None], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(("costs", "taken"), [((1.0, 0.97), 0), ((1.0, 0.9), 1), ((1.0, 0.97, 0.94), 2)])
def test_a_later_form_has_to_be_a_twentieth_faster(monkeypatch, costs, taken):
    now = [0.0]

    class Form(linear._ByRows):
        def __init__(self, number, *given):
            super().__init__(*given)
            self.number, self.calls = number, 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            late = self.number == 0 and self.calls == 1 + linear.ROUNDS  # once slowed down by others
            now[0] += 10 if late else costs[self.number]
            return super().forward(x)

    monkeypatch.setattr(linear, "_forms", lambda *_: [partial(Form, i) for i in range(len(costs))])
    monkeypatch.setattr(linear, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    (fast,) = linear.fastest([nn.Linear(4, 4)], "fp32", 1)
    assert fast.number == taken


def test_on_a_gpu_auto_is_bf16_only_where_it_computes_in_it():
    elsewhere = nn.Linear(4, 4, device="meta")
    found = [linear.resolve("auto", precision, [elsewhere]) for precision in ("fp32", "fp16", "bf16")]
    assert found == ["fp32", "fp32", "bf16"]


def test_every_norm_keeps_its_epsilon():
    model = tiny.prior(grid=3)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 2.0
    tokens, codes = tiny.batch(model, 2)
    torch.testing.assert_close(tiny.cached_logits(model, tokens, codes), whole(model, tokens, codes))


@pytest.mark.parametrize(("weights", "rounded"), [("bf16", False), ("int8", False), ("int4", True)])
def test_logits_are_fp32_and_have_its_digits_but_for_those_of_int4(weights, rounded):
    model = tiny.prior(width=96)
    found = tiny.cached_logits(model, *tiny.batch(model, 2), weights, "bf16")
    assert found.dtype == torch.float32
    assert torch.equal(found, found.bfloat16().float()) == rounded


def test_what_rounds_around_it_reaches_neither_the_choice_of_forms_nor_the_text_nor_a_step(monkeypatch):
    model, seen = tiny.prior(), []

    def watched(function):
        def watch(*given):
            seen.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))
            return function(*given)

        return watch

    run = decode.compiled
    monkeypatch.setattr(decode, "fastest", watched(decode.fastest))
    monkeypatch.setattr(decode, "compiled", lambda step: watched(run(step)))
    monkeypatch.setattr(Prior, "embed_text", watched(Prior.embed_text))
    with arithmetic("bf16", torch.device("cpu")), fp32_products("rounded"):
        tiny.cached_logits(model, *tiny.batch(model, 1))
    assert seen == [("highest", False)] * (5 + 1 + model.config.cells)


def test_forms_are_chosen_for_the_rows_that_will_be_drawn(monkeypatch):
    rows, fastest = [], decode.fastest
    monkeypatch.setattr(decode, "fastest", lambda *given: rows.append(given[2]) or fastest(*given))
    Decoder(tiny.prior(), 5)
    assert rows == 5 * [5]  # the head and four layers


def test_of_the_text_no_more_than_keys_and_values_is_kept():
    model = tiny.prior()
    for kv in Decoder(model).read(tiny.batch(model, 2)[0]):
        assert kv.untyped_storage().nbytes() == kv.nbytes
