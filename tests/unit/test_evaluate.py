"""Counting what a model draws right, and the page that shows it."""

import json
import re
import shutil

import pytest

from dalle.checkpoint import FORMAT, write_json
from dalle.errors import ConfigError
from dalle.evaluate import SPLITS, TITLES, Drawing, Score, evaluate, interval
from dalle.report import _gallery, _settings, _stage, _table, _timing, judge_and_report
from dalle.scenes.draw import draw
from dalle.scenes.judge import Verdict
from dalle.scenes.source import Scenes
from stage2_prior.sample import Sampling
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
        self.seeds, self.samplings = [], []

    def __call__(self, prompts, *, seed, sampling):
        self.seeds += list(seed)
        self.samplings.append(sampling)
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


def test_what_is_drawn_in_several_parts_has_noise_of_its_own_and_the_settings_asked_for(monkeypatch):
    monkeypatch.setattr("dalle.evaluate.AT_ONCE", 4)
    model, how = Perfect(), Sampling(temperature=0.5)
    evaluate(model, 6, seed=10, sampling=how)
    assert model.seeds == list(range(10, 16)) * len(SPLITS)
    assert model.samplings == [how] * 2 * len(SPLITS)


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


def drawing(right: bool, **facts: bool) -> Drawing:
    return Drawing("a <red> circle", tiny.picture(0), Verdict({"shape": right, **facts}, ("found <none>",)))


def test_facts_are_shares_of_the_prompts_that_state_them():
    drawings = [drawing(True), drawing(False), drawing(True, colour=True), drawing(True, colour=False)]
    table = _table({"singles": Score(drawings)})
    assert "<td>4<td><b>50%</b> <span class=quiet>15%–85%</span><td>75%<td>50%" in table
    table = _table({"singles": Score([drawing(True)] * 3 + [drawing(False)])})
    low, high = interval(3, 4)
    assert f"<b>75%</b> <span class=quiet>{low:.0%}–{high:.0%}</span>" in table


def test_a_drawing_is_marked_and_its_prompt_and_reasons_are_text():
    right, wrong = (_gallery("singles", [drawing(each)]) for each in (True, False))
    assert "<figure class=right>" in right
    assert "a &lt;red&gt; circle<small>right</small>" in right
    assert "<figure class=wrong>" in wrong
    assert "a &lt;red&gt; circle<small>found &lt;none&gt;</small>" in wrong


def test_a_stage_is_told_by_its_last_lines_and_all_of_its_time(tmp_path):
    write_json(tmp_path / "config.json", {"format": FORMAT, "training": {"batch_size": 4, "steps": 9}})
    lines = [{"step": 1, "seconds": 60.0}, {"step": 1, "heldout_psnr": 1.0},
             {"step": 2, "seconds": 90.0}, {"step": 2, "heldout_psnr": 3.0}]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = _stage(tmp_path)
    assert told == {"steps": 2, "seconds": 150.0, "batch_size": 4, "heldout_psnr": 3.0}
    assert _timing(told) == "2 updates of 4 pictures in 2.5 minutes."


def test_the_settings_of_the_drawings_are_told():
    plain = {"temperature": 1.0, "top_k": None, "top_p": None, "guidance": 1.0}
    assert _settings(plain) == "at temperature 1"
    assert _settings({**plain, "top_p": 0.9, "guidance": 3.0}) == "at temperature 1, top-p 0.9, guidance 3"
    assert _settings({**plain, "temperature": 0.7, "top_k": 5}) == "at temperature 0.7, top-k 5"


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
    assert "through hard codes" not in page  # the run has no pictures of that
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
