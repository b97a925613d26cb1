"""Which type, decided by asking the device."""

from contextlib import nullcontext
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dalle import precision
from dalle.errors import ConfigError
from dalle.precision import SOUND_CUDNN, arithmetic, choose, fp32_linear, fp32_products, products, set_up
from dalle.threads import using

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("asked", ["fp32", "bf16"])
def test_on_a_cpu_what_is_asked_for_is_given(asked):
    assert choose(asked, CPU) == asked


@pytest.mark.parametrize(("bf16", "chosen"), [(0.2, "bf16"), (0.6, "bf16"), (0.7, "fp32"), (3.0, "fp32")])
def test_on_a_cpu_auto_is_measured(monkeypatch, bf16, chosen):
    monkeypatch.setattr(precision, "_seconds", {torch.float32: 1.0, torch.bfloat16: bf16}.get)
    assert choose("auto", CPU) == chosen


@pytest.mark.parametrize("seconds", [(1.0, 3.0, 2.0, 4.0), (5.0, 4.0, 2.0, 3.0)])
def test_what_is_measured_is_the_best_of_products_after_the_first_by_one_thread(monkeypatch, seconds):
    threads, times = [], accumulate(time for each in seconds for time in (0.0, each))

    def clock():
        threads.append(torch.get_num_threads())
        return next(times)

    monkeypatch.setattr(precision, "time", SimpleNamespace(perf_counter=clock))
    with using(2):
        assert precision._seconds(torch.float32) == 2
    assert threads == [1] * 8


@pytest.mark.parametrize(
    ("version", "refused"), [(None, True), (SOUND_CUDNN - 1, True), (SOUND_CUDNN, False)]
)
def test_cudnns_attention_is_left_out_before_the_first_sound_version(monkeypatch, version, refused):
    asked = []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)  # comes back
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", asked.append)
    set_up(CUDA)
    assert asked == [False] * refused
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(("able", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_on_a_gpu_auto_is_bf16_where_it_is_real(monkeypatch, able, chosen):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: able or including_emulation
    )
    assert choose("auto", CUDA) == chosen
    assert choose("fp32", CUDA) == "fp32"


def test_a_gpu_without_bf16_refuses_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    with pytest.raises(ConfigError, match="no bf16 arithmetic; use precision=fp32"):
        choose("bf16", CUDA)


def test_products_run_in_the_chosen_type():
    a = torch.ones(3, 3)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with arithmetic(name, CPU):
            assert (a @ a).dtype == dtype


def fp32_switches():
    """torch's: what fp32 products take on a GPU, and products and convolutions on a CPU."""
    onednn = torch.backends.mkldnn
    assert torch.get_float32_matmul_precision()  # an error where torch's older and newer switches disagree
    return torch.backends.cuda.matmul.fp32_precision, onednn.matmul.fp32_precision, onednn.conv.fp32_precision


def test_fp32_products_beside_16_bits_round_their_operands():
    torch.set_float32_matmul_precision("highest")
    before = fp32_switches()
    assert not {"tf32", "bf16"} & {*before}
    for name, device in (("bf16", CPU), ("bf16", CUDA), ("fp16", CUDA)):
        with products(name, device):
            assert fp32_switches() == ("tf32", "bf16", "bf16")
            with fp32_products("ieee"):
                assert fp32_switches() == ("ieee", "ieee", "ieee")
            assert fp32_switches() == ("tf32", "bf16", "bf16")
        assert fp32_switches() == before
    for name, device in (("fp32", CPU), ("fp16", CPU), ("fp32", CUDA)):
        with products(name, device):
            assert fp32_switches() == before
    with pytest.raises(ZeroDivisionError), products("bf16", CPU):
        raise ZeroDivisionError
    assert fp32_switches() == before


def test_forward_passes_round_fp32_operands_where_backward_passes_do():
    for name in ("fp32", "bf16", "fp16"):
        with products(name, CPU):
            backward = fp32_switches()
        with arithmetic(name, CPU):
            assert fp32_switches() == backward


def test_what_a_program_has_set_for_fp32_products_comes_back():
    try:
        torch.set_float32_matmul_precision("high")
        with fp32_products("ieee"):
            pass
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def linear_with_gradients(layer, around):
    """Output and gradients of a linear layer, forward under `around`, backward outside, as in training."""
    random = torch.Generator().manual_seed(0)
    x, w, b, slope = (torch.randn(*shape, generator=random) for shape in ((2, 7, 5), (3, 5), (3,), (2, 7, 3)))
    inputs = [x.requires_grad_(), w.requires_grad_(), b.requires_grad_()]
    with around:
        y = layer(*inputs)
    return y, torch.autograd.grad(y, inputs, slope)


@pytest.mark.parametrize("around", [nullcontext(), torch.autocast("cpu", torch.float16)])
def test_an_fp32_layer_is_fp32_throughout_beside_other_types(around):
    y, of = linear_with_gradients(fp32_linear, around)
    exact, slopes = linear_with_gradients(F.linear, nullcontext())
    assert all(torch.equal(a, b) for a, b in zip((y, *of), (exact, *slopes), strict=True))


def test_an_fp32_layer_beside_bf16_rounds_only_what_its_gradients_are_products_of():
    y, of = linear_with_gradients(fp32_linear, torch.autocast("cpu", torch.bfloat16))
    exact, slopes = linear_with_gradients(F.linear, nullcontext())
    assert y.dtype == torch.float32
    assert torch.equal(y, exact)
    assert torch.equal(of[2], slopes[2])  # the bias' is no product
    for found, expected in zip(of[:2], slopes[:2], strict=True):
        assert found.dtype == torch.float32
        assert not torch.equal(found, expected)
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=0.03)


def test_only_what_needs_a_gradient_gets_one():
    x, w = torch.ones(2, 3), torch.ones(4, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        fp32_linear(x, w).sum().backward()
    torch.testing.assert_close(w.grad, torch.full((4, 3), 2.0))
    assert x.grad is None
