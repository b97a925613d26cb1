"""What the console script does around a command, and what a command hands on of its options."""

import errno
import os
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

import cli.main
from cli.ending import ending
from dalle.builtin import FOLDER
from dalle.checkpoint import read_json, write_json
from dalle.cluster import Cluster
from dalle.errors import DalleError
from dalle.launch import LOST
from dalle.runs import Options
from dalle.states import write_state
from stage2_prior.sample import Sampling
from tests import tiny

SHOW = """
import os
import cli.main
cli.main.app = lambda: print(os.environ["OMP_WAIT_POLICY"], os.environ.get("GOMP_SPINCOUNT"))
cli.main.main()
"""


@pytest.mark.parametrize(
    ("own", "found"),
    [
        ({}, "PASSIVE 10000"),
        ({"GOMP_SPINCOUNT": "7"}, "PASSIVE 7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),  # a spin count would take precedence
    ],
)
def test_threads_wait_as_suits_small_products_unless_the_user_says_how(own, found):
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", SHOW], env=kept | own, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == found


def dalle(*arguments, code="import cli.main; cli.main.main()", **more):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True, timeout=60, **more
    )


def test_output_that_cannot_be_written_is_told_in_one_line():
    with open("/dev/full", "w") as full:
        done = dalle("--version", stdout=full)
    assert (done.returncode, done.stderr) == (
        2,
        "error: the output could not be written: no space left on device\n",
    )


def test_a_console_that_lacks_some_letters_gets_the_others():
    done = dalle("--help", stdout=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "Train a DALL?E of your own" in done.stdout


@pytest.mark.parametrize(
    "command",
    [("sample", "a star"), ("reconstruct", "a.png"), ("evaluate",), ("bench",)],
    ids=lambda command: command[0],
)
def test_a_folder_for_results_is_not_named_like_a_file(tmp_path, command):
    name = tmp_path / {"bench": "star.json", "evaluate": "star.html"}.get(command[0], "star.PNG")
    done = dalle(*command, "--out", str(name), stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: --out {name} is a name for a file; give a folder")
    assert not name.exists()


def test_a_home_directory_is_meant_where_no_shell_puts_it(tmp_path):
    tiny.write_run(tmp_path / "mine")
    home = os.environ | {"HOME": str(tmp_path)}
    done = dalle("sample", "a", "--run=~/mine", "--out=~/here", stdout=subprocess.PIPE, env=home)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/here/a-seed0-0.png\n"), done.stderr


def test_paths_are_quoted_as_they_are(tmp_path):
    """In errors, which are one line, as in the commands that they name."""
    name = tmp_path / "two  blanks"
    done = dalle("sample", "a", "--run", str(name), stdout=subprocess.PIPE)
    assert done.returncode == 2
    assert f"{name} holds no trained" in done.stderr
    assert f"--run '{name}'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_standard_input_there_is_no_prompt():
    closed = f"{shlex.quote(sys.executable)} -c 'import cli.main; cli.main.main()' sample - <&-"
    done = subprocess.run(["sh", "-c", closed], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.partition(";")[0]) == (2, "error: no prompt was given")


def test_where_nobody_listens_there_is_no_error():
    code = "import os, sys; os.close(1); sys.stdout = None; import cli.main; cli.main.main()"
    done = dalle("--version", code=code)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 1, ""),
        (DalleError("of two\n  lines"), 2, "error: of two lines\n"),
        (OSError(errno.EACCES, "Permission denied", "a.txt"), 2, "error: a.txt: permission denied\n"),
        (OSError(errno.EIO, "Gone"), 2, "error: the output could not be written: gone\n"),
        (OSError(errno.EDQUOT, "Full"), 2, "error: the output could not be written: full\n"),
    ],
)
def test_what_is_no_bug_ends_a_command_in_one_line(monkeypatch, capsys, tmp_path, error, status, said):
    with (tmp_path / "out").open("w") as out, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", out)
        with pytest.raises(SystemExit) as end, ending():
            raise error
    assert (end.value.code, capsys.readouterr().err) == (status, said)


