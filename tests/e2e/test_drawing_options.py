"""Every option of drawing reaches the pictures, from the command line."""

import io
from pathlib import Path

import pytest
from PIL import Image

from dalle.checkpoint import read_json, write_json
from dalle.pipeline import TextToImage
from stage2_prior.sample import Sampling
from tests import tiny

PROMPT, N = "a red circle", 5


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """One whose prior may be guided."""
    run = tiny.write_run(tmp_path_factory.mktemp("options") / "run")
    path = run / "prior" / "config.json"
    write_json(path, read_json(path) | {"training": {"caption_dropout": 0.1, "guidance": 1.0, "top_p": 1.0}})
    return run


@pytest.fixture(scope="module")
def drawn(dalle, run, tmp_path_factory):
    """The bytes of the pictures that a command with these options draws; each is run once."""
    known: dict[tuple[object, ...], list[bytes]] = {}

    def draw(*options: object) -> list[bytes]:
        if options not in known:
            out = tmp_path_factory.mktemp("drawn")
            done = dalle("sample", PROMPT, "--run", run, "-n", N, *options, "--out", out)
            assert done.code == 0, done.err
            assert len(done.paths) == N + 1  # and a sheet
            known[options] = [path.read_bytes() for path in done.paths[:N]]
        return known[options]

    return draw


def pixels_of(paths: list[bytes]) -> list[bytes]:
    return [Image.open(io.BytesIO(content)).tobytes() for content in paths]


OTHERWISE = [
    ("--seed", 1), ("--temperature", 0.3), ("--top-k", 3), ("--top-p", 0.5), ("--guidance", 3),
    ("--weights", "int4"),
]  # fmt: skip


@pytest.mark.parametrize("options", OTHERWISE)
def test_each_option_makes_other_pictures(drawn, options):
    plain = pixels_of(drawn())
    assert len(set(plain)) == N
    assert pixels_of(drawn(*options)) != plain


def test_options_at_their_defaults_change_nothing(drawn):
    said = ("--temperature", 1, "--top-k", 13, "--top-p", 1, "--guidance", 1, "--seed", 0)
    assert pixels_of(drawn(*said)) == pixels_of(drawn())


def test_the_likeliest_codes_are_the_same_with_any_seed(drawn):
    one = pixels_of(drawn("--top-k", 1, "--seed", 1))
    assert len(set(one)) == 1
    assert pixels_of(drawn("--top-k", 1, "--seed", 2)) == pixels_of(drawn("--temperature", 0)) == one


def test_the_command_draws_what_the_library_does(drawn, run):
    """With all options at once, none of which is the default."""
    options = (
        "--seed", 4, "--temperature", 0.8, "--top-k", 9, "--top-p", 0.9, "--guidance", 1.5,
        "--weights", "int8", "--at-once", 3,
    )  # fmt: skip
    model = TextToImage.load(run, weights="int8", at_once=3)
    pictures = model(PROMPT, n=N, seed=4, sampling=Sampling(0.8, 9, 0.9, 1.5))
    assert pixels_of(drawn(*options)) == [picture.tobytes() for picture in pictures]
