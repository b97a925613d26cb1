"""What holds for every test."""

import os

import torch

# The models are tiny: threads would only wait for each other, ten times longer on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
torch.set_num_threads(1)
