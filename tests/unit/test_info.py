"""What a run folder says about itself."""

import json

import pytest

from dalle.checkpoint import fingerprint, read_json, write_json
from dalle.errors import CheckpointError
from dalle.info import describe_run, facts_of_run
from dalle.states import write_state
from tests import tiny


@pytest.fixture
def run(tmp_path):
    return tiny.write_run(tmp_path / "run")


def train(stage, **training) -> None:
    """Let its settings say how it is trained."""
    path = stage / "config.json"
    write_json(path, read_json(path) | {"training": training})


def count(model) -> int:
    return sum(p.numel() for p in model.parameters())


def test_both_stages_with_shapes_parameters_and_fingerprints(run):
    facts = facts_of_run(run)
    assert facts["run"] == str(run)
    assert facts["dvae"]["parameters"] == count(tiny.dvae())
    assert facts["dvae"]["model"]["vocab_size"] == 13
    assert facts["dvae"]["fingerprint"] == fingerprint(run / "dvae" / "weights.safetensors")
    words = facts["prior"]["model"]["text_vocab"]
    assert facts["prior"]["parameters"] == count(tiny.prior(text_length=9, text_vocab=words))
    assert facts["prior"]["trained_on_dvae"] == facts["dvae"]["fingerprint"]
    assert json.loads(json.dumps(facts)) == facts


def test_steps_and_the_last_of_each_metric(run):
    lines = [
        {"step": 10, "loss": 3.0, "grad_norm": 1.0},
        {"step": 10, "heldout_loss": 2.5},
        {"step": 20, "loss": 2.0},
        {"step": 30, "loss": None, "heldout_codebook_usage": 0.25, "seconds": 1.0},
    ]
    path = run / "dvae" / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4')
    facts = facts_of_run(run)["dvae"]
    assert facts["steps"] == 30
    assert facts["metrics"] == {"loss": None, "heldout_loss": 2.5, "heldout_codebook_usage": 0.25}
    assert "heldout_loss 2.5" in describe_run(facts_of_run(run))


def test_steps_are_those_that_are_saved_not_what_the_log_or_the_settings_say(run):
    (run / "dvae" / "metrics.jsonl").write_text(json.dumps({"step": 30, "loss": 1.0}) + "\n")
    write_state(run / "dvae" / "state", 25, {}, {}, keep=2)
    write_state(run / "prior" / "state", 4, {}, {}, keep=2)
    facts = facts_of_run(run)
    assert (facts["dvae"]["steps"], facts["prior"]["steps"]) == (25, 4)


def test_states_are_listed_newest_first(run):
    for step in (5, 10):
        write_state(run / "prior" / "state", step, {}, {}, keep=2)
    assert facts_of_run(run)["prior"]["states"] == ["step-00000010", "step-00000005"]
    assert "to resume from: step-00000010, step-00000005" in describe_run(facts_of_run(run))


def test_the_words_name_both_stages_and_what_is_missing(run):
    words = describe_run(facts_of_run(run))
    assert words.startswith(str(run))
    for part in ("dvae: preset tiny", "prior: preset tiny", "vocab_size=13", "depth=3"):
        assert part in words
    (run / "prior" / "config.json").unlink()
    assert "prior: not there yet" in describe_run(facts_of_run(run))


def test_a_run_that_has_only_begun_has_no_weights_yet(run):
    (run / "dvae" / "weights.safetensors").unlink()
    train(run / "dvae", steps=40)
    facts = facts_of_run(run)
    assert facts["dvae"]["steps"] == 0
    assert "parameters" not in facts["dvae"]
    assert "weights none, to resume from: nothing" in describe_run(facts)


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_folder_without_a_run_is_told(tmp_path, name):
    with pytest.raises(CheckpointError, match="is no run folder"):
        facts_of_run(tmp_path / name)


@pytest.mark.parametrize("damage", ["weights", "config", "no model"])
def test_damage_is_told_by_its_file(run, damage):
    if damage == "weights":
        path = run / "dvae" / "weights.safetensors"
        path.write_bytes(path.read_bytes()[:100])
    else:
        path = run / "prior" / "config.json"
        path.write_text('{"format": 1}' if damage == "no model" else "{")
    with pytest.raises(CheckpointError) as caught:
        facts_of_run(run)
    assert str(path) in str(caught.value)


def test_gradient_scales_are_those_of_the_last_line_and_the_most_troubled_resblock_is_named(run):
    assert "resblocks" not in facts_of_run(run)["prior"]
    lines = [
        {"step": 1, "log2_scales": [13.0, 13.0, 13.0], "overflows": [0.0, 0.0, 0.0]},
        {"step": 2, "log2_scales": [13.5, 9.25, 24.0], "overflows": [1.0, 7.0, 2.0]},
        {"step": 2, "heldout_loss": 1.0},
    ]
    path = run / "prior" / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = facts_of_run(run)
    assert facts["prior"]["resblocks"] == {"log2_scales": [13.5, 9.25, 24.0], "overflows": [1.0, 7.0, 2.0]}
    assert (
        "gradient scales 2^9.2 (resblock 2) to 2^24.0 (resblock 3), 10 overflows, most in resblock 2: 7"
        in describe_run(facts)
    )


def test_an_exported_stage_made_all_its_steps_and_one_with_odd_settings_none_here(run):
    train(run / "dvae", steps=40)
    path = run / "prior" / "config.json"
    write_json(path, read_json(path) | {"training": "odd"})
    told = describe_run(facts_of_run(run))
    assert "40 of 40 steps on scenes" in told
    assert "not trained here" in told
    assert told.index("dvae: ") < told.index("prior: ")


def test_where_nothing_overflowed_no_resblock_is_blamed(run):
    line = {"step": 1, "log2_scales": [13.0], "overflows": [0.0]}
    (run / "prior" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert describe_run(facts_of_run(run)).count("(resblock 1), 0 overflows\n") == 1
