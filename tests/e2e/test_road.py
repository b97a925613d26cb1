"""From captions to pictures, with the commands that a user types."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import dalle as package
from cli.main import app
from dalle.checkpoint import fingerprint
from dalle.metrics import read_metrics
from tests import tiny
from tests.e2e.settings import dvae, options, prior

SCRIPT = shutil.which("dalle", path=Path(sys.executable).parent) or shutil.which("dalle")
PROMPT = "a red circle"
COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands]


def script(*arguments, **more) -> subprocess.CompletedProcess:
    """The installed command."""
    assert SCRIPT, "pip install -e . puts the command beside python"
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::DeprecationWarning:dalle"}
    return subprocess.run(
        [SCRIPT, *map(str, arguments)], capture_output=True, text=True, env=environ, timeout=120, **more
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Trained on scenes by the installed script, with its default preset for this data."""
    run = tmp_path_factory.mktemp("road") / "run"
    for command in (dvae(run), prior(run)):
        done = script(*command)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        assert "4/4" in done.stderr
    return run


def test_the_three_commands_leave_what_the_next_one_needs(run):
    for stage, files in (("dvae", set()), ("prior", {"tokenizer.json"})):
        present = {path.name for path in (run / stage).iterdir()}
        assert files | {"config.json", "weights.safetensors", "metrics.jsonl", "state", "pictures"} <= present
        assert [path.name for path in sorted((run / stage / "state").iterdir())] == [
            "step-00000002", "step-00000004",
        ]  # fmt: skip
        assert read_metrics(run / stage)[-1]["step"] == 4
        assert [path.name for path in (run / stage / "pictures").iterdir()] == ["step-00000004.png"]
    metrics = {name for line in read_metrics(run / "prior") for name in line}
    assert {
        "step",
        "loss",
        "heldout_loss",
        "text_loss",
        "image_loss",
        "seconds",
        "tokens_per_second",
    } <= metrics


