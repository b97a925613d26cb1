"""Which type, decided by asking the device."""

import pytest
import torch

from dalle import precision
from dalle.errors import ConfigError
from dalle.precision import arithmetic, choose, products

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("asked", ["fp32", "bf16"])
def test_on_a_cpu_what_is_asked_for_is_given(asked):
    assert choose(asked, CPU) == asked


@pytest.mark.parametrize(("bf16", "chosen"), [(0.2, "bf16"), (0.6, "fp32"), (3.0, "fp32")])
def test_on_a_cpu_auto_is_measured(monkeypatch, bf16, chosen):
    monkeypatch.setattr(precision, "_seconds", {torch.float32: 1.0, torch.bfloat16: bf16}.get)
    assert choose("auto", CPU) == chosen


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


def test_fp32_products_beside_bf16_round_their_operands_on_a_cpu_and_only_there():
    kinds = (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)

    def found():
        return [kind.fp32_precision for kind in kinds]

    before = found()
    with products("bf16", CPU):
        assert found() == ["bf16", "bf16"]
    assert found() == before
    for name, device in (("fp32", CPU), ("fp16", CPU), ("bf16", CUDA)):
        with products(name, device):
            assert found() == before
    with pytest.raises(ZeroDivisionError), products("bf16", CPU):
        raise ZeroDivisionError
    assert found() == before
