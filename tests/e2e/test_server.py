"""What the tests of commands rely on: one that fails leaves nothing to the next one."""

import os

import pytest

from tests.e2e.settings import dvae


def test_a_command_that_a_test_leaves_running_is_ended_before_the_next_one(dalle, tmp_path):
    left = dalle.start(*dvae(tmp_path / "run", steps=10**6))
    left.wait_for(" · cpu fp32")
    done = dalle("--version")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("dalle ")
    with pytest.raises(ProcessLookupError):
        os.kill(left.pid, 0)
