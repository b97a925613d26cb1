"""The whole road in a given time, with the smallest of models."""

import dataclasses
import json

import pytest

import dalle.demo
from dalle.checkpoint import write_json
from dalle.demo import demo
from dalle.errors import ConfigError
from dalle.metrics import read_metrics
from dalle.states import write_state
from stage1_dvae.config import PRESETS as DVAE_PRESETS
from stage2_prior.config import PRESETS as PRIOR_PRESETS

SMALL = {"batch_size": 4, "workers": 0, "precision": "fp32", "eval_pictures": 3, "log_every": 1}


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


def steps(run, stage):
    return json.loads((run / stage / "config.json").read_text())["training"]["steps"]


@pytest.fixture
def quick(monkeypatch):
    """A demo of a minute that trains for some seconds of it."""
    monkeypatch.setattr(dalle.demo, "DVAE_SHARE", 0.02)
    monkeypatch.setattr(dalle.demo, "PRIOR_SHARE", 0.04)


def test_a_demo_ends_in_a_report_and_its_steps_are_those_that_there_was_time_for(tmp_path, quick):
    run = tmp_path / "run"
    assert demo(run, 1.0)
    figures = json.loads((run / "report.json").read_text())
    assert figures["command"] == "dalle demo --minutes 1"
    assert all(split["prompts"] == 2 for split in figures["splits"].values())
    for stage, seconds in (("dvae", 1.2), ("prior", 2.4)):
        made = figures["stages"][stage]
        assert made["steps"] == steps(run, stage)
        lines = [line["seconds"] for line in read_metrics(run / stage) if "seconds" in line]
        assert len(lines) == made["steps"]
        assert sum(lines[:-1]) < seconds + 1  # one update may be under way when time is up
    page = (run / "report.html").read_text()
    assert "<svg" in page
    assert "at temperature 1, top-p 0.8, guidance 1.25." in page


def test_a_stopped_demo_goes_on_as_it_was_begun(tmp_path, quick, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as stopped:
        stopped.setattr(dalle.demo, "train_prior", lambda *_, **__: False)  # as after a Ctrl-C
        assert not demo(run, 1.0)
    begun, written = steps(run, "dvae"), (run / "dvae" / "weights.safetensors").stat().st_mtime_ns
    given = []
    monkeypatch.setattr(dalle.demo, "train_prior", lambda options, *_, **__: given.append(options) or True)
    monkeypatch.setattr(dalle.demo, "judge_and_report", lambda *_: None)
    assert demo(run, 1.0)
    assert steps(run, "dvae") == begun
    assert (run / "dvae" / "weights.safetensors").stat().st_mtime_ns == written
    assert given[0].minutes == 0.04  # not the whole minute, though the first stage took none of it


@pytest.mark.parametrize(("made", "of", "fitted"), [(4, 4000, False), (10, 4000, True), (4, 4, True)])
def test_a_stage_stopped_before_its_steps_were_fitted_keeps_its_minutes(tmp_path, made, of, fitted):
    write_state(tmp_path / "prior" / "state", made, {}, {}, keep=2)
    write_json(tmp_path / "prior" / "config.json", {"training": {"steps": of}})
    assert dalle.demo._options(tmp_path, "prior", 3.0).minutes == (None if fitted else 3.0)


def test_the_prior_has_the_time_that_is_left(tmp_path, monkeypatch):
    given, now = {}, [0.0]
    monkeypatch.setattr(dalle.demo.time, "monotonic", lambda: now[0])

    def trained(stage, seconds):
        def train(options, *_, **__):
            given[stage] = options.minutes
            now[0] += seconds
            return True

        return train

    monkeypatch.setattr(dalle.demo, "train_dvae", trained("dvae", 150.0))  # clustering took a while
    monkeypatch.setattr(dalle.demo, "codec_of", lambda _: None)
    monkeypatch.setattr(dalle.demo, "train_prior", trained("prior", 1.0))
    monkeypatch.setattr(dalle.demo, "judge_and_report", lambda *_: None)
    assert demo(tmp_path, 10.0)
    assert given == {"dvae": 0.5, "prior": pytest.approx(9.5 - 2.5)}


@pytest.mark.parametrize("saved", [True, False])
def test_a_run_that_is_no_demo_is_refused(tmp_path, saved):
    dalle.demo.write_json(tmp_path / "prior" / "config.json", {})
    if saved:
        (tmp_path / "prior" / "state" / "step-00000010").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds a training that was not begun as a demo: use another --run"):
        demo(tmp_path, 7.0)
    assert not (tmp_path / "demo.json").exists()


def test_another_time_in_the_same_folder_is_refused(tmp_path):
    dalle.demo.write_json(tmp_path / "demo.json", {"minutes": 5})
    with pytest.raises(ConfigError, match="was begun with --minutes 5, not 7: keep it, or use another --run"):
        demo(tmp_path, 7.0)
    with pytest.raises(ConfigError, match=r"minutes=0.5 is too short"):
        demo(tmp_path, 0.5)
