"""What a training command is to do."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from dalle import states
from dalle.checkpoint import write_json
from dalle.distributed import Part
from dalle.errors import CheckpointError, ConfigError
from dalle.runs import HORIZONS, Options, StageRun, resolve_run
from dalle.states import write_state
from dalle.training import CHANGEABLE
from stage1_dvae.config import PRESETS as DVAE_PRESETS
from stage1_dvae.config import DVAEConfig, DVAETraining
from stage2_prior.config import PRESETS as PRIOR_PRESETS
from stage2_prior.config import PriorTraining

MODEL = DVAEConfig(image_size=16, vocab_size=13, hidden=4, codebook_width=6, groups=2, blocks_per_group=1)
TRAINING = DVAETraining(batch_size=4, steps=1000, lr_steps=900, beta_steps=500, tau_steps=700, warmup=50)
PRESETS = {"tiny": (MODEL, TRAINING), "large": (MODEL, dataclasses.replace(TRAINING, batch_size=64))}


def resolve(run, *settings: str, **options) -> StageRun:
    given = Options(run, settings=settings, **options)
    return resolve_run(given, "dvae", PRESETS, default_preset="tiny", default_data="scenes")


@pytest.fixture
def started(tmp_path):
    """A run that was started with 500 steps and has saved nothing yet."""
    resolve(tmp_path, data="/pictures", steps=500).write(dvae="0123")
    return tmp_path


@pytest.fixture
def begun(started):
    """The same after its first save."""
    (started / "dvae" / "state" / "step-00000100").mkdir(parents=True)
    return started


def test_without_options_it_is_the_default_preset_on_the_default_data(tmp_path):
    spans = ("warmup", "lr_steps", "beta_steps", "tau_steps")
    assert resolve(tmp_path) == StageRun(
        tmp_path / "dvae", "tiny", "scenes", MODEL, TRAINING, resumed=False, spans=spans
    )


def test_options_choose_the_preset_the_data_and_single_settings(tmp_path):
    chosen = resolve(tmp_path, "hidden=8", "lr=0.5", preset="large", data="/my/pictures")
    assert (chosen.preset, chosen.data) == ("large", "/my/pictures")
    assert chosen.model == dataclasses.replace(MODEL, hidden=8)
    assert chosen.training == dataclasses.replace(TRAINING, batch_size=64, lr=0.5)


@pytest.mark.parametrize(
    ("name", "hint"), [("tinny", "did you mean 'tiny'"), ("x", "choose from tiny, large")]
)
def test_an_unknown_preset_is_refused(tmp_path, name, hint):
    with pytest.raises(ConfigError, match=f"unknown preset '{name}'; {hint}"):
        resolve(tmp_path, preset=name)


@pytest.mark.parametrize("given", [{"steps": 300}, {"settings": ("steps=300",)}])
def test_horizons_scale_with_the_steps(tmp_path, given):
    settings = given.pop("settings", ())
    training = resolve(tmp_path, *settings, **given).training
    expected = (300, 270, 150, 210, 15)
    assert (
        training.steps, training.lr_steps, training.beta_steps, training.tau_steps, training.warmup
    ) == expected  # fmt: skip


def test_a_horizon_that_is_set_stays(tmp_path):
    training = resolve(tmp_path, "tau_steps=123", " warmup =7", steps=2000).training
    assert (training.tau_steps, training.warmup) == (123, 7)
    assert (training.lr_steps, training.beta_steps) == (1800, 1000)


def test_everything_else_stays_when_the_steps_change(tmp_path):
    long, short = (dataclasses.asdict(resolve(tmp_path, steps=n).training) for n in (1000, 10))
    assert {name for name in long if long[name] != short[name]} == {
        "steps", "lr_steps", "beta_steps", "tau_steps", "warmup",
    }  # fmt: skip


def test_minutes_fit_the_horizons_that_are_not_set(tmp_path):
    run = resolve(tmp_path, "tau_steps=123", minutes=2.0)
    assert run.budget().left == pytest.approx(120, abs=1)
    fitted = run.budget().fitted(100)
    assert (fitted.steps, fitted.lr_steps, fitted.beta_steps, fitted.tau_steps) == (100, 90, 50, 123)
    assert resolve(tmp_path).budget() is None


def test_minutes_of_a_run_that_goes_on_change_its_steps_alone(begun):
    training = resolve(begun).training
    assert resolve(begun, minutes=2.0).budget().fitted(700) == dataclasses.replace(training, steps=700)


@pytest.mark.parametrize("given", [{"steps": 9}, {"settings": ("steps=9",)}])
def test_minutes_and_steps_exclude_each_other(tmp_path, given):
    with pytest.raises(ConfigError, match="--minutes and --steps both say when to end: give one of them"):
        resolve(tmp_path, *given.pop("settings", ()), **given, minutes=1.0)


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan"), float("inf")])
def test_minutes_that_are_none_are_refused(tmp_path, minutes):
    with pytest.raises(ConfigError, match=f"--minutes {minutes:g} is no time to train for"):
        resolve(tmp_path, minutes=minutes)


def test_every_span_of_steps_in_the_presets_is_a_horizon():
    for presets in (DVAE_PRESETS, PRIOR_PRESETS):
        for _, training in presets.values():
            spans = {
                f.name for f in dataclasses.fields(training) if "updates over which" in f.metadata["doc"]
            }
            assert spans <= set(HORIZONS)
    assert "warmup" in HORIZONS


def test_steps_of_zero_leave_horizons_of_zero(tmp_path):
    training = resolve(tmp_path, steps=0).training
    assert (training.steps, training.lr_steps, training.warmup) == (0, 0, 0)


def test_config_json_holds_all_that_was_resolved(begun):
    saved = json.loads((begun / "dvae" / "config.json").read_text())
    assert (saved["format"], saved["preset"], saved["dvae"]) == (1, "tiny", "0123")
    assert saved["data"] == "/pictures"
    assert DVAEConfig(**saved["model"]) == MODEL
    assert DVAETraining(**saved["training"]) == dataclasses.replace(
        TRAINING, steps=500, lr_steps=450, beta_steps=250, tau_steps=350, warmup=25
    )


def test_a_run_is_continued_with_its_own_configuration(begun):
    first, again = resolve(begun, preset=None), resolve(begun, data="/pictures", preset="tiny", steps=500)
    assert first == again
    assert first.resumed
    assert (first.data, first.training.steps, first.training.lr_steps) == ("/pictures", 500, 450)


def test_data_are_the_same_from_every_working_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    run = tmp_path / "run"
    monkeypatch.chdir(tmp_path / "here")
    resolve(run, data="photos").write()
    (run / "dvae" / "state" / "step-00000100").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "there")
    for same in ("../here/photos", "~/here/photos", None):
        assert resolve(run, data=same).data == str(tmp_path / "here" / "photos")
    with pytest.raises(ConfigError, match=r"started with --data .*/here/photos, not .*/there/photos"):
        resolve(run, data="photos")


def test_a_folder_called_scenes_is_not_the_built_in_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    resolve(tmp_path).write()
    (tmp_path / "dvae" / "state" / "step-00000100").mkdir(parents=True)
    assert resolve(tmp_path, data="scenes").data == "scenes"
    with pytest.raises(ConfigError, match=r"started with --data scenes, not .*/scenes"):
        resolve(tmp_path, data="./scenes")


def test_a_continued_run_does_not_follow_a_changed_preset(begun, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", (MODEL, dataclasses.replace(TRAINING, lr=0.125)))
    assert resolve(begun).training.lr == TRAINING.lr


def test_more_steps_go_on_along_the_same_schedules(begun):
    longer = resolve(begun, steps=800).training
    assert (longer.steps, longer.lr_steps, longer.warmup) == (800, 450, 25)


def test_what_may_change_are_settings_of_a_stage():
    known = {field.name for stage in (DVAETraining, PriorTraining) for field in dataclasses.fields(stage)}
    assert known >= CHANGEABLE


@pytest.mark.parametrize("name", sorted(name for name in CHANGEABLE if hasattr(TRAINING, name)))
def test_what_cannot_change_the_course_may_be_set_anew(begun, name):
    old = getattr(resolve(begun).training, name)
    others = {"offload": "cpu"}
    value = others.get(name) or ("true" if isinstance(old, bool) else str(old + 1))
    assert getattr(resolve(begun, f"{name}={value}").training, name) != old


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        (("lr=0.5",), {}, r"started with lr=0.0001, not 0.5"),
        (("hidden=8",), {}, r"started with hidden=4, not 8"),
        (("batch_size=8",), {}, r"started with batch_size=4, not 8"),
        (("seed=1",), {}, r"started with seed=0, not 1"),
        ((), {"preset": "large"}, r"started with --preset tiny, not large"),
        (
            (),
            {"data": "scenes"},
            r"started with --data /pictures, not scenes.* only moved, change data in",
        ),
    ],
)
def test_a_contradiction_is_refused_in_one_line_with_the_way_out(begun, settings, options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(begun, *settings, **options)
    assert str(caught.value).startswith(f"{begun / 'dvae'} was started with")
    assert "keep it, or use another --run" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_shapes_an_update_may_not_be_set_anew():
    shaping = {
        "lr",
        "lr_end",
        "warmup",
        "patience",
        "batch_size",
        "clip",
        "beta1",
        "beta2",
        "ema_decay",
        "seed",
    }
    assert not CHANGEABLE & (shaping | {"precision", "weight_decay", "caption_dropout", "text_weight"})


def test_data_that_config_json_names_by_hand_are_no_contradiction(begun, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    path = begun / "dvae" / "config.json"
    path.write_text(path.read_text().replace('"/pictures"', '"~/moved"'))
    for same in ("~/moved", "/home/someone/moved"):
        assert resolve(begun, data=same).resumed


def test_repeating_what_is_so_is_no_contradiction(begun):
    assert resolve(begun, "lr=1e-4", "hidden=4", preset="tiny") == resolve(begun)


def test_a_run_that_ended_within_its_first_save_starts_anew(started):
    """Its weights have their name already, its state has not."""
    (started / "dvae" / "weights.safetensors").touch()
    (started / "dvae" / "state" / "step-00000100.partial").mkdir(parents=True)
    assert not resolve(started, "batch_size=8").resumed


@pytest.mark.parametrize("failing", ["write_text", "sync"])
def test_a_run_whose_disk_filled_within_its_first_save_starts_anew(failing, started, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    owner = {"write_text": Path, "sync": states}[failing]
    weights = {"w": Part((3,), 0, torch.ones(3))}
    folder = started / "dvae"
    save = partial(write_state, folder / "state", 100, {"average": weights}, {}, 2)
    with monkeypatch.context() as patched:
        copy = shutil.copyfile

        def copied(*paths):
            copy(*paths)
            patched.setattr(owner, failing, full)

        patched.setattr(shutil, "copyfile", copied)
        with pytest.raises(CheckpointError, match="No space left"):
            save(weights=folder / "weights.safetensors")
    assert not resolve(started).resumed
    save(weights=folder / "weights.safetensors")
    assert resolve(started).resumed
    assert not list((folder / "state").glob("*.partial"))


def test_a_run_that_saved_nothing_starts_anew(started):
    again = resolve(started, "batch_size=8", steps=300)
    assert not again.resumed
    assert (again.data, again.training.batch_size, again.training.lr_steps) == ("/pictures", 8, 270)
    assert resolve(started, data="scenes").data == "scenes"
    assert "lr_steps" in again.spans


def test_a_run_that_saved_nothing_keeps_what_is_not_given_anew(tmp_path, capsys):
    begun = resolve(tmp_path, "hidden=8", "warmup=7", preset="large", data="/pictures", steps=500)
    begun.write()
    again = resolve(tmp_path)
    assert dataclasses.replace(again, spans=()) == dataclasses.replace(begun, spans=())
    assert "was begun before and saved nothing" in capsys.readouterr().err
    assert resolve(tmp_path, "lr=0.1").training == dataclasses.replace(begun.training, lr=0.1)
    assert resolve(tmp_path, steps=100).training.lr_steps == 90
    other = resolve(tmp_path, preset="tiny")
    assert (other.data, other.model, other.training) == ("/pictures", MODEL, TRAINING)


@pytest.mark.parametrize("damage", ['{"training": {}, "preset"', '{"training": {"lrr": 1}, "model": {}}'])
def test_what_a_run_that_saved_nothing_left_behind_blocks_nothing(started, damage):
    (started / "dvae" / "config.json").write_text(damage)
    assert resolve(started).training == TRAINING


def test_a_prior_that_saved_nothing_was_begun_on_the_dvae_of_then(started):
    known, other = (
        resolve_run(Options(started), "dvae", PRESETS, default_preset="large", default_data="new", dvae=dvae)
        for dvae in ("0123", "4567")
    )
    assert (known.preset, known.data) == ("tiny", "/pictures")
    assert (other.preset, other.data) == ("large", str(Path("new").absolute()))


@pytest.mark.parametrize("kept", ["state/step-00000100/state.json", "weights.safetensors"])
def test_a_model_whose_config_was_lost_is_not_trained_over(kept, started):
    (started / "dvae" / kept).parent.mkdir(parents=True, exist_ok=True)
    (started / "dvae" / kept).touch()
    (started / "dvae" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"holds a model, but no config\.json that tells of what kind"):
        resolve(started)


def test_fewer_steps_than_are_made_are_refused(begun):
    with pytest.raises(ConfigError, match="has 100 steps already: give --steps so many or more, not 99"):
        resolve(begun, steps=99)
    assert resolve(begun, steps=100).training.steps == 100


def test_a_state_beyond_the_steps_of_its_run_is_no_reason_to_refuse_these(tmp_path):
    """As where a run in minutes was killed between fitting a nearer end and saving."""
    resolve(tmp_path, steps=50).write()
    (tmp_path / "dvae" / "state" / "step-00000100").mkdir(parents=True)
    assert resolve(tmp_path).training.steps == resolve(tmp_path, steps=50).training.steps == 50


def test_a_model_without_a_state_is_not_trained_over(started):
    (started / "dvae" / "weights.safetensors").touch()
    with pytest.raises(ConfigError, match="holds a trained model, but no training state to go on from"):
        resolve(started)


def test_an_unknown_preset_is_named_on_a_continued_run_too(begun):
    with pytest.raises(ConfigError, match="tyni"):
        resolve(begun, preset="tyni")


def test_an_imported_model_has_no_training_to_continue(tmp_path):
    write_json(tmp_path / "dvae" / "config.json", {"format": 1, "preset": "imported", "model": {}})
    (tmp_path / "dvae" / "weights.safetensors").touch()
    with pytest.raises(ConfigError, match="imported model without a training run"):
        resolve(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "damaged or of another program"),
        ('{"format": 2}', "newer version"),
        ('{"training": {}, "model": {"width": 3}, "preset": "tiny", "data": "scenes"}', "DVAEConfig"),
        ('{"training": {"steps": "5"}, "model": {}, "preset": "tiny", "data": "scenes"}', "steps|missing"),
        ('{"training": {}, "preset": "tiny", "data": "scenes"}', "config.json"),
        ('{"training": {}, "model": {}}', "config.json"),
        ('{"training": 3, "model": {}, "preset": "tiny", "data": "scenes"}', "config.json"),
    ],
)
def test_a_damaged_config_is_told_and_kept(tmp_path, content, message):
    path = tmp_path / "dvae" / "config.json"
    (path.parent / "state" / "step-00000100").mkdir(parents=True)
    path.write_text(content)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        resolve(tmp_path)
    assert path.read_text() == content


def test_resolving_writes_nothing(tmp_path):
    resolve(tmp_path / "run", steps=3)
    assert not (tmp_path / "run").exists()


def test_show_names_every_setting_with_its_meaning_and_the_papers_value(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    resolve(tmp_path).show()
    shown = capsys.readouterr().out
    for section in (MODEL, TRAINING):
        for field in dataclasses.fields(section):
            assert field.name in shown
            assert field.metadata["doc"]
    assert "1,200,000" in shown
    assert "preset tiny, data scenes" in shown
