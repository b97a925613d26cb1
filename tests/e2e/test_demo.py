"""The whole road in a given time, with the smallest of models."""

import dataclasses
import json

import pytest

import dalle.demo
from dalle.demo import demo
from dalle.errors import ConfigError
from stage1_dvae.config import PRESETS as DVAE_PRESETS
from stage2_prior.config import PRESETS as PRIOR_PRESETS

SMALL = {"batch_size": 4, "workers": 0, "precision": "fp32", "eval_pictures": 3}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The preset, cut down to what a second trains; 72 pixels stay, for the judge."""
    model, training = DVAE_PRESETS["tiny"]
    model = dataclasses.replace(model, vocab_size=16, hidden=12, codebook_width=12, blocks_per_group=1)
    monkeypatch.setitem(DVAE_PRESETS, "tiny", (model, dataclasses.replace(training, **SMALL)))
    model, training = PRIOR_PRESETS["tiny"]
    model = dataclasses.replace(model, width=12, heads=3, depth=2, text_length=90)
    training = dataclasses.replace(training, **SMALL, bpe_vocab=300, bpe_captions=50)
    monkeypatch.setitem(PRIOR_PRESETS, "tiny", (model, training))
    monkeypatch.setattr(dalle.demo, "PROMPTS", 2)
    monkeypatch.setattr(dalle.demo, "TRIAL", 4)


def steps(run, stage):
    return json.loads((run / stage / "config.json").read_text())["training"]["steps"]


def test_a_demo_ends_in_a_report_and_its_steps_are_fitted_to_the_machine(tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr(dalle.demo, "_measure", lambda stage, train: (4.0, 4))
    assert demo(run, 1.0)
    assert steps(run, "dvae") == round(0.1 * 60 * 4 / 4)
    assert steps(run, "prior") == round(0.76 * 60 * 4 / 4)
    figures = json.loads((run / "report.json").read_text())
    assert figures["command"] == "dalle demo --minutes 1"
    assert all(split["prompts"] == 2 for split in figures["splits"].values())
    assert figures["stages"]["prior"]["steps"] == steps(run, "prior")
    page = (run / "report.html").read_text()
    assert "<svg" in page
    assert "at temperature 1, top-p 0.8, guidance 1.25." in page


def test_a_stopped_demo_goes_on_as_it_was_begun(tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr(dalle.demo, "_measure", lambda stage, train: (1.0, 4))
    monkeypatch.setattr(dalle.demo, "train_prior", lambda *_, **__: False)  # as after a Ctrl-C
    assert not demo(run, 1.0)
    monkeypatch.undo()
    begun, written = steps(run, "dvae"), (run / "dvae" / "weights.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(dalle.demo, "_measure", lambda stage, train: (1.0, 4) if stage == "prior" else 1 / 0)
    monkeypatch.setattr(dalle.demo, "train_prior", lambda *_, **__: True)
    monkeypatch.setattr(dalle.demo, "judge_and_report", lambda *_: None)
    assert demo(run, 1.0)
    assert steps(run, "dvae") == begun
    assert (run / "dvae" / "weights.safetensors").stat().st_mtime_ns == written


def test_the_measurement_is_of_the_training_itself_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    rate, batch_size = dalle.demo._measure(
        "dvae", lambda trial: dalle.demo.train_dvae(dalle.demo._with(trial, "start=random"))
    )
    assert rate > 0
    assert batch_size == 4
    assert not list(tmp_path.rglob("config.json"))


def test_another_time_in_the_same_folder_is_refused(tmp_path):
    dalle.demo.write_json(tmp_path / "demo.json", {"minutes": 5})
    with pytest.raises(ConfigError, match="was begun with --minutes 5, not 7: keep it, or use another --run"):
        demo(tmp_path, 7.0)
    with pytest.raises(ConfigError, match=r"minutes=0.5 is too short"):
        demo(tmp_path, 0.5)