def test_the_script_draws_a_picture_and_prints_its_path(run):
    done = script("sample", PROMPT, "--run", "run", cwd=run.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "run/samples/a-red-circle-seed0-0.png\n"
    assert "drew 1 picture in" in done.stderr
    with Image.open(run.parent / done.stdout.strip()) as picture:
        assert picture.size == (16, 16)


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not(run, dalle, tmp_path):
    files = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        done = dalle("sample", PROMPT, "--run", run, "-n", 3, "--seed", seed, "--out", tmp_path / name)
        assert done.code == 0, done.err
        files[name] = [path.read_bytes() for path in done.paths]
    assert files["a"] == files["b"]
    assert files["a"][0] != files["c"][0]


def test_the_first_of_sixteen_pictures_are_those_of_four(run, dalle, tmp_path):
    few, many = (
        dalle("sample", PROMPT, "--run", run, "-n", n, "--out", tmp_path / str(n)).paths for n in (4, 16)
    )
    assert [path.read_bytes() for path in few[:4]] == [path.read_bytes() for path in many[:4]]
    assert (len(few), len(many)) == (5, 17)


def test_every_picture_says_how_it_was_made_and_several_come_with_a_sheet(run, dalle, tmp_path):
    made = ("--temperature", 0.5, "--top-k", 7, "--top-p", 0.9, "--seed", 11)
    done = dalle("sample", PROMPT, "a star", "--run", run, "-n", 2, *made, "--out", tmp_path)
    assert done.code == 0, done.err
    *pictures, sheet = done.paths
    trained = json.loads((run / "prior" / "config.json").read_text())["training"]
    for path, (prompt, picture) in zip(
        pictures, [(PROMPT, 0), (PROMPT, 1), ("a star", 0), ("a star", 1)], strict=True
    ):
        facts = json.loads(path.with_suffix(".json").read_text())
        assert facts == {
            "prompt": prompt, "picture": picture, "run": str(run), "seed": 11,
            "temperature": 0.5, "top_k": 7, "top_p": 0.9, "guidance": trained["guidance"],
            "prior": fingerprint(run / "prior" / "weights.safetensors"), "weights": "auto",
        }  # fmt: skip
        with Image.open(path) as image:
            assert image.text["prompt"] == prompt
            assert json.loads(image.text["top_k"]) == 7
    with Image.open(sheet) as image:
        assert image.width > 4 * 128


def test_how_many_are_drawn_at_once_and_seen_on_the_way_changes_no_picture(dalle, run, tmp_path):
    def drawn(*options: object) -> list[bytes]:
        done = dalle("sample", PROMPT, "--run", run, "-n", 5, *options, "--out", tmp_path / str(options))
        assert done.code == 0, done.err
        assert "drawing 80/80 · " in done.err  # codes
        assert ("what is drawn so far: " in done.err) == ("--preview" in options)
        assert sorted(done.paths[0].parent.iterdir()) == sorted(
            other for path in done.paths for other in (path, path.with_suffix(".json"))
        )
        return [path.read_bytes() for path in done.paths[:5]]

    plain = drawn()
    assert drawn("--at-once", 2) == drawn("--preview") == plain


def test_a_dash_reads_prompts_from_standard_input(run, dalle, tmp_path):
    given = "\ufeffa red circle\n\n  a blue star  \na red circle\n"
    done = dalle("sample", "-", "--run", run, "--out", tmp_path, stdin=given)
    assert done.code == 0, done.err
    assert [path.name for path in done.paths] == [
        "a-red-circle-seed0-0.png", "a-blue-star-seed0-0.png", "a-red-circle-and-others-seed0-sheet.png",
    ]  # fmt: skip
    trained = json.loads((run / "prior" / "config.json").read_text())["training"]
    facts = json.loads(done.paths[1].with_suffix(".json").read_text())
    assert (facts["prompt"], facts["top_p"]) == ("a blue star", trained["top_p"])


def test_prompts_that_are_not_utf_8_are_drawn_all_the_same(run, dalle, tmp_path):
    done = dalle("sample", "caf\udce9", "-", "--run", run, "--out", tmp_path, stdin=b"caf\xe9\n")
    assert done.code == 0, done.err
    shown = [json.loads(path.with_suffix(".json").read_text())["prompt"] for path in done.paths[:2]]
    assert shown == ["caf?", "caf\ufffd"]


def test_reconstruct_puts_pictures_through_the_dvae(run, dalle, tmp_path):
    source = tiny.write_folder(tmp_path / "data", 1) / "0.png"
    done = dalle("reconstruct", source, "--run", run)
    assert done.code == 0, done.err
    assert done.paths == [run / "reconstructions" / "0-reconstruction.png"]
    facts = json.loads(done.paths[0].with_suffix(".json").read_text())
    weights = run / "dvae" / "weights.safetensors"
    assert facts == {"image": str(source), "run": str(run), "dvae": fingerprint(weights)}
    with Image.open(done.paths[0]) as pair:
        assert pair.size == (34, 16)


def test_reconstructions_go_where_they_are_wanted(run, dalle, tmp_path):
    source = tiny.write_folder(tmp_path / "data", 1) / "0.png"
    done = dalle("reconstruct", source, "--run", run, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert done.paths == [tmp_path / "out" / "0-reconstruction.png"]
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".json", ".png"]


def test_info_tells_what_a_run_holds(run, dalle):
    facts = json.loads(dalle("info", run, "--json").out)
    assert facts["dvae"]["steps"] == facts["prior"]["steps"] == 4
    assert facts["prior"]["trained_on_dvae"] == facts["dvae"]["fingerprint"]
    words = dalle("info", run).out
    assert "4 of 4 steps on scenes" in words


def test_the_same_command_again_finds_nothing_left_to_do(run, dalle):
    before = (run / "prior" / "weights.safetensors").read_bytes()
    done = dalle(*prior(run))
    assert done.code == 0
    assert "has its 4 steps already; a larger --steps trains on" in done.err
    assert (run / "prior" / "weights.safetensors").read_bytes() == before


def test_a_model_can_draw_when_its_states_are_gone(run, dalle, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("state", "metrics.jsonl"))
    done = dalle("sample", PROMPT, "--run", copy)
    assert done.code == 0, done.err


@pytest.mark.parametrize("kind", ["folder", "jsonl", "csv", "tar", "tars"])
def test_the_road_begins_with_data_of_any_kind(dalle, tmp_path, kind):
    match kind:
        case "folder":
            data = tiny.write_folder(tmp_path / "data")
        case "jsonl":
            data = tiny.write_jsonl(tmp_path / "data")
        case "csv":
            data = tiny.write_csv(tmp_path / "data", ("image", "caption"))
        case "tar":
            data = tiny.write_tar(tmp_path / "data.tar")
        case "tars":
            for i in range(2):
                tiny.write_tar(tmp_path / "data" / f"{i:03}.tar", 5)
            data = f"{tmp_path}/data/{{000..001}}.tar"
    run = tmp_path / "run"
    done = dalle(*dvae(run, "--data", data, steps=2))
    assert done.code == 0, done.err
    assert f"pictures of {data}" in done.err
    done = dalle(*prior(run, steps=2))  # on the dVAE's data, if not told otherwise
    assert done.code == 0, done.err
    assert f"pictures of {data}" in done.err
    done = dalle("sample", PROMPT, "--run", run)
    assert done.code == 0, done.err
    assert done.paths[0].is_file()


def test_show_config_prints_all_settings_and_starts_nothing(dalle, tmp_path):
    done = dalle(*dvae(tmp_path / "run", "--show-config"), environ={"COLUMNS": "200"})
    assert done.code == 0, done.err
    assert "codebook_width" in done.out
    assert "1,200,000" in done.out
    assert not (tmp_path / "run").exists()


def test_show_config_of_the_prior_needs_no_dvae(dalle, run, tmp_path):
    more = ("--preset", "tiny", "--set", "depth=7", "--show-config")
    done = dalle("train-prior", "--run", tmp_path / "run", *more, environ={"COLUMNS": "200"})
    assert done.code == 0, done.err
    rows = {cells[1]: cells[3] for line in done.out.splitlines() if len(cells := line.split()) > 3}
    assert (rows["depth"], rows["grid"], rows["image_vocab"]) == ("7", "9", "4096")
    assert rows["text_vocab"] == rows["bpe_vocab"] == "2048"
    assert "grid and image_vocab are those of the preset's" in done.err
    assert not (tmp_path / "run").exists()
    shutil.copytree(run / "prior", tmp_path / "begun" / "prior")
    done = dalle("train-prior", "--run", tmp_path / "begun", "--show-config", environ={"COLUMNS": "200"})
    assert (done.code, done.err) == (0, "")
    assert re.search(r"grid\W+4\b", done.out)


def test_worker_processes_read_the_same_data(dalle, tmp_path):
    weights = {}
    for workers in (0, 1):
        run = tmp_path / str(workers)
        done = dalle(*dvae(run, *options(workers=workers)))
        assert done.code == 0, done.err
        weights[workers] = (run / "dvae" / "weights.safetensors").read_bytes()
    assert weights[0] == weights[1]


def test_version_and_help_answer_without_torch():
    for argument, expected in (("--version", f"dalle {package.__version__}\n"), ("--help", "train-dvae")):
        source = (
            "import sys, cli.main\n"
            f"sys.argv = ['dalle', {argument!r}]\n"
            "try:\n    cli.main.main()\n"
            "except SystemExit as end:\n    assert not end.code\n"
            "heavy = {'torch', 'deepspeed', 'tokenizers', 'numpy', 'PIL'} & set(sys.modules)\n"
            "assert not heavy, heavy\n"
        )
        done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(dalle, command):
    done = dalle(command, "--help")
    assert (done.code, done.err) == (0, "")
    assert f"Usage: dalle {command} [OPTIONS]" in done.out
    assert command in dalle("--help").out


def test_a_reader_that_stops_early_is_no_error(run):
    done = subprocess.run(f"{SCRIPT} info {run} | head -1", shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str(run)


@pytest.mark.parametrize("arguments", [["draw"], ["sample"], ["sample", "x", "-n", "0"], ["info", "--jsn"]])
def test_a_command_line_that_cannot_be_exits_with_2(dalle, arguments):
    assert dalle(*arguments).code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "x", "--at-once", 0], ["sample", "x", "--seed", -1], ["sample", "x", "--seed", 2**63],
        ["evaluate", "--prompts", 0], ["train-dvae", "--steps", -1], ["train-dvae", "--processes", 0],
        ["train-prior", "--machines", 0], ["train-prior", "--zero", 4], ["plan", "--gpus", 0],
        ["plan", "--gpus-per-machine", 0], ["plan", "--zero", 4], ["plan", "--rank", -1],
        ["audit-precision", "--batches", 0],
    ],
)  # fmt: skip
def test_a_number_out_of_its_range_is_told_with_its_option(dalle, arguments):
    done = dalle(*arguments, environ={"COLUMNS": "200"})
    assert done.code == 2
    assert f"Invalid value for '{arguments[-2]}': " in done.err