@pytest.mark.parametrize("bug", [ValueError("odd"), OSError("odd"), ConnectionResetError(104, "odd")])
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises(type(bug)) as caught, ending():
        raise bug
    assert caught.value is bug


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 1, ""),
        (DalleError("bad"), 2, "error: bad\n"),
        (RuntimeError("Connection closed by peer [::1]:7"), LOST, "this process lost the others"),
        (ValueError("odd"), 1, "Traceback"),
    ],
)
def test_one_among_several_waits_for_nobody(monkeypatch, capsys, error, status, said):
    def leave(code):
        raise SystemExit(f"at once with {code}")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit, match=f"at once with {status}"), ending():
        raise error
    assert capsys.readouterr().err.startswith(said)


def run(*arguments):
    """A command in this process; its exit status."""
    return cli.main.app([str(a) for a in arguments], standalone_mode=False) or 0


@pytest.fixture
def given(monkeypatch):
    """`given(name)` puts a stand-in there, and gives the list of what it is called with."""

    def replace(name, result=None):
        calls = []
        monkeypatch.setattr(name, lambda *a, **more: calls.append((*a, *more.values())) or result)
        return calls

    return replace


@pytest.mark.parametrize(("whole", "status"), [(True, 0), (False, 1)])
def test_a_demo_that_was_stopped_exits_with_1(given, capfd, whole, status):
    calls = given("dalle.demo.demo", whole)
    assert run("demo", "--minutes", 3, "--run", "d") == status
    assert calls == [(Path("d"), 3.0)]
    assert capfd.readouterr().out == ("d/report.html\n" if whole else "")


@pytest.mark.parametrize(("found", "status"), [(None, 0), ("weights: w", 1)])
def test_a_resume_that_differs_exits_with_1(given, capfd, tmp_path, found, status):
    with pytest.raises(DalleError, match="has no training state: train it first"):
        run("verify-resume", tmp_path)
    write_state(tmp_path / "dvae" / "state", 1, {}, {}, keep=1)
    given("dalle.verify.verify_resume", found)
    assert run("verify-resume", tmp_path) == status
    assert capfd.readouterr().out == f"dvae: {found or 'identical'}\n"


def test_a_report_names_the_command_that_gives_it_again_and_lies_outside_the_package(given):
    calls = given("dalle.report.judge_and_report")
    run("evaluate", "--run", "scenes", "--prompts", 3)
    run("evaluate", "--run", "scenes", "--guidance", 2, "--top-p", 0.5, "--temperature", 0.7, "--out", "o")
    plain, changed = (f"dalle evaluate --run scenes --prompts {n} --seed 0" for n in (3, 100))
    changed += " --top-p 0.5 --guidance 2.0 --temperature 0.7"
    assert calls == [
        (FOLDER, 3, plain, Path("evaluation"), 0, Sampling()),
        (FOLDER, 100, changed, Path("o"), 0, Sampling(0.7, None, 0.5, 2.0)),
    ]


@pytest.mark.parametrize(("stage", "package"), [("dvae", "stage1_dvae"), ("prior", "stage2_prior")])
def test_training_is_asked_for_all_that_was_given(given, monkeypatch, tmp_path, stage, package):
    tiny.write_dvae(tmp_path)
    monkeypatch.setattr("dalle.distributed.joined", nullcontext)
    calls = given(f"{package}.train.train", True)
    more = ("--data", "d", "--preset", "p", "--steps", 3, "--minutes", 2, "--set", "a=1", "--zero", 0)
    assert run(f"train-{stage}", "--run", tmp_path, *more) == 0
    assert calls[0][0] == Options(tmp_path, "d", "p", 3, ("a=1", "zero=0"), 2.0)


@pytest.mark.parametrize(
    ("more", "processes", "machines"),
    [(["--processes", 3], 3, 1), (["--machines", 2], 1, 2), (["--processes", 3, "--machines", 2], 3, 2)],
)
def test_a_command_becomes_several_unless_it_is_one_of_them(
    given, monkeypatch, tmp_path, more, processes, machines
):
    monkeypatch.setattr(sys, "argv", ["dalle", "train-prior", "as given"])
    monkeypatch.setattr("dalle.distributed.joined", nullcontext)
    calls = given("dalle.launch.launch", 7)
    command = ("train-prior", "--run", tmp_path, *more)
    assert run(*command) == 7
    assert calls == [(processes, ["train-prior", "as given"], machines)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DalleError, match="holds no trained dvae"):
        run(*command)


