"""What the console script does before a command."""

import os
import subprocess
import sys

import pytest

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
