"""`dalle plan`, as a user or a program asks for it."""

import json

import pytest

from stage2_prior.config import PRESETS
from stage2_prior.footprint import parameters
from tests.e2e.warm import complaint


def test_a_plan_for_machines_is_json_of_the_preset(dalle):
    done = dalle("plan", "--preset", "tiny", "--rate", 1, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["fits"]
    assert told["parameters"]["resblocks"] == parameters(PRESETS["tiny"][0])[0]
    needed = told["memory"]["zero_0"]
    assert needed["weights"] == needed["gradients"] == 4 * told["parameters"]["all"]
    assert needed["activations"] > 0


@pytest.mark.parametrize(
    "more", [["--preset", "tiny"], ["--set", "optimizer=adamw"], ["--zero", 0], ["--rank", 0]]
)
def test_a_proposal_refuses_what_it_would_choose_itself(dalle, more):
    done = dalle("plan", "--data", "scenes", "--hours", 1, "--rate", 1, *more)
    assert "leave out --preset, --set, --zero and --rank" in complaint(done)