@pytest.mark.parametrize("command", ["train-dvae", "train-prior"])
def test_settings_are_shown_by_one_process(given, tmp_path, command):
    calls, joined = given("dalle.launch.launch", 7), given("dalle.distributed.joined", nullcontext())
    tiny.write_dvae(tmp_path if command == "train-prior" else tmp_path / "elsewhere")
    assert run(command, "--run", tmp_path, "--processes", 3, "--show-config") == 0
    assert not calls
    assert set(joined) <= {(None,)}


@pytest.mark.parametrize(
    ("more", "suits"), [({"training": {}}, ("small", "photos")), ({}, ("that of the machine", "scenes"))]
)
def test_a_prior_takes_preset_and_data_of_its_dvae_unless_that_was_imported(
    given, monkeypatch, tmp_path, more, suits
):
    tiny.write_dvae(tmp_path)
    path = tmp_path / "dvae" / "config.json"
    write_json(path, read_json(path) | {"preset": "small", "data": "photos"} | more)
    monkeypatch.setattr("dalle.distributed.joined", nullcontext)
    given("dalle.runs.machine_preset", "that of the machine")
    calls = given("stage2_prior.train.train", True)
    run("train-prior", "--run", tmp_path)
    assert calls[0][2:] == (*suits, None)


def test_drawing_has_the_weights_and_the_memory_that_were_asked_for(monkeypatch, tmp_path):
    asked = {}

    def load(_, **how):
        asked.update(how)
        raise DalleError("far enough")

    monkeypatch.setattr("dalle.pipeline.TextToImage.load", load)
    with pytest.raises(DalleError, match="far enough"):
        run("sample", "x", "--run", "scenes", "--at-once", 3, "--weights", "int4", "--out", tmp_path)
    assert asked == {"weights": "int4", "at_once": 3}


def test_a_plan_is_made_for_the_machines_that_were_described(given):
    given("dalle.plan_report.show")
    plans = given("dalle.plan.make_plan")
    machines = ("--gpus", 64, "--gpus-per-machine", 4, "--memory", "40GB", "--within", 50, "--between", 5)
    how = ("--preset", "small", "--zero", 0, "--rank", 0, "--set", "lr=1")
    run("plan", "--rate", 1)
    run("plan", *machines, "--rate", 100, *how)
    one, many = Cluster(1, 8, 16e9, 100e9, 12.5e9, 1e12), Cluster(64, 4, 40e9, 50e9, 5e9, 100e12)
    assert plans == [("paper", one, None, None, ()), ("small", many, 0, 0, ("lr=1",))]


def test_what_is_proposed_is_planned(given):
    shown, plans = given("dalle.plan_report.show"), given("dalle.plan.make_plan", "plan")
    made = SimpleNamespace(preset="small", batch_size=8, steps=7)
    given("dalle.plan.propose", made)
    run("plan", "--data", "scenes", "--hours", 1, "--rate", 1)
    assert (plans[0][0], plans[0][-1]) == ("small", ("batch_size=8", "steps=7"))
    assert shown == [("plan", made)]
    for half in (("--data", "scenes"), ("--hours", 1)):
        with pytest.raises(DalleError, match="--data and --hours go together"):
            run("plan", *half, "--rate", 1)


def test_an_audit_looks_at_the_batches_and_the_data_that_were_named(given):
    calls = given("stage2_prior.audit.audit", {})
    given("dalle.audit.describe", "")
    run("audit-precision", "scenes", "--batches", 2, "--data", "d")
    folder, _, *looked_at = calls[0]
    assert (folder, looked_at) == (FOLDER / "prior", [2, "d"])


def test_a_folder_that_is_there_may_be_named_like_a_file(given, tmp_path):
    calls = given("dalle.report.judge_and_report")
    (tmp_path / "a.html").mkdir()
    run("evaluate", "--run", "scenes", "--out", tmp_path / "a.html")
    assert calls[0][3] == tmp_path / "a.html"
