"""The dVAE's settings and presets."""

import dataclasses
import json

import pytest

from dalle.config import describe, from_json, override, to_json
from dalle.errors import ConfigError
from stage1_dvae.config import PRESETS, DVAEConfig, DVAETraining

EACH_PRESET = pytest.mark.parametrize("name", PRESETS)


def section(name: str) -> dict[str, object]:
    return dict(zip(("model", "training"), PRESETS[name], strict=True))


@EACH_PRESET
def test_a_presets_schedules_end_within_its_steps(name):
    training = PRESETS[name][1]
    assert training.lr_end <= training.lr
    assert training.warmup + training.eval_every <= training.steps
    for horizon in (training.lr_steps, training.beta_steps, training.tau_steps):
        assert 0 < horizon <= training.steps
    assert training.tau <= training.tau_start


@EACH_PRESET
def test_a_preset_survives_json_and_any_of_its_values_can_be_set(name):
    for config in PRESETS[name]:
        assert from_json(type(config), json.loads(json.dumps(to_json(config))), "config.json") == config
    settings = [f"{key}={value}" for key, value, *_ in describe(section(name))]
    assert override(section(name), settings) == section(name)


def test_every_field_says_what_it_means_and_no_name_stands_in_both_sections():
    rows = describe(section("paper"))
    assert all(doc for _, _, doc, _ in rows)
    assert len({key for key, *_ in rows}) == len(rows)


def test_the_papers_numbers():
    model, training = PRESETS["paper"]
    assert (model.image_size, model.vocab_size, model.hidden, model.grid) == (256, 8192, 256, 32)
    assert model.resblock_gain == 1 / 64
    assert (training.batch_size, training.steps) == (512, 3_000_000)
    assert (training.lr, training.lr_end, training.lr_steps) == (1e-4, 1.25e-6, 1_200_000)
    assert (training.beta_start, training.beta, training.beta_steps) == (0, 6.6, 5_000)
    assert (training.tau_start, training.tau, training.tau_steps) == (1, 1 / 16, 150_000)
    assert (training.beta1, training.beta2, training.weight_decay) == (0.9, 0.999, 1e-4)
    assert (training.ema_decay, training.ema_every, training.clip, training.warmup) == (0.999, 1, None, 0)
    assert training.usage_weight == 0


def test_the_grid_is_the_image_over_the_stride():
    assert [DVAEConfig(image_size=96, groups=g).grid for g in (1, 2, 3, 4, 5)] == [96, 48, 24, 12, 6]


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (DVAEConfig, {"image_size": 100}, "image_size=100 must be a multiple of 8 .*use 96 or 104"),
        (DVAEConfig, {"image_size": 5}, "use 8 or 16"),
        (DVAEConfig, {"hidden": 18}, "hidden=18 must be a multiple of 4"),
        (DVAEConfig, {"vocab_size": 1}, "vocab_size=1 must be at least 2"),
        (DVAEConfig, {"groups": 0}, "groups=0 must be at least 1"),
        (DVAETraining, {"tau": 0.0}, "tau=0.0 must be above 0"),
        (DVAETraining, {"lr": 0.0}, "lr=0.0 must be above 0"),
        (DVAETraining, {"batch_size": 0}, "batch_size=0 must be at least 1"),
        (DVAETraining, {"ema_every": 0}, "ema_every=0 must be at least 1"),
        (DVAETraining, {"ema_decay": 1.5}, "ema_decay=1.5 must be at least 0 and below 1"),
        (DVAETraining, {"beta2": 1.0}, "beta2=1.0 must be at least 0 and below 1"),
        (DVAETraining, {"clip": 0.0}, "clip=0.0 must be above 0; clip=none sets no limit"),
        (DVAETraining, {"seed": -1}, "seed=-1 must not be negative"),
        (DVAETraining, {"lr_end": -1e-5}, "lr_end=-1e-05 must not be negative"),
        (DVAETraining, {"lr_steps": -1}, "lr_steps=-1 must not be negative"),
        (DVAETraining, {"warmup": -1}, "warmup=-1 must not be negative"),
        (DVAETraining, {"beta_steps": -1}, "beta_steps=-1 must not be negative"),
        (DVAETraining, {"tau_steps": -1}, "tau_steps=-1 must not be negative"),
        (DVAETraining, {"heldout": 1.0}, "heldout=1.0 must be at least 0 and below 1"),
    ],
)
def test_values_that_cannot_be_are_refused(kind, values, message):
    with pytest.raises(ConfigError, match=message):
        kind(**values)


def test_micro_batches_make_up_the_batch():
    training = PRESETS["paper"][1]
    assert training.micro_batches(1) == 1
    assert dataclasses.replace(training, micro_batch=64).micro_batches(1) == 8
    assert dataclasses.replace(training, micro_batch=100).micro_batches(1) == 8  # at most
