"""Training with AdamW's moments, and then the weights too, in 16 bits, as a user runs it."""

import shutil

import torch

from dalle.metrics import read_metrics
from dalle.states import State
from tests.e2e.settings import dvae, options, prior

# MLPs of 9,216 numbers: large enough to pack
PACKED = options(optimizer="adamw", width=48, moments="16bit", log_every=1)
SCHEDULE = options(warmup=1, lr_end=2e-3)  # constant, whatever the number of steps
LAST = "prior/state/step-00000008"


def losses(run):
    return [line["loss"] for line in read_metrics(run / "prior") if "loss" in line]


def kinds(run, file):
    """The type of every tensor in a file of the last state."""
    state = State(run / LAST)
    return {name: state.read(file, name).dtype for name in state.names(file)}


def trained(dalle, tmp_path, settings, others):
    """Two runs of eight updates, with these settings and with the others.

    The first is made once more with a break after four updates, and has to come out the same bit for bit.
    """
    straight, halved, full = (tmp_path / name for name in ("straight", "halved", "full"))
    assert dalle(*dvae(straight)).code == 0
    for other in (halved, full):
        shutil.copytree(straight / "dvae", other / "dvae")
    runs = ((straight, 8, settings), (halved, 4, settings), (halved, 8, settings), (full, 8, others))
    for run, steps, changes in runs:
        done = dalle(*prior(run, *PACKED, *SCHEDULE, *changes, steps=steps))
        assert done.code == 0, done.err
    for name in ("weights.safetensors", "moments.safetensors", "average.safetensors"):
        assert (straight / LAST / name).read_bytes() == (halved / LAST / name).read_bytes()
    return straight, full


def test_a_run_with_16_bit_moments_follows_the_fp32_one_and_goes_on_bit_exactly(dalle, tmp_path):
    straight, full = trained(dalle, tmp_path, [], options(moments="fp32"))
    held = kinds(straight, "moments")
    assert held["layers.0.mlp.up.weight/exp_avg"] == torch.uint16
    assert held["layers.0.mlp.up.bias/exp_avg"] == held["image_head.weight/exp_avg"] == torch.float32

    weights = [(run / LAST / "weights.safetensors").read_bytes() for run in (straight, full)]
    assert weights[0] != weights[1]
    packed, plain = losses(straight), losses(full)
    for a, b in zip(packed, plain, strict=True):
        assert abs(a - b) < 1e-3 * b


def test_a_run_keeps_the_kind_of_its_moments(dalle, tmp_path):
    assert dalle(*dvae(tmp_path)).code == 0
    adamw = options(optimizer="adamw")
    assert dalle(*prior(tmp_path, *adamw, steps=2)).code == 0
    done = dalle(*prior(tmp_path, *options(moments="16bit"), steps=4))
    assert done.code == 2
    assert "moments=fp32, not 16bit" in done.err


def test_a_run_with_weights_in_fp16_follows_the_fp32_one_and_goes_on_bit_exactly(dalle, tmp_path):
    fp16 = options(precision="fp16")
    straight, full = trained(dalle, tmp_path, [*fp16, *options(weights="fp16")], fp16)
    held = kinds(straight, "weights")
    assert held["layers.0.mlp.up.weight"] == torch.float16
    assert held["layers.0.mlp.up.bias"] == held["image_head.weight"] == torch.float32
    for a, b in zip(losses(straight), losses(full), strict=True):
        assert abs(a - b) < 5e-3 * b
    assert losses(straight) != losses(full)
    done = dalle("sample", "a red circle", "--run", straight)
    assert done.code == 0, done.err


def test_weights_in_fp16_ask_for_all_that_they_need(dalle, tmp_path):
    assert dalle(*dvae(tmp_path)).code == 0
    done = dalle(*prior(tmp_path, *options(optimizer="adamw", weights="fp16", moments="16bit")))
    assert done.code == 2
    assert "weights=fp16 leaves no fp32 weights" in done.err.splitlines()[-1]


def test_a_run_that_would_compress_between_machines_trains_on_one(dalle, tmp_path):
    """There is nothing to compress, and no error sum to save."""
    assert dalle(*dvae(tmp_path)).code == 0
    done = dalle(*prior(tmp_path, *options(compression_rank=4)))
    assert done.code == 0, done.err
    assert State(tmp_path / "prior/state/step-00000004").names("errors") == set()
