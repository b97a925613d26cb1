"""What is handed on of a run draws and encodes as the run does."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dalle.checkpoint import fingerprint, load_tensors, read_json, save_weights, write_json
from dalle.errors import CheckpointError
from dalle.export import export
from dalle.info import facts_of_run
from dalle.pipeline import TextToImage
from dalle.report import _stage
from dalle.states import write_state
from tests import tiny


def test_an_exported_run_draws_nearly_the_same_from_half_the_bytes(tmp_path):
    run = tiny.write_run(tmp_path / "run")
    size = export(run, tmp_path / "out")
    assert size == sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    for stage in ("dvae", "prior"):
        before, after = (f / stage / "weights.safetensors" for f in (run, tmp_path / "out"))
        assert after.stat().st_size < 0.75 * before.stat().st_size
    ours, theirs = (TextToImage.load(folder, precision="fp32") for folder in (run, tmp_path / "out"))
    for mine, other in zip(ours.prior.parameters(), theirs.prior.parameters(), strict=True):
        assert other.dtype == mine.dtype
        np.testing.assert_allclose(mine.numpy(), other.numpy(), rtol=1e-3, atol=1e-6)
    with pytest.raises(CheckpointError, match="is not empty: name a new folder"):
        export(run, tmp_path / "out")


def test_an_exported_run_has_plain_tables_of_16_bits(tmp_path):
    """So that drawing may keep them in 16 bits: sums of two 16-bit numbers would not fit."""
    run = tiny.write_run(tmp_path / "run", code_channels=5)
    export(run, tmp_path / "out")
    ours, theirs = (TextToImage.load(folder, precision="fp32").prior for folder in (run, tmp_path / "out"))
    assert (ours.config.code_channels, theirs.config.code_channels) == (5, 0)
    table = ours.code_tables().head
    assert torch.equal(theirs.image_head.weight, table.half().float())


def test_where_the_data_lay_is_not_handed_on(tmp_path):
    run = tiny.write_run(tmp_path / "run")
    for stage in ("dvae", "prior"):
        path = run / stage / "config.json"
        write_json(path, {**read_json(path), "data": "/home/someone/pictures/birds"})
    export(run, tmp_path / "out")
    for stage in ("dvae", "prior"):
        assert read_json(tmp_path / "out" / stage / "config.json")["data"] == "./birds"


@pytest.mark.parametrize(("data", "told"), [("scenes", "scenes"), ("/home/someone/scenes", "./scenes")])
def test_data_of_ones_own_never_pass_for_the_built_in_ones(tmp_path, data, told):
    run = tiny.write_run(tmp_path / "run")
    path = run / "prior" / "config.json"
    write_json(path, {**read_json(path), "data": data})
    export(run, tmp_path / "out")
    assert read_json(tmp_path / "out" / "prior" / "config.json")["data"] == told


def test_an_exported_run_tells_the_steps_that_were_made_and_nothing_of_other_weights(tmp_path):
    run = tiny.write_run(tmp_path / "run")
    for stage in ("dvae", "prior"):
        path = run / stage / "config.json"
        write_json(path, {**read_json(path), "training": {"steps": 5000}})
    write_state(run / "prior" / "state", 59, {}, {}, keep=1)
    write_json(run / "report.json", {"command": "dalle evaluate --run /home/someone/run"})
    for source, out in ((run, tmp_path / "one"), (tmp_path / "one", tmp_path / "two")):
        export(source, out)
        facts = facts_of_run(out)["prior"]
        assert (facts["steps"], facts["of"], _stage(out / "prior")["steps"]) == (59, 5000, 59)
        assert {path.name for path in out.iterdir()} == {"dvae", "prior"}


def test_numbers_too_large_for_16_bits_stay_in_32(tmp_path):
    """Biases of a dVAE that clustered flat pictures reach 150,000; infinities would choose other codes."""
    run = tiny.write_run(tmp_path / "run")
    weights = load_tensors(run / "dvae" / "weights.safetensors")
    weights["encoder.blocks.output.conv.b"] += 1e5
    config = read_json(run / "prior" / "config.json")
    write_json(run / "prior" / "config.json", {**config, "dvae": save_weights(run / "dvae", weights)})

    export(run, tmp_path / "out")
    written = load_tensors(tmp_path / "out" / "dvae" / "weights.safetensors")
    assert torch.equal(written["encoder.blocks.output.conv.b"], weights["encoder.blocks.output.conv.b"])
    halves = [name for name, tensor in written.items() if tensor.dtype == torch.float16]
    assert len(halves) == len(weights) - 1
    assert read_json(tmp_path / "out" / "prior" / "config.json")["dvae"] == fingerprint(
        tmp_path / "out" / "dvae" / "weights.safetensors"
    )


def test_an_empty_folder_may_be_exported_to_and_nothing_half_done_stays(tmp_path):
    run = tiny.write_run(tmp_path / "run")
    (tmp_path / "out").mkdir()
    size = export(run, tmp_path / "out")
    assert size == sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_the_working_directory_can_be_filled(tmp_path, monkeypatch):
    run = tiny.write_run(tmp_path / "run")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export(run, Path())
    assert TextToImage.load(Path())
    assert (tmp_path / "here").samefile(Path.cwd())


def test_what_lies_beside_is_left_alone_and_the_folder_is_as_readable_as_any(tmp_path):
    run = tiny.write_run(tmp_path / "run")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("")
    export(run, tmp_path / "out")
    assert (tmp_path / "out.partial" / "mine").exists()
    assert (tmp_path / "out").stat().st_mode == run.stat().st_mode


def test_nothing_half_done_stays_where_writing_fails(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    run = tiny.write_run(tmp_path / "run")
    monkeypatch.setattr("dalle.export.write_json", full)
    with pytest.raises(CheckpointError, match="No space left"):
        export(run, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
