"""The files that `sample` and `reconstruct` leave behind."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalle import drawings
from dalle.drawings import previewing, save_drawings, save_reconstructions
from dalle.errors import DataError
from dalle.pictures import contact_sheet
from tests import tiny

MADE = {"run": "runs/x", "seed": 3, "temperature": 1.0, "top_k": None, "top_p": None}


def pictures(n: int) -> list[Image.Image]:
    return [tiny.picture(i, (16, 16)) for i in range(n)]


def test_one_picture_comes_with_its_facts_and_without_a_sheet(tmp_path):
    (path,) = save_drawings(tmp_path, pictures(1), ["A red circle!"], 1, MADE)
    assert path.name == "a-red-circle-seed3-0.png"
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts == {"prompt": "A red circle!", "picture": 0, **MADE}
    with Image.open(path) as picture:
        assert picture.text["prompt"] == "A red circle!"
        assert json.loads(picture.text["seed"]) == 3


def test_several_pictures_come_in_order_with_a_sheet_at_the_end(tmp_path):
    captions = ["a star", "a star", "a ring", "a ring"]
    paths = save_drawings(tmp_path, pictures(4), captions, 2, MADE)
    assert [path.name for path in paths] == [
        "a-star-seed3-0.png", "a-star-seed3-1.png", "a-ring-seed3-0.png", "a-ring-seed3-1.png",
        "a-star-and-others-seed3-sheet.png",
    ]  # fmt: skip
    for path, expected in zip(paths, pictures(4), strict=False):
        with Image.open(path) as picture:
            assert picture.tobytes() == expected.tobytes()
    with Image.open(paths[-1]) as sheet:
        assert json.loads(sheet.text["prompts"]) == captions
        assert sheet.tobytes() == contact_sheet(pictures(4), captions).tobytes()


@pytest.mark.parametrize(
    ("prompts", "n"),
    [
        (["a red circle", "a red circle."], 1),  # alike but for punctuation
        (["x" * 70 + "a", "x" * 70 + "b"], 2),  # alike in the part that the name shows
        (["!!!", "???"], 1),
        (["a-red circle", "A red, circle"], 3),
    ],
)
def test_every_picture_has_a_file_of_its_own(tmp_path, prompts, n):
    captions = [prompt for prompt in prompts for _ in range(n)]
    paths = save_drawings(tmp_path, pictures(len(captions)), captions, n, MADE)
    assert len(set(paths)) == len(captions) + 1
    for path, expected, caption in zip(paths, pictures(len(captions)), captions, strict=False):
        with Image.open(path) as picture:
            assert picture.tobytes() == expected.tobytes()
            assert picture.text["prompt"] == caption
        assert json.loads(path.with_suffix(".json").read_text())["prompt"] == caption


def test_a_picture_is_replaced_only_by_the_same_one(tmp_path):
    def save(n: int, **changes):
        return save_drawings(tmp_path, pictures(n), ["a star"] * n, n, MADE | changes)

    first = save(2)
    assert save(2) == first
    (tmp_path / "a-star-seed3-1.json").write_text("{")  # cut off by a crash: who knows what the picture is
    warm, other = save(3), save(2, temperature=0.5)
    assert len({*first, *warm, *other}) == len(first) + len(warm) + len(other)
    assert save(3) == warm
    assert save(2, temperature=0.5) == other


def test_a_prompt_asked_for_twice_is_one_picture(tmp_path):
    one = tiny.picture(0, (16, 16))
    first, second, sheet = save_drawings(tmp_path, [one, one], ["a star", "a star"], 1, MADE)
    assert first == second
    assert sheet.name == "a-star-seed3-sheet.png"


@pytest.mark.parametrize(
    "prompt", ["../../etc/passwd", "a/b", "..", "빨간 원 왼쪽 " * 20, "𠀋" * 99, "\0 nul", "CON"]
)
def test_no_prompt_leads_out_of_the_folder(tmp_path, prompt):
    (path,) = save_drawings(tmp_path / "out", pictures(1), [prompt], 1, MADE)
    assert path.parent == tmp_path / "out"
    assert path.is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_reconstruction_stands_beside_the_middle_of_its_picture(tmp_path):
    model = tiny.dvae()
    source = tmp_path / "wide.png"
    source.write_bytes(tiny.png(1, (48, 16)))
    (path,) = save_reconstructions(tmp_path / "out", model, [source])
    with Image.open(path) as pair:
        assert pair.size == (16 + 2 + 16, 16)
        left = np.asarray(pair.crop((0, 0, 16, 16)))
    assert np.array_equal(left, np.asarray(tiny.picture(1, (48, 16)).crop((16, 0, 32, 16))))


def test_pictures_of_the_same_name_in_two_folders_keep_their_reconstructions(tmp_path):
    sources = []
    for i, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        sources.append(tmp_path / folder / "same.png")
        sources[-1].write_bytes(tiny.png(i, (16, 16)))
    paths = list(save_reconstructions(tmp_path / "out", tiny.dvae(), sources))
    assert len(set(paths)) == 2
    lefts = [Image.open(path).crop((0, 0, 16, 16)).tobytes() for path in paths]
    assert lefts == [tiny.picture(i, (16, 16)).tobytes() for i in range(2)]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"text", "not a picture"), (tiny.png(0, (15, 40)), "15×40 pixels")],
)
def test_a_picture_that_cannot_be_used_is_named(tmp_path, content, message):
    source = tmp_path / "odd.png"
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(save_reconstructions(tmp_path, tiny.dvae(), [source]))
    assert str(source) in str(caught.value)


def test_pictures_that_cannot_be_used_do_not_keep_others_from_being_reconstructed(tmp_path, capfd):
    sources = [tmp_path / f"{i}.png" for i in range(4)]
    for i in (1, 3):
        sources[i].write_bytes(tiny.png(i, (16, 16)))
    coming = save_reconstructions(tmp_path / "out", tiny.dvae(), sources)
    for i in (1, 3):
        path = next(coming)
        assert path.name == f"{i}-reconstruction.png"
        assert path.is_file()
    with pytest.raises(DataError, match=r"2\.png: no such file"):
        next(coming)
    told = capfd.readouterr().err
    assert "0.png: no such file" in told
    assert "2.png" not in told  # the error tells it


def test_a_preview_lasts_as_long_as_the_drawing(tmp_path):
    path = tmp_path / "out" / "preview.png"
    with previewing(path.parent, ["a star", "a ring", "a heart"], wanted=True) as show:
        assert not path.exists()
        show(1, pictures(2))
        with Image.open(path) as first:
            before = first.tobytes()
        show(0, pictures(3))
        with Image.open(path) as second:
            assert second.tobytes() != before
    assert not path.exists()
    with previewing(path.parent, [], wanted=False) as show:
        assert show is None


def test_a_preview_that_cannot_be_begun_takes_nothing_away(tmp_path, monkeypatch):
    (tmp_path / "preview.png").write_bytes(b"mine")

    def lost(path, **_):
        raise OSError(errno.ESTALE, "stale file handle")

    monkeypatch.setattr(Path, "touch", lost)
    with pytest.raises(OSError, match="stale"), previewing(tmp_path, ["a star"], True) as show:
        show(0, pictures(1))
    assert (tmp_path / "preview.png").read_bytes() == b"mine"


def test_a_preview_that_was_there_stays(tmp_path, capsys):
    (tmp_path / "preview.png").write_bytes(b"mine")
    with previewing(tmp_path, ["a star"], True) as one, previewing(tmp_path, ["a star"], True) as other:
        one(0, pictures(1))
        other(0, pictures(1))
        one(0, pictures(1))
        shown = {path.name for path in tmp_path.iterdir()}
    assert shown == {"preview.png", "preview-2.png", "preview-3.png"}
    assert [line.split("/")[-1] for line in capsys.readouterr().err.split()[-1:]] == ["preview-3.png"]
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"mine"]


def test_samplings_at_the_same_time_do_not_take_one_name(tmp_path):
    others = []

    def coming():
        for picture in pictures(2):
            warm = MADE | {"temperature": 0.5 + len(others)}
            others.extend(save_drawings(tmp_path, pictures(2), ["a star"] * 2, 2, warm)[:2])
            yield picture

    paths = save_drawings(tmp_path, coming(), ["a star"] * 2, 2, MADE)[:2]
    assert len({*paths, *others}) == 6
    for path, temperature in zip((*paths, *others), ("1.0", "1.0", "0.5", "0.5", "2.5", "2.5"), strict=True):
        with Image.open(path) as picture:
            assert picture.text["temperature"] == temperature


@pytest.mark.parametrize("race", [True, False])
def test_a_name_taken_in_the_last_moment_is_left_to_whom_took_it(tmp_path, monkeypatch, race):
    """Between the look at a name and its taking another sampling has it."""
    theirs = MADE | {"temperature": 0.5} if race else MADE
    look = drawings._is_free

    def late(path, facts):
        free = look(path, facts)
        monkeypatch.setattr(drawings, "_is_free", look)
        save_drawings(tmp_path, pictures(1), ["a star"], 1, theirs)
        return free

    monkeypatch.setattr(drawings, "_is_free", late)
    (path,) = save_drawings(tmp_path, pictures(1), ["a star"], 1, MADE)
    assert path.name == ("a-star-2-seed3-0.png" if race else "a-star-seed3-0.png")


def test_nothing_is_left_where_nothing_could_be_drawn(tmp_path):
    def coming():
        raise DataError("too long")
        yield

    with pytest.raises(DataError):
        save_drawings(tmp_path / "out", coming(), ["a star"], 1, MADE)
    assert not (tmp_path / "out").exists()


def test_names_that_are_not_utf_8_are_written_readably(tmp_path):
    sources = [tmp_path / os.fsdecode(name) for name in (b"caf\xe9.png", b"caf\xe8.png")]
    for seed, source in enumerate(sources):
        source.write_bytes(tiny.png(seed, (16, 16)))
    paths = list(save_reconstructions(tmp_path / "out", tiny.dvae(), sources))
    assert [path.name for path in paths] == ["caf\\xe9-reconstruction.png", "caf\\xe8-reconstruction.png"]
    for path, name in zip(paths, ("caf\\xe9.png", "caf\\xe8.png"), strict=True):
        assert json.loads(path.with_suffix(".json").read_text())["image"] == str(tmp_path / name)
        with Image.open(path) as picture:
            assert picture.text["image"] == str(tmp_path / name)


def test_reconstructions_of_two_calls_do_not_replace_each_other(tmp_path):
    model, sources = tiny.dvae(), []
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        sources.append(tmp_path / name / "a.png")
        sources[-1].write_bytes(tiny.png(len(sources), (40, 40)))
    first, second, again = (
        path for s in (*sources, sources[0]) for path in save_reconstructions(tmp_path, model, [s])
    )
    assert [path.name for path in (first, second, again)] == [
        "a-reconstruction.png", "a-2-reconstruction.png", "a-reconstruction.png",
    ]  # fmt: skip
    (other,) = save_reconstructions(tmp_path, model, sources[:1], {"dvae": "another"})
    assert other.name == "a-3-reconstruction.png"
    assert json.loads(other.with_suffix(".json").read_text())["dvae"] == "another"


def test_what_is_finished_is_kept_where_drawing_is_stopped(tmp_path):
    def coming():
        yield from pictures(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_drawings(tmp_path, coming(), ["a star"] * 2 + ["a ring"] * 2, 2, MADE)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "a-ring-seed3-0.png", "a-star-seed3-0.png", "a-star-seed3-1.png",
    ]  # fmt: skip


def test_no_letter_of_a_name_is_cut_in_two(tmp_path):
    (path,) = save_drawings(tmp_path, pictures(1), ["a" + "빨" * 60], 1, MADE)
    assert path.name == "a" + "빨" * 49 + "-seed3-0.png"  # of 3 bytes each


def test_a_preview_shows_each_picture_under_its_prompt(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(drawings, "contact_sheet", lambda some, captions: told.append(captions) or some[0])
    with previewing(tmp_path, ["a star", "a ring", "a heart"], True) as show:
        show(0, pictures(1))
        show(1, pictures(2))
    assert told == [["a star"], ["a ring", "a heart"]]


def test_a_preview_may_be_deleted_while_it_lasts(tmp_path):
    with previewing(tmp_path, ["a star"], True) as show:
        show(0, pictures(1))
        (tmp_path / "preview.png").unlink()
    assert not list(tmp_path.iterdir())


def test_a_reconstruction_tells_the_whole_path_of_its_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.png").write_bytes(tiny.png(1, (16, 16)))
    (path,) = save_reconstructions(tmp_path / "out", tiny.dvae(), [Path("a.png")])
    assert json.loads(path.with_suffix(".json").read_text())["image"] == str(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a-star-seed3-0.png", "a-star-seed3-0.json"])
def test_a_file_of_someone_elses_stays_whichever_of_the_two_it_is(tmp_path, name):
    """A picture of the user's own, or a name that another sampling took before its picture is there."""
    (tmp_path / name).touch()
    (path,) = save_drawings(tmp_path, pictures(1), ["a star"], 1, MADE)
    assert path.name == "a-star-2-seed3-0.png"
    assert (tmp_path / name).read_bytes() == b""


@pytest.mark.parametrize(("prompt", "stem"), [("x" * 61, "x" * 60), ("?!", "prompt")])
def test_a_name_is_not_too_long_and_never_empty(tmp_path, prompt, stem):
    (path,) = save_drawings(tmp_path, pictures(1), [prompt], 1, MADE)
    assert path.name == f"{stem}-seed3-0.png"
