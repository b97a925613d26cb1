"""The yardstick of speed."""

import torch

from dalle import ceiling


def test_the_ceiling_is_the_faster_of_one_product_and_one_a_core(monkeypatch):
    monkeypatch.setitem(ceiling.SIDES, "cpu", 8)
    monkeypatch.setattr(ceiling, "cores", lambda _: 3)
    seconds = iter([0.5, 0.25])
    monkeypatch.setattr(ceiling, "best_seconds", lambda work, _: (work(), next(seconds))[1])
    ceiling.gemm_rate.cache_clear()
    assert ceiling.gemm_rate(torch.device("cpu"), "fp32") == 3 * 2 * 8**3 / 0.25
    ceiling.gemm_rate.cache_clear()
    seconds = iter([0.1, 9.0])
    assert ceiling.gemm_rate(torch.device("cpu"), "fp32") == 2 * 8**3 / 0.1
    ceiling.gemm_rate.cache_clear()


def test_on_a_cpu_fp16_is_measured_as_fp32_is(monkeypatch):
    monkeypatch.setitem(ceiling.SIDES, "cpu", 8)
    monkeypatch.setattr(ceiling, "DTYPES", {"fp32": torch.float32})
    monkeypatch.setattr(ceiling, "cores", lambda _: 1)
    seconds = iter([0.5, 0.25])
    monkeypatch.setattr(ceiling, "best_seconds", lambda work, _: (work(), next(seconds))[1])
    ceiling.gemm_rate.cache_clear()
    assert ceiling.gemm_rate(torch.device("cpu"), "fp16") == 2 * 8**3 / 0.25
    ceiling.gemm_rate.cache_clear()
