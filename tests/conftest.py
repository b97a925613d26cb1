"""What holds for every test."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import settings

# The models are tiny: threads would only wait for each other, ten times longer on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
torch.set_num_threads(1)

# The numbers that tests expect are a CPU's. A test of a GPU: CUDA_VISIBLE_DEVICES=0 python -m pytest tests/…
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

LIMIT = 900  # seconds for one test, or for what it begins with: several times the longest on a busy machine

# A busy machine is no failure.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


@pytest.fixture(autouse=True)
def denormals():
    """Training takes them for 0 (`dalle.process.suit_computing`), for the rest of its process."""
    yield
    torch.set_flush_denormal(False)


@contextmanager
def limited() -> Iterator[None]:
    """What waits for ever fails, and shows where, instead of holding up all the others."""

    def fail(*_: object) -> None:
        pytest.fail(f"not done after {LIMIT} seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup():
    """The fixtures of a test, those of its module and of the session too."""
    with limited():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """The test itself."""
    with limited():
        return (yield)
