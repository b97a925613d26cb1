"""What `dalle bench` measures and writes, on models that take no time."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from cli.main import app
from dalle import bench, ceiling
from dalle.errors import CheckpointError
from stage1_dvae.config import DVAEConfig
from stage2_prior.config import PRESETS, PriorConfig
from tests import oracles, tiny

CASES = bench.Cases(
    small=PriorConfig(**tiny.PRIOR_SHAPE), small_batch=3,
    paper=PriorConfig(**{**tiny.PRIOR_SHAPE, "grid": 6}), paper_batch=1, drawn=4,
    dvae=DVAEConfig(**tiny.DVAE_SHAPE), dvae_batch=2, copied=1,
)  # fmt: skip
SMALL = f"training, prior, {CASES.small.grid}×"


@pytest.fixture
def small_ceiling(monkeypatch):
    monkeypatch.setitem(ceiling.SIDES, "cpu", 16)
    monkeypatch.setattr(bench, "LEAST", 1)
    ceiling.gemm_rate.cache_clear()
    yield
    ceiling.gemm_rate.cache_clear()


def test_everything_is_measured_against_a_ceiling_of_the_same_run(tmp_path, small_ceiling):
    result = bench.bench(CASES)
    path = bench.save(result, tmp_path / "new")
    assert json.loads(path.read_text()) == result
    rows = {row["what"]: row for row in result["rows"]}
    for part in ("matrix products", "copy", SMALL, "training, prior, 6×", "training, dVAE",
                 "drawing, built-in", "drawing, 6×", "encoding", "decoding", "data"):  # fmt: skip
        assert any(what.startswith(part) for what in rows), part
    assert all(row["value"] > 0 for row in result["rows"])
    for what, row in rows.items():
        assert (row["share"] is not None) == what.startswith(("training", "drawing, 6×")), what
    table = path.with_suffix(".txt").read_text()
    assert "tokens/s" in table


CPU = torch.device("cpu")


def test_training_is_told_as_a_share_of_three_forward_passes(monkeypatch):
    """With 2 words of 7 text slots, 16 cells and 3 layers of width 12."""
    monkeypatch.setattr(bench, "seconds", lambda work: 0.5)
    monkeypatch.setattr(bench, "gemm_rate", lambda device, precision: 1e6)
    training = dataclasses.replace(PRESETS["tiny"][1], batch_size=3)
    (row,) = bench._prior_step(CASES.small, training, CPU, "fp32")
    kinds = [oracles.kind_of_layer(layer, 3) for layer in (1, 2, 3)]
    pairs = sum(len(oracles.keys_seen(kind, slot, 7, 4, 3)) for kind in kinds for slot in range(23))
    products = 3 * 23 * 12 * 12**2 + 2 * 12 * pairs + 12 * (16 * 13 + 2 * 11)
    assert (row.value, row.unit) == (3 * 23 / 0.5, "tokens/s")
    assert row.share == pytest.approx(3 * 3 * 2 * products / 0.5 / 1e6)


def test_drawing_is_told_as_a_share_of_reading_every_weight_once(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: next(clock) / 4))
    monkeypatch.setattr(bench, "seconds", lambda work: 0.5)
    *_, row = bench._drawing(CASES, CPU, "fp32", rate=2e-3)
    weights = 3 * (12 * 12**2 + 13 * 12) + 13 * 12  # 13 biases and gains of 12 numbers in each layer
    assert (row.value, row.unit) == (4, "image tokens/s")
    assert row.share == pytest.approx(4 * weights / 2e6 / 0.25)


def test_the_median_counts_and_the_first_run_does_not(monkeypatch):
    clock = iter([0.0, 100.0, 100.0, 101.0, 101.0, 105.0, 105.0, 107.0])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(bench, "LEAST", 3)
    assert bench.seconds(lambda: None) == 2


def test_the_command_prints_and_writes_what_was_measured(tmp_path, monkeypatch, capsys):
    machine = {"device": "a CPU", "threads": 2, "torch": "2", "precision": "fp32"}
    row = {"what": "copy", "value": 3.5, "unit": "GB/s", "share": None, "ceiling": ""}
    result = {"date": "2026-01-02T03:04:05+00:00", "machine": machine, "seconds": 1.0, "rows": [row]}
    monkeypatch.setattr(bench, "bench", lambda: result)
    app(["bench"], standalone_mode=False)
    assert "copy" in capsys.readouterr().out
    app(["bench", "--json", "--out", str(tmp_path)], standalone_mode=False)
    said = capsys.readouterr()
    path = tmp_path / "bench-2026-01-02T03-04.json"
    assert json.loads(said.out) == json.loads(path.read_text()) == result
    assert said.err == f"written to {path}\n"
    assert "copy" in path.with_suffix(".txt").read_text()


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "bench", lambda: pytest.fail("measured what could not be written"))
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file is a file"):
        app(["bench", "--out", str(tmp_path / "file" / "out")], standalone_mode=False)
