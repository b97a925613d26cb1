"""Commands that judge, check and take over, run to their end as a user does."""

import json
import re
from pathlib import Path

import dall_e
import pytest
import torch

from dalle.checkpoint import fingerprint
from dalle.evaluate import SPLITS
from dalle.metrics import read_metrics
from dalle.scenes.source import Scenes
from stage2_prior.config import PRESETS
from tests import tiny
from tests.e2e.settings import PRIOR, begin, options, prior


def test_a_resumed_run_is_identical(dalle, trained):
    done = dalle("verify-resume", trained)
    assert (done.code, done.out) == (0, "dvae: identical\nprior: identical\n"), done.err
    done = dalle("verify-resume", trained, "--json")
    assert (done.code, json.loads(done.out)) == (0, {"dvae": None, "prior": None})


@pytest.fixture(scope="module")
def judged(tmp_path_factory) -> Path:
    """A run that can read every caption of the scenes; what it draws is noise."""
    captions = [Scenes(split).captions(i)[0] for split, _ in SPLITS.values() for i in range(30)]
    return tiny.write_run(tmp_path_factory.mktemp("judged") / "run", captions=captions * 3, text_length=99)


def pictures(folder: Path) -> list[str]:
    return re.findall(r"data:image/png;base64,[^\"]+", (folder / "report.html").read_text(encoding="utf-8"))


def test_a_run_is_judged_as_was_asked(dalle, judged, tmp_path):
    how = ("--temperature", 0.5, "--top-k", 7, "--top-p", 0.9)

    def evaluated(name: str, seed: int, *more: object) -> str:
        arguments = ("--run", judged, "--prompts", 2, "--seed", seed, *how, "--out", tmp_path / name)
        done = dalle("evaluate", *arguments, *more)
        assert done.code == 0, done.err
        return done.out

    assert evaluated("a", 5) == f"{tmp_path / 'a' / 'report.html'}\n"
    figures = json.loads(evaluated("b", 5, "--json"))
    assert figures == json.loads((tmp_path / "b" / "report.json").read_text())
    assert {name: split["prompts"] for name, split in figures["splits"].items()} == dict.fromkeys(SPLITS, 2)
    asked = {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "seed": 5}
    assert asked.items() <= figures["sampling"].items()
    said = figures["command"].split()
    assert said[:2] == ["dalle", "evaluate"]
    assert {"--run", str(judged), "--prompts", "--seed", "--temperature", "--top-k", "--top-p"} <= set(said)
    evaluated("c", 6)
    a, b, c = (pictures(tmp_path / name) for name in "abc")
    assert len(a) >= 2 * len(SPLITS)
    assert a == b != c


def test_a_report_lies_in_the_run_unless_told_otherwise(dalle, judged):
    done = dalle("evaluate", "--run", judged, "--prompts", 1)
    assert done.code == 0, done.err
    assert done.out == f"{judged / 'report.html'}\n"
    assert (judged / "report.json").is_file()


def test_a_prior_makes_the_updates_that_there_is_time_for(dalle, trained, tmp_path):
    run = begin(trained, tmp_path, "prior")
    done = dalle("train-prior", "--preset", "tiny", "--run", run, "--minutes", 0.01, *PRIOR)
    assert done.code == 0, done.err
    made = read_metrics(run / "prior")[-1]["step"]
    assert 1 <= made < PRESETS["tiny"][1].steps
    assert made == json.loads((run / "prior" / "config.json").read_text())["training"]["steps"]
    again = dalle("train-prior", "--run", run)
    assert f"has its {made:,} steps already" in again.err


def test_a_prior_is_trained_on_a_dvae_that_was_imported(dalle, tmp_path):
    sizes = {"n_hid": 4, "n_blk_per_group": 1, "vocab_size": 67}
    torch.manual_seed(0)
    for name, half in (("encoder", dall_e.Encoder(**sizes)), ("decoder", dall_e.Decoder(n_init=6, **sizes))):
        torch.save(half, tmp_path / f"{name}.pkl")
    run = tmp_path / "run"
    halves = ("--encoder", tmp_path / "encoder.pkl", "--decoder", tmp_path / "decoder.pkl")
    done = dalle("import-dvae", *halves, "--run", run)
    assert done.code == 0, done.err
    assert "256×256 pixels ↔ 32×32 codes of 67" in done.err
    done = dalle(*prior(run, *options(depth=1, batch_size=2, eval_pictures=1), steps=1))
    assert done.code == 0, done.err
    facts = json.loads(dalle("info", run, "--json").out)
    assert facts["prior"]["trained_on_dvae"] == fingerprint(run / "dvae" / "weights.safetensors")
    config = json.loads((run / "prior" / "config.json").read_text())
    assert (config["model"]["grid"], config["model"]["image_vocab"], config["data"]) == (32, 67, "scenes")
