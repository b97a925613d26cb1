"""The prior in fp16: its scales are seen, kept and audited."""

import json
import shutil
from pathlib import Path

import pytest

from dalle.metrics import read_metrics
from tests.e2e.settings import dvae, options, prior

FP16 = options(precision="fp16", micro_batch=2, recompute="true", log_every=1, eval_every=3)
RESBLOCKS = 2 * 3


@pytest.fixture(scope="module")
def run(dalle, tmp_path_factory) -> Path:
    """A run whose prior made four updates in fp16."""
    run = tmp_path_factory.mktemp("fp16") / "run"
    for command in (dvae(run, steps=2), prior(run, *FP16, steps=4)):
        done = dalle(*command)
        assert done.code == 0, done.err
    return run


def test_scales_grow_are_logged_and_go_on_where_they_were(dalle, run, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    assert " · cpu fp16" in dalle(*prior(run, *FP16, steps=4)).err
    assert dalle(*prior(run, *FP16, steps=6)).code == 0
    lines = [line for line in read_metrics(run / "prior") if "log2_scales" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert line["log2_scales"] == pytest.approx([13 + line["step"] / 1000] * RESBLOCKS, abs=1e-4)
        assert line["overflows"] == [0] * RESBLOCKS
    assert (run / "prior" / "scales.svg").read_text().count("<polyline") == RESBLOCKS


def test_info_sums_them_up(dalle, run):
    assert "gradient scales 2^13.0 (resblock 1) to 2^13.0 (resblock 1), 0 overflows" in dalle("info", run).out
    assert len(json.loads(dalle("info", run, "--json").out)["prior"]["resblocks"]["log2_scales"]) == RESBLOCKS


def test_an_audit_says_what_fp16_would_lose(dalle, run):
    facts = json.loads(dalle("audit-precision", run, "--batches", 2, "--json").out)
    assert facts["pictures"] == 2 * 2  # batches as they pass through the model
    assert list(facts["resblocks"])[:2] == ["layers.0.attention", "layers.0.mlp"]
    assert len(facts["resblocks"]) == RESBLOCKS
    for resblock in facts["resblocks"].values():
        for scale in ("one_scale", "own_scale"):
            assert resblock[scale]["activations"]["overflow"] == 0
            assert 0 <= resblock[scale]["activations"]["zero"] < 1
    table = dalle("audit-precision", run)
    assert table.code == 0
    assert sum(line.startswith("layers.") for line in table.out.splitlines()) == RESBLOCKS


def test_the_dvae_has_no_scales_and_says_so(dalle, tmp_path):
    done = dalle(*dvae(tmp_path / "run", "--set", "precision=fp16"))
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("error: precision=fp16 is for train-prior")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("there", [(), ("dvae",)])
def test_an_audit_of_nothing_is_refused_in_one_line(dalle, run, tmp_path, there):
    for stage in there:
        shutil.copytree(run / stage, tmp_path / "run" / stage)
    done = dalle("audit-precision", tmp_path / "run")
    assert done.code == 2
    assert len(done.err.splitlines()) == 1
    assert done.out == ""


def test_an_audit_of_what_was_handed_on_without_its_data_asks_for_them(dalle, run, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    path = run / "prior" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "data": "./birds"}))
    done = dalle("audit-precision", run)
    assert done.code == 2
    assert "was handed on without its data, ./birds: name them with --data" in done.err
    path.write_text(json.dumps({**json.loads(path.read_text()), "data": "~/birds"}))  # by hand
    done = dalle("audit-precision", run)
    assert "birds: does not exist" in done.err


def test_an_audit_with_another_dvae_is_refused(dalle, run, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    path = run / "prior" / "config.json"
    path.write_text(path.read_text().replace('"dvae": "', '"dvae": "another'))
    done = dalle("audit-precision", run)
    assert done.code == 2
    assert "was trained on the dVAE another" in done.err
