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
