"""What holds for every test."""

import os

import pytest
import torch
from hypothesis import settings

# The models are tiny: threads would only wait for each other, ten times longer on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
torch.set_num_threads(1)

# A busy machine is no failure.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


@pytest.fixture(autouse=True)
def denormals():
    """Training takes them for 0 (`dalle.process.suit_computing`), for the rest of its process."""
    yield
    torch.set_flush_denormal(False)
