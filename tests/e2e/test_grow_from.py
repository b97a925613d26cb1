"""`dalle train-prior --grow-from`: a run that begins with the prior of another, over coarser codes."""

import json
import shutil
from pathlib import Path

import pytest

from dalle.checkpoint import fingerprint
from dalle.metrics import read_metrics
from tests.e2e.settings import begin, dvae, options, prior
from tests.e2e.warm import complaint

TWICE_AS_FINE = options(patch=2)


@pytest.fixture(scope="module")
def coarse(dalle, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("coarse") / "run"
    for command in (dvae(run, steps=2), prior(run, *options(log_every=1), steps=40)):
        done = dalle(*command)
        assert done.code == 0, done.err
    return run


@pytest.fixture(scope="module")
def fine(dalle, coarse, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("fine") / "run"
    for command in (
        dvae(run, *TWICE_AS_FINE, steps=2),
        prior(run, "--grow-from", coarse, *options(log_every=1), steps=2),
    ):
        done = dalle(*command)
        assert done.code == 0, done.err
    assert "prior: beginning with one over 4×4 codes, for 8×8" in done.err
    assert "the tokenizer is that prior's, so bpe_captions, bpe_vocab changes nothing" in done.err
    return run


def config(run: Path) -> dict:
    return json.loads((run / "prior" / "config.json").read_text())


def test_it_begins_where_the_coarse_one_ended_as_far_as_the_text_goes(coarse, fine):
    assert config(fine)["model"]["grid"] == 2 * config(coarse)["model"]["grid"]
    assert config(fine)["grown_from"] == fingerprint(coarse / "prior" / "weights.safetensors")
    assert config(fine)["tokenizer"] == config(coarse)["tokenizer"]
    learned = [line["text_loss"] for line in read_metrics(coarse / "prior") if "text_loss" in line]
    begun = [line["text_loss"] for line in read_metrics(fine / "prior") if "text_loss" in line]
    assert begun[0] < (learned[0] + learned[-1]) / 2


def test_it_goes_on_with_the_same_command_or_without_the_option(dalle, coarse, fine):
    for more, steps in ((("--grow-from", coarse), 3), ((), 4)):
        done = dalle(*prior(fine, *more, *options(log_every=1), steps=steps))
        assert done.code == 0, done.err
        assert "going on" in done.err
        assert config(fine)["grown_from"] == fingerprint(coarse / "prior" / "weights.safetensors")


def test_a_run_that_was_begun_otherwise_is_refused(dalle, coarse, fine):
    said = complaint(dalle(*prior(coarse, "--grow-from", coarse, steps=40)))
    assert "was begun without another prior" in said
    said = complaint(dalle(*prior(fine, "--grow-from", fine, steps=40)))
    assert f"was begun with the prior {config(fine)['grown_from']}" in said


def test_a_grown_run_that_saved_nothing_does_not_begin_without_the_other_prior(dalle, coarse, fine, tmp_path):
    run = Path(shutil.copytree(fine, tmp_path / "run"))
    shutil.rmtree(run / "prior" / "state")
    (run / "prior" / "weights.safetensors").unlink()
    assert "saved nothing: give --grow-from again" in complaint(dalle(*prior(run, steps=2)))
    assert dalle(*prior(run, "--grow-from", coarse, steps=2)).code == 0
    assert config(run)["grown_from"] == config(fine)["grown_from"]


def test_what_does_not_fit_is_told_before_anything_is_written(dalle, coarse, fine, tmp_path):
    run = begin(fine, tmp_path, "prior")
    said = complaint(dalle(*prior(run, "--grow-from", tmp_path / "nowhere")))
    assert "nowhere holds no trained dvae" in said
    said = complaint(dalle(*prior(run, "--grow-from", coarse, "--set", "depth=5")))
    assert "depth=3, the new one depth=5" in said
    assert not (run / "prior" / "config.json").exists()


def test_a_prior_beside_another_dvae_is_not_grown_from(dalle, coarse, fine, tmp_path):
    """Its codes mean nothing there."""
    run, mixed = begin(fine, tmp_path, "prior"), tmp_path / "mixed"
    shutil.copytree(coarse / "prior", mixed / "prior")
    shutil.copytree(fine / "dvae", mixed / "dvae")
    said = complaint(dalle(*prior(run, "--grow-from", mixed)))
    assert "was trained on the dVAE" in said
