"""Every way to compute attention is held to the dense reference: values and gradients."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_mask

from dalle.errors import ConfigError
from stage2_prior import backends
from stage2_prior.backends import BACKENDS, choose
from stage2_prior.config import PriorConfig
from stage2_prior.masks import dense
from tests import tiny

CPU = torch.device("cpu")
SIZES = [(2, 1, 1), (7, 4, 3), (5, 3, 11), (66, 9, 5), (3, 12, 3), (130, 6, 11)]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}  # of the norm
every_kind = pytest.mark.parametrize("kind", ["row", "column", "conv"])


def shape(text, grid, kernel) -> PriorConfig:
    return PriorConfig(text_length=text, grid=grid, kernel=kernel, width=24, heads=2, depth=3)


def passed(name, kind, config, qkv, gradient):
    qkv = qkv.clone().requires_grad_()
    y = BACKENDS[name](config, kind)(qkv, config.heads)
    y.backward(gradient)
    return y.detach(), qkv.grad


@every_kind
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("together", [1, 8, 64])
def test_blocks_equal_the_reference(kind, size, dtype, together, monkeypatch):
    monkeypatch.setattr(backends, "TOGETHER", together)
    monkeypatch.setattr(backends, "TOGETHER_IN_16_BITS", together)
    backends._layout.cache_clear()
    config = shape(*size)
    random = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, config.length, 72, generator=random).to(dtype)
    gradient = torch.randn(2, config.length, 24, generator=random).to(dtype)
    exact = passed("dense", kind, config, qkv.double(), gradient.double())
    found = passed("block", kind, config, qkv, gradient)
    backends._layout.cache_clear()
    for ours, right in zip(found, exact, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - right).norm() < TOLERANCE[dtype] * right.norm()


@every_kind
@pytest.mark.parametrize("size", SIZES)
def test_flex_attention_is_given_the_same_mask(kind, size):
    text, grid, kernel = size
    length = text + grid**2
    blocks = backends._block_mask(kind, text, grid, kernel, CPU)
    expected = dense(kind, text, grid, kernel)
    assert torch.equal(create_mask(blocks.mask_mod, None, None, length, length, "cpu")[0, 0], expected)
    tiles = blocks.to_dense()[0, 0].bool().repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert not (expected & ~tiles[:length, :length]).any()


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="FlexAttention has no backward pass on CPUs; with a GPU: CUDA_VISIBLE_DEVICES=0",
)
@every_kind
def test_flex_attention_trains_as_the_reference_does(kind):
    config = PriorConfig(text_length=130, grid=12, kernel=11, width=64, heads=2, depth=3)
    qkv, gradient = (torch.randn(2, config.length, n * 64, device="cuda") for n in (3, 1))
    for ours, right in zip(
        passed("flex", kind, config, qkv, gradient), passed("dense", kind, config, qkv, gradient), strict=True
    ):
        torch.testing.assert_close(ours, right, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", ["dense", "block"])
def test_the_beginning_of_a_sequence_does_not_depend_on_its_end(backend):
    model = tiny.prior()
    model.attend_by(backend)
    x = torch.randn(2, model.config.length, model.config.width)
    for layer in model.layers:
        torch.testing.assert_close(layer(x)[:, :9], layer(x[:, :9]), rtol=1e-5, atol=1e-5)


def test_a_whole_model_is_the_same_by_blocks():
    model = tiny.prior(depth=7)
    tokens, codes = tiny.batch(model, 3)
    reference = [*model(tokens, codes)]
    gradients = torch.autograd.grad(sum(y.square().sum() for y in reference), [*model.layers.parameters()])
    model.attend_by("block")
    blocks = [*model(tokens, codes)]
    others = torch.autograd.grad(sum(y.square().sum() for y in blocks), [*model.layers.parameters()])
    for ours, right in zip([*blocks, *others], [*reference, *gradients], strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)


def test_a_layout_made_while_evaluating_serves_training():
    backends._layout.cache_clear()
    backends._mask.cache_clear()
    config = shape(7, 4, 3)
    qkv = torch.randn(1, config.length, 72)
    for name in ("dense", "block"):
        with torch.inference_mode():
            BACKENDS[name](config, "row")(qkv, 2)
        passed(name, "row", config, qkv, torch.ones(1, config.length, 24))


@pytest.mark.parametrize("name", ["dense", "block"])
@every_kind
def test_a_layout_made_on_tensors_without_data_serves_training(kind, name):
    config = shape(7, 4, 3)
    qkv, gradient = torch.randn(1, config.length, 72), torch.randn(1, config.length, 24)
    expected = passed(name, kind, config, qkv, gradient)
    backends._layout.cache_clear()
    backends._mask.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        BACKENDS[name](config, kind)(torch.zeros(1, config.length, 72), 2)
    for found, right in zip(passed(name, kind, config, qkv, gradient), expected, strict=True):
        assert torch.equal(found, right)


def test_layers_of_a_kind_share_one_mask():
    backends._mask.cache_clear()
    model = tiny.prior(depth=7)
    model(*tiny.batch(model, 1))
    assert backends._mask.cache_info().currsize == 3


@pytest.mark.parametrize("name", ["dense", "block"])
def test_what_is_asked_for_is_taken_unmeasured(name, monkeypatch):
    monkeypatch.setattr(backends, "_seconds", lambda *_: pytest.fail("measured"))
    assert choose(name, shape(7, 4, 3), 2, torch.float32, CPU) == name


@pytest.mark.parametrize("fastest", ["dense", "block"])
def test_the_fastest_is_chosen(fastest, monkeypatch):
    kind = BACKENDS[fastest]
    monkeypatch.setattr(backends, "_seconds", lambda layers, *_: 1.0 if type(layers[0]) is kind else 2.0)
    assert choose("auto", shape(7, 4, 3), 2, torch.float32, CPU) == fastest


@pytest.mark.parametrize(("broken", "error"), [("dense", RuntimeError), ("block", AssertionError)])
def test_a_form_that_fails_is_left_out_and_named(broken, error, monkeypatch, capsys):
    kind = BACKENDS[broken]

    def seconds(layers, *_):
        if type(layers[0]) is kind:
            raise error("out of memory\nand a long explanation")
        return 1.0

    monkeypatch.setattr(backends, "_seconds", seconds)
    assert choose("auto", shape(7, 4, 3), 2, torch.float32, CPU) == ({"dense", "block"} - {broken}).pop()
    said = capsys.readouterr().err
    assert f"attention={broken} does not work here: {error.__name__}: out of memory" in said
    assert "long explanation" not in said


def test_where_every_form_fails_training_ends_with_one_line(monkeypatch):
    def seconds(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(backends, "_seconds", seconds)
    with pytest.raises(ConfigError, match="no form of attention works here"):
        choose("auto", shape(7, 4, 3), 2, torch.float32, CPU)


def test_every_form_can_be_measured_here(capsys):
    assert choose("auto", shape(7, 4, 3), 2, torch.float32, CPU) in ("dense", "block")
    assert capsys.readouterr().err == ""  # one that fails is named there, and left out


def test_flex_attention_is_refused_where_it_cannot_train():
    with pytest.raises(ConfigError, match="attention=flex trains on CUDA only; use attention=auto"):
        choose("flex", shape(7, 4, 3), 2, torch.float32, CPU)
