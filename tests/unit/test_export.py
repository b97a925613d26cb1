"""What is handed on of a run draws and encodes as the run does."""

import torch

from dalle.checkpoint import fingerprint, load_tensors, read_json, save_weights, write_json
from dalle.export import export
from tests import tiny


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
