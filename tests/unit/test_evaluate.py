"""Counting what a model draws right, and the page that shows it."""

import json
import re
import shutil

import pytest

from dalle.errors import ConfigError
from dalle.evaluate import SPLITS, TITLES, Score, evaluate, interval
from dalle.report import judge_and_report
from dalle.scenes.draw import draw
from dalle.scenes.source import Scenes
from tests import tiny

CAPTIONS = [
    Scenes(split).captions(i)[0] for split in ("heldout", "pairs", "relations", "wordings") for i in range(30)
]


class Perfect:
    """Draws what was asked for by looking it up, but every third picture as a blank one."""

    def __init__(self):
        self.known = {
            Scenes(split).captions(i)[0]: Scenes(split).scene(i)
            for split in ("heldout", "pairs", "relations", "wordings")
            for i in range(60)
        }
        self.seeds = []

    def __call__(self, prompts, *, seed, sampling):
        self.seeds += list(seed)
        pictures = [draw(self.known[prompt], 64) for prompt in prompts]
        return [p if i % 3 else p.resize((1, 1)).resize((64, 64)) for i, p in enumerate(pictures)]


def test_what_is_right_is_counted_split_by_split():
    model, told = Perfect(), []
    scores = evaluate(model, 6, seed=10, on_drawn=told.append)
    assert list(scores) == list(SPLITS) == list(TITLES)
    assert [score.right for score in scores.values()] == [4] * len(SPLITS)
    assert sum(told) == 6 * len(SPLITS)
    assert model.seeds == list(range(10, 16)) * len(SPLITS)  # each prompt has noise of its own
    for name, (split, kind) in SPLITS.items():
        prompts = {drawing.prompt for drawing in scores[name].drawings}
        known = {Scenes(split).captions(i)[0]: Scenes(split).scene(i).kind for i in range(60)}
        assert all(kind in (None, known[prompt]) for prompt in prompts)
        said = scores[name].to_json()
        assert (said["prompts"], said["right"]) == (6, 4)
        assert said["facts"]["shape"] == {"prompts": 6, "right": 4}


def test_no_prompts_are_refused():
    with pytest.raises(ConfigError, match="prompts=0 must be at least 1"):
        evaluate(Perfect(), 0)


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    # Wilson's own method at z = 1.96, from Newcombe 1998, table I
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_wilsons(right, asked, low, high):
    assert interval(right, asked) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_a_score_without_drawings_has_no_facts():
    assert Score().facts() == {}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that can read every caption of the scenes; what it draws is noise."""
    return tiny.write_run(tmp_path_factory.mktemp("report") / "run", captions=CAPTIONS * 3, text_length=99)


def test_a_run_of_other_data_is_not_judged_by_the_scenes(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "run")
    config = json.loads((other / "prior" / "config.json").read_text())
    (other / "prior" / "config.json").write_text(json.dumps({**config, "data": "/my/pictures"}))
    with pytest.raises(ConfigError, match="was trained on /my/pictures: only drawings of the"):
        judge_and_report(other, 3, "dalle evaluate", tmp_path)


def test_the_report_holds_all_it_shows(run, tmp_path):
    figures = judge_and_report(run, 3, "dalle <evaluate>", tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(figures))
    assert {name: split["prompts"] for name, split in figures["splits"].items()} == dict.fromkeys(SPLITS, 3)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "dalle &lt;evaluate&gt;" in page
    assert page.count("data:image/png;base64,") >= 3 * len(SPLITS)
    assert not re.search(r'(src|href)="(?!data:)', page)
    for title in TITLES.values():
        assert title in page


def test_the_same_run_is_judged_the_same(run, tmp_path):
    def right(folder):
        splits = judge_and_report(run, 2, "x", folder)["splits"]
        return [(split["right"], split["facts"]) for split in splits.values()]

    assert right(tmp_path / "a") == right(tmp_path / "b")


def test_the_built_in_model_is_found_by_its_name(tmp_path, monkeypatch):
    from dalle.builtin import FOLDER, find_run

    monkeypatch.chdir(tmp_path)
    assert find_run(tmp_path) == tmp_path
    from pathlib import Path

    assert find_run(Path("scenes")) == FOLDER
    Path("scenes").mkdir()
    assert find_run(Path("scenes")) == Path("scenes")
