"""What the console script does before a command."""

import os
import shlex
import subprocess
import sys

import pytest

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
    name = tmp_path / "star.PNG"
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
