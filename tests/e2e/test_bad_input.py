"""A caller's mistake is one line that helps, exit status 2, and nothing lost."""

import gc
import io
import json
import os
import re
import shutil
import signal
import sys
import tarfile
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import cli.main
from dalle.checkpoint import load_tensors, save_weights, sha256
from dalle.data.open import open_source
from dalle.states import TensorFile, newest_step
from tests import tiny
from tests.e2e.settings import dvae, options, prior
from tests.e2e.warm import complaint


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder, but for locks."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != ".lock"
    }


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy to be spoiled."""
    return shutil.copytree(trained, tmp_path / "run")


def died_early(stage: Path) -> None:
    """Leave what a start leaves that came no further than its first update."""
    shutil.rmtree(stage / "state")
    (stage / "weights.safetensors").unlink()


# What was trained


def test_weights_without_a_state_are_not_trained_over(dalle, run, tmp_path):
    assert dalle("export", run, tmp_path / "out").code == 0
    shutil.rmtree(run / "dvae" / "state")
    for folder, command in ((run, dvae), (tmp_path / "out", dvae), (tmp_path / "out", prior)):
        before = files(folder)
        line = complaint(dalle(*command(folder, steps=4)))
        assert "holds a trained model, but no training state to go on from: use another --run" in line
        assert files(folder) == before


def test_a_dvae_is_not_trained_anew_under_a_prior_that_was_begun_on_another(dalle, run):
    shutil.rmtree(run / "dvae")
    before = files(run)
    line = complaint(dalle(*dvae(run, steps=4)))
    assert "was begun on a dVAE that" in line
    assert "no longer holds: put it back, or use another --run" in line
    assert files(run) == before


def test_a_dvae_is_not_trained_on_under_its_prior(dalle, run):
    before = files(run)
    line = complaint(dalle(*dvae(run, steps=4)))
    assert (
        "was begun on this dVAE as it is after 2 steps, and would not fit it after 4: use another --run"
        in line
    )
    line = complaint(dalle("train-dvae", "--run", run, "--minutes", 1))
    assert "and would not fit it after more: use another --run" in line
    assert files(run) == before
    done = dalle(*dvae(run, steps=2))
    assert done.code == 0, done.err  # what is finished may be asked for again
    died_early(run / "prior")
    done = dalle(*dvae(run, steps=4))
    assert done.code == 0, done.err  # nothing was learned on it


def test_a_prior_that_died_before_it_saved_anything_starts_anew(dalle, run):
    died_early(run / "prior")
    done = dalle(*prior(run, "--set", "bpe_vocab=270", "--set", "batch_size=2", steps=2))
    assert done.code == 0, done.err
    config = json.loads((run / "prior" / "config.json").read_text())
    assert (config["model"]["text_vocab"], config["training"]["batch_size"]) == (270, 2)


def test_parts_that_do_not_fit_are_not_exported(dalle, run, tmp_path):
    weights = load_tensors(run / "dvae" / "weights.safetensors")
    save_weights(run / "dvae", {name: 2 * tensor for name, tensor in weights.items()})
    line = complaint(dalle("export", run, tmp_path / "out"))
    assert "was trained on the dVAE" in line
    (run / "prior" / "tokenizer.json").unlink()
    assert "the tokenizer cannot be read" in complaint(dalle("export", run, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    assert "is a file: name a new folder" in complaint(dalle("export", run, tmp_path / "file"))


# Data


def test_an_empty_folder(dalle, tmp_path):
    (tmp_path / "data").mkdir()
    line = complaint(dalle(*dvae(tmp_path / "run", "--data", tmp_path / "data")))
    assert "no picture among its files (none); give pictures with a .txt" in line
    assert not (tmp_path / "run").exists()


def test_an_empty_path(dalle, tmp_path):
    """As of a shell variable that is not set: not the scenes."""
    line = complaint(dalle(*dvae(tmp_path / "run", "--data", "")))
    assert line == "--data is empty; give scenes, or a path to pictures"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("minutes", ["nan", "inf", "0"])
def test_a_demo_of_no_time(dalle, tmp_path, minutes):
    line = complaint(dalle("demo", "--minutes", minutes, "--run", tmp_path / "demo"))
    assert line.endswith("give at least 1")
    assert not (tmp_path / "demo").exists()


def test_broken_pictures_that_are_held_out_are_named_too(dalle, tmp_path):
    data = tiny.write_folder(tmp_path / "data", 40)
    unseen = open_source(str(data), "heldout", 16, 0.3)
    bad = unseen.source.keys[int(unseen.indices[0])]
    (data / bad).write_bytes(b"no picture")
    done = dalle(*dvae(tmp_path / "run", "--data", data, "--set", "heldout=0.3"))
    assert done.code == 0, done.err
    assert f"skipped {bad}: not a picture" in done.err


def test_a_path_that_does_not_exist(dalle, tmp_path):
    line = complaint(dalle(*dvae(tmp_path / "run", "--data", tmp_path / "nowhere")))
    assert line.startswith(f"{tmp_path / 'nowhere'}: does not exist; give scenes, a folder of pictures")


def test_data_that_were_moved_while_a_run_was_not_trained(dalle, tmp_path):
    data, run = tiny.write_folder(tmp_path / "data"), tmp_path / "run"
    assert dalle(*dvae(run, "--data", data)).code == 0
    data.rename(tmp_path / "elsewhere")
    line = complaint(dalle(*dvae(run, steps=9)))
    assert line.startswith(f"{data}: does not exist; ")
    assert line.endswith(f"if they have only moved, change data in {run / 'dvae' / 'config.json'}")


def test_the_only_held_out_picture_is_broken(dalle, tmp_path):
    data = tiny.write_folder(tmp_path / "data")
    unseen = open_source(str(data), "heldout", 16, 0.0)
    (bad,) = (unseen.source.keys[i] for i in unseen.indices)
    (data / bad).write_bytes(b"no picture")
    line = complaint(dalle(*dvae(tmp_path / "run", "--data", data, "--set", "heldout=0")))
    assert line.startswith(f"{data}, held out: no readable picture among 1 tries; the first, {bad}: not a")
    assert line.endswith("mend it or take it away")


@pytest.mark.parametrize(
    ("columns", "named"), [(("picture", "caption"), "picture, caption"), (("image", "words"), "image, words")]
)
def test_a_manifest_without_one_of_its_columns(dalle, tmp_path, columns, named):
    data = tiny.write_csv(tmp_path / "data", columns)
    line = complaint(dalle(*dvae(tmp_path / "run", "--data", data)))
    assert f"line 2: columns {named}; expected a path in `image`, and captions in `caption`" in line


def test_no_captions_at_all(dalle, tmp_path):
    data = tiny.write_folder(tmp_path / "data", captioned=())
    assert "9 pictures, none with captions" in complaint(dalle(*dvae(tmp_path / "run", "--data", data)))


def test_pictures_that_are_all_too_small(dalle, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(5):
        (data / f"{i}.png").write_bytes(tiny.png(i, (15, 40)))
        (data / f"{i}.txt").write_text("small")
    line = complaint(dalle(*dvae(tmp_path / "run", "--data", data)))
    assert "no readable picture" in line
    assert "15×40 pixels, smaller than image_size=16" in line


def test_pictures_that_cannot_be_used_are_skipped_named_and_counted(dalle, tmp_path):
    data = tiny.write_folder(tmp_path / "data", 12, captioned=set(range(12)) - {3})
    (data / "5.png").write_bytes(b"no picture")
    (data / "7.png").write_bytes(tiny.png(7, (9, 9)))
    done = dalle(*dvae(tmp_path / "run", "--data", data, steps=5))
    assert done.code == 0, done.err
    for reason in ("3.png: captions 3.txt: no such file", "5.png: not a picture", "7.png: 9×9 pixels"):
        assert f"warning: skipped {reason}" in done.err
    assert "warning: 3 pictures were skipped" in done.err


def test_a_tar_that_is_cut_off_is_used_as_far_as_it_goes_and_named(dalle, tmp_path):
    data = tiny.write_tar(tmp_path / "data.tar")
    data.write_bytes(data.read_bytes()[:-14_000])
    done = dalle(*dvae(tmp_path / "run", "--data", data))
    assert done.code == 0, done.err
    assert re.search(r"warning: skipped data\.tar: .* what follows is lost", done.err)


def test_a_tar_without_a_caption(dalle, tmp_path):
    data = tmp_path / "data.tar"
    with tarfile.open(data, "w") as archive:
        member = tarfile.TarInfo("0.png")
        member.size = len(tiny.png(0))
        archive.addfile(member, io.BytesIO(tiny.png(0)))
    assert "1 pictures in 1 shards, none with captions" in complaint(
        dalle(*dvae(tmp_path / "run", "--data", data))
    )


# Settings


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["--set", "image_size=18"],
            "image_size=18 must be a multiple of 4 (= patch·2^(groups−1)): use 16 or 20",
        ),
        (["--preset", "tinny"], "unknown preset 'tinny'; did you mean 'tiny'?"),
        (["--set", "batchsize=3"], "unknown setting 'batchsize'; did you mean 'batch_size'?"),
        (["--set", "batch_size=3.5"], "batch_size=3.5 must be a whole number"),
        (["--set", "batch_size"], "is not of the form key=value"),
        (["--set", "lr=fast"], "lr=fast must be a number"),
        (["--set", "lr=nan"], "lr=nan must be a number"),
        (["--set", "flip=yes"], "flip=yes must be true or false"),
        (["--set", "precision=fp8"], "precision=fp8 must be one of"),
        (["--set", "hidden=6"], "hidden=6 must be a multiple of 4"),
        (["--set", "vocab_size=1"], "vocab_size=1 must be at least 2"),
    ],
)
def test_settings_of_the_dvae_that_cannot_be(dalle, tmp_path, more, said):
    assert said in complaint(dalle(*dvae(tmp_path / "run", *more)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--set", "grid=5"], "grid cannot be set: it comes from the run's dVAE"),
        (["--set", "text_vocab=5"], "text_vocab cannot be set: it comes from the run's tokenizer"),
        (["--set", "heads=5"], "width=12 must be a multiple of heads=5"),
        (["--set", "kernel=4"], "kernel=4 must be odd"),
        (["--set", "bpe_dropout=2"], "bpe_dropout=2.0 must lie between 0 and 1"),
        (["--set", "guidance=2", "--set", "caption_dropout=0"], "set caption_dropout"),
        (["--set", "bpe_vocab=100"], "must be at least 256"),
    ],
)
def test_settings_of_the_prior_that_cannot_be(dalle, run, more, said):
    shutil.rmtree(run / "prior")
    assert said in complaint(dalle(*prior(run, *more)))


@pytest.mark.parametrize(
    ("make", "more", "said"),
    [
        (dvae, options(hidden=8), "was started with hidden=12, not 8: keep it, or use another --run"),
        (
            dvae,
            ["--data", "/elsewhere"],
            "was started with --data scenes, not /elsewhere: keep it, or use another --run",
        ),
        (dvae, ["--preset", "small"], "was started with --preset tiny, not small"),
        (prior, options(depth=2), "was started with depth=3, not 2"),
        (prior, options(lr=1), "was started with lr="),
    ],
)
def test_a_run_that_was_started_otherwise(dalle, run, make, more, said):
    before = files(run)
    assert said in complaint(dalle(*make(run, *more, steps=9)))
    assert files(run) == before


# Run folders


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sample", "x"], "holds no trained dvae: `dalle train-dvae --run nowhere` trains one"),
        (["train-prior"], "holds no trained dvae: `dalle train-dvae --run nowhere` trains one"),
        (["reconstruct", "x.png"], "nowhere/dvae/config.json does not exist"),
    ],
)
def test_a_folder_without_a_model(dalle, tmp_path, arguments, said):
    assert said in complaint(dalle(*arguments, "--run", "nowhere"))
    assert "is no run folder" in complaint(dalle("info", tmp_path))


def test_a_dvae_alone_cannot_draw(dalle, run):
    shutil.rmtree(run / "prior")
    assert f"{run} holds no trained prior: `dalle train-prior" in complaint(
        dalle("sample", "x", "--run", run)
    )


def test_a_prior_on_another_dvae(dalle, run):
    before = (run / "prior" / "weights.safetensors").read_bytes()
    tiny.write_dvae(run, seed=1, vocab_size=16)
    said = complaint(dalle("sample", "x", "--run", run))
    assert re.search(r"was trained on the dVAE (\w{16}), but \S+ is (?!\1)(\w{16}): put that dVAE back", said)
    said = complaint(dalle(*prior(run, steps=9)))
    assert re.search(r"was begun on the dVAE (\w{16}), the one there now is (?!\1)(\w{16})", said)
    assert (run / "prior" / "weights.safetensors").read_bytes() == before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other(path: Path) -> None:
    path.write_text('{"something": "else"}')


@pytest.mark.parametrize("spoil", [cut, other])
@pytest.mark.parametrize(
    ("name", "commands"),
    [
        ("dvae/weights.safetensors", ["sample", "reconstruct", "info"]),
        ("dvae/config.json", ["sample", "reconstruct", "info", "train-dvae", "train-prior"]),
        ("prior/weights.safetensors", ["sample", "info"]),
        ("prior/config.json", ["sample", "info", "train-prior"]),
        ("prior/tokenizer.json", ["sample", "train-prior"]),
    ],
)
def test_a_damaged_file(dalle, run, tmp_path, spoil, name, commands):
    spoil(run / name)
    before = files(run)
    (tmp_path / "x.png").write_bytes(tiny.png(0))
    for command in commands:
        arguments = {
            "sample": ["sample", "x", "--run", run],
            "reconstruct": ["reconstruct", tmp_path / "x.png", "--run", run],
            "info": ["info", run],
            "train-dvae": dvae(run, steps=9),
            "train-prior": prior(run, steps=9),
        }[command]
        said = complaint(dalle(*arguments))
        assert str(run / name.split("/")[0]) in said
    assert files(run) == before


@pytest.mark.parametrize("name", ["weights.safetensors", "average.safetensors", "state.json"])
def test_states_that_are_all_damaged_stop_the_training(dalle, run, name):
    shutil.rmtree(run / "prior")  # under which the dVAE would not be trained on
    for state in (run / "dvae" / "state").iterdir():
        cut(state / name)
    before = files(run / "dvae" / "state")
    said = complaint(dalle(*dvae(run, steps=9)))
    assert "no training state in" in said
    assert f"delete {run / 'dvae'} to start anew" in said
    assert files(run / "dvae" / "state") == before


# Pictures and prompts


@pytest.mark.parametrize(("prompts", "stdin"), [([""], ""), (["  "], ""), (["-"], ""), (["-"], " \n\n")])
def test_an_empty_prompt(dalle, run, prompts, stdin):
    line = complaint(dalle("sample", *prompts, "--run", run, stdin=stdin))
    assert line == 'no prompt was given; say what to draw, such as: dalle sample "a red circle"'


def test_a_prompt_too_long(dalle, run):
    line = complaint(dalle("sample", "q" * 99, "--run", run))
    assert "has over 28 tokens, this model's limit; shorten it" in line


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--temperature", "-1"], "temperature=-1.0 must be a number of at least 0"),
        (["--temperature", "nan"], "temperature=nan"),
        (["--top-k", "0"], "top_k=0 must be at least 1"),
        (["--top-p", "1.5"], "top_p=1.5 must be above 0 and at most 1"),
    ],
)
def test_sampling_that_cannot_be(dalle, run, more, said):
    assert said in complaint(dalle("sample", "x", "--run", run, *more))
    assert not (run / "samples").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "no such file"), (b"text", "not a picture"), (tiny.png(0, (15, 40)), "15×40 pixels")],
)
def test_a_picture_that_cannot_be_reconstructed(dalle, run, tmp_path, content, said):
    if content is not None:
        (tmp_path / "x.png").write_bytes(content)
    line = complaint(dalle("reconstruct", tmp_path / "x.png", "--run", run))
    assert str(tmp_path / "x.png") in line
    assert said in line


def test_an_output_folder_that_cannot_be_written(dalle, run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    line = complaint(dalle("sample", "x", "--run", run, "--out", tmp_path / "file" / "out"))
    assert line.startswith(f"cannot write {tmp_path / 'file' / 'out'}")


# Pickles


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_a_foreign_class_runs_nothing(dalle, tmp_path):
    torch.save(Touch(tmp_path / "made"), tmp_path / "evil.pkl")
    halves = ("--encoder", tmp_path / "evil.pkl", "--decoder", tmp_path / "evil.pkl")
    line = complaint(dalle("import-dvae", *halves, "--run", tmp_path / "run"))
    assert "mkdir', which no released dVAE file does; nothing of it was run" in line
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "run").exists()


def test_a_pickle_in_the_place_of_weights_runs_nothing(dalle, run, tmp_path):
    (tmp_path / "x.png").write_bytes(tiny.png(0))
    for stage, arguments in (
        ("dvae", ("reconstruct", tmp_path / "x.png", "--run", run)),
        ("prior", ("sample", "x", "--run", run)),
    ):
        weights = run / stage / "weights.safetensors"
        kept = weights.read_bytes()
        torch.save(Touch(tmp_path / "made"), weights)
        line = complaint(dalle(*arguments))
        assert line.startswith(f"{weights} is damaged or no safetensors file")
        weights.write_bytes(kept)
    assert not (tmp_path / "made").exists()


def test_a_pickle_in_the_place_of_a_state_runs_nothing(dalle, run, tmp_path):
    """Even if the hash that is kept beside it is its own."""
    shutil.rmtree(run / "prior")  # under which the dVAE would not be trained on
    for state in (run / "dvae" / "state").iterdir():
        facts = json.loads((state / "state.json").read_text())
        for path in state.glob("*.safetensors"):
            torch.save(Touch(tmp_path / "made"), path)
            facts["sha256"][path.name] = sha256(path)
        (state / "state.json").write_text(json.dumps(facts))
    done = dalle(*dvae(run, steps=9))
    assert "weights.safetensors is damaged or no safetensors file" in done.err
    assert "is whole; delete" in complaint(done)
    assert not (tmp_path / "made").exists()


# A full disk


@pytest.fixture
def restored():
    """For `cli.main.main` in this process, which it suits to a command: afterwards it is as it was."""
    handler = signal.getsignal(signal.SIGPIPE)
    with patch.dict(os.environ):
        yield
    signal.signal(signal.SIGPIPE, handler)
    gc.unfreeze()


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("stage", ["dvae", "prior"])
@pytest.mark.parametrize("part", ["weights", "state", "metrics", "pictures"])
def test_a_full_disk_while_training_loses_nothing(run, monkeypatch, capsys, stage, part):
    """In this process, where the disk can be made to fill up."""
    if stage == "dvae":
        shutil.rmtree(run / "prior")  # under which it would not be trained on
    before = files(run)
    full = OSError(28, "No space left on device")

    def write(path):
        Path(path).write_bytes(b"half")
        raise full

    match part:
        case "weights":
            monkeypatch.setattr("shutil.copyfile", lambda _, copy: write(copy))
        case "state":

            def half(file, data):
                file._file.write(data[: len(data) // 2])
                raise full

            monkeypatch.setattr(TensorFile, "_write", half)
        case "metrics":
            real_open = Path.open

            def no_metrics(self, mode="r", *rest, **more):
                if self.name == "metrics.jsonl" and "a" in mode:
                    raise full
                return real_open(self, mode, *rest, **more)

            monkeypatch.setattr(Path, "open", no_metrics)
        case "pictures":
            monkeypatch.setattr("PIL.Image.Image.save", lambda _, path, **__: write(path))
    arguments = ["dalle", *map(str, {"dvae": dvae, "prior": prior}[stage](run, steps=4))]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        cli.main.main()
    err = capsys.readouterr().err
    assert end.value.code == 2, err
    last = err.splitlines()[-1]
    assert last.startswith("error: cannot write ")
    assert "No space left on device; what was saved before is whole" in last
    after = files(run)
    newer = ["metrics.jsonl", "config.json"]
    if part == "pictures":  # drawn once the update is saved
        newer.append("weights.safetensors")
        assert newest_step(run / stage / "state") == 4
    lost = {
        name for name in before if after.get(name) != before[name] and not name.endswith(tuple(newer))
    }  # fmt: skip
    assert not lost
    assert not list(run.rglob("*.partial"))

    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", arguments)
    cli.main.app(arguments[1:], standalone_mode=False)  # there is room again: it goes on
    assert json.loads((run / stage / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 4


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
            "error: the device's memory is too small: train with a smaller",
        ),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
            "error: the device's memory is too small: train with a smaller",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that"),
            "error: DataLoader worker (pid 7) is killed by signal: Bus error: a process that reads",
        ),
    ],
)
def test_running_out_of_memory_is_told_with_what_helps(monkeypatch, capsys, tmp_path, error, message):
    def burst(*_):
        raise error

    monkeypatch.setattr("stage1_dvae.train.train", burst)
    monkeypatch.setattr(sys, "argv", ["dalle", "train-dvae", "--run", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as end:
        cli.main.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(message)
