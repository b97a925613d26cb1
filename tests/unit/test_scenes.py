"""The built-in scenes: true captions, readable pictures, exact splits."""

import re
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import combinations, pairwise, product
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dalle.errors import ConfigError
from dalle.scenes.draw import draw
from dalle.scenes.facts import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, Object, Scene
from dalle.scenes.source import Scenes
from dalle.scenes.splits import CELLS, HELD_OUT_PAIRS, SPLITS, is_held_out, is_trained_picture
from dalle.scenes.words import HELD_OUT, NUMBER_WORDS, PLACE_WORDS, TRAINED, caption

N = 800
USUAL = ("train", "heldout")  # the splits without anything held out


@cache
def drawn(split):
    """The first scenes of a split, each with its caption and its facts."""
    return [Scenes(split)._make(i) for i in range(N)]


# What each wording means, apart from the module's own table.
MEANINGS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "inside": ("inside", "in"),
}


def every():
    return [made for split in SPLITS for made in drawn(split)]


def distance(one, other):
    """Between two colours: Euclidean, of 255 a channel."""
    return np.linalg.norm(np.subtract(one, other))


def holds(relation, first, second):
    """The relation read off the geometry alone: which way, how far, and that it is the main direction."""
    dx, dy = second.x - first.x, second.y - first.y
    apart = first.radius + second.radius
    if relation == "inside":
        return max(abs(dx), abs(dy)) + first.radius < second.radius
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    along = along if relation in ("left of", "above") else -along
    return along > apart and abs(across) < along / 2


def thirds(thing):
    """The place by fixed borders at 0.42 and 0.58."""
    row = "top" if thing.y < 0.42 else "bottom" if thing.y > 0.58 else ""
    column = "left" if thing.x < 0.42 else "right" if thing.x > 0.58 else ""
    return f"{row} {column}".strip() or "middle"


def test_facts_are_true_of_the_scene():
    for scene, _, facts in every():
        first, *others = scene.objects
        assert facts.count == len(scene.objects)
        if len(facts.shapes) == 2:
            assert facts.shapes == tuple(thing.shape for thing in scene.objects)
            assert facts.colours == tuple(thing.colour for thing in scene.objects)
        else:
            assert {(facts.shapes[0], facts.colours[0])} == {(o.shape, o.colour) for o in scene.objects}
        assert len(facts.shapes) == len(facts.colours)
        assert facts.background in (None, scene.background)
        if facts.size:
            assert facts.size == ("large" if first.radius > 0.23 else "small")
            assert not others
        if facts.place:
            assert facts.place == thirds(first)
            assert not others
        if scene.relation:
            assert holds(scene.relation, first, others[0])
            assert facts.relation in (None, scene.relation)
            assert (first.shape, first.colour) != (others[0].shape, others[0].colour)
        lies_on = [BACKGROUNDS[scene.background]] * len(scene.objects)
        colours = [COLOURS[thing.colour] for thing in scene.objects]
        if scene.relation == "inside":
            lies_on, colours = [*lies_on, colours[1]], [*colours, colours[0]]
        assert all(distance(*two) >= 85 for two in zip(lies_on, colours, strict=True))  # or it is hardly seen


def test_text_says_what_its_facts_say_and_nothing_else():
    for _, text, facts in every():
        words = text.split()
        grounds = re.findall(r"(\w+) background", text)
        assert grounds == ([facts.background] if facts.background else [])
        assert [w for w in words if w in ("small", "large")] == ([facts.size] if facts.size else [])
        of_objects = re.sub(r"\w+ background", "", text).split()
        assert {w for w in of_objects if w in COLOURS} == set(facts.colours)
        plain = text.replace("crosses", "cross")
        named = re.findall(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", plain)
        assert sorted(named) == sorted(zip(facts.colours, facts.shapes, strict=True))
        numbers = [n for n, word in NUMBER_WORDS.items() if word in words]
        assert numbers == ([facts.count] if facts.count > 1 and len(facts.shapes) == 1 else [])
        assert text == text.lower()
        assert text[-1].isalpha()


def test_text_states_place_and_relation_in_their_words():
    for _, text, facts in every():
        if facts.place:
            named = re.search(
                r"(?:in|at|on) the ((?:top|bottom) (?:left|right)|top|bottom|left|right|middle|centre)", text
            )
            assert named[1].replace("centre", "middle") == facts.place
        if facts.relation:
            first, second = (f"{c} {s}" for c, s in zip(facts.colours, facts.shapes, strict=True))
            phrases = "|".join(MEANINGS[facts.relation])
            # "first <relation> second", or "<relation> second is first"
            assert re.search(rf"{first} (is )?({phrases}) an? {second}", text) or re.search(
                rf"^({phrases}) an? {second} (there )?is an? {first}", text
            )


def test_an_and_a():
    for _, text, _ in every():
        assert all(
            (article == "an") == (word[0] in "aeiou") for article, word in re.findall(r"\b(an?) (\w+)", text)
        )


def test_trained_splits_hold_nothing_held_out():
    held_out_scenes = {relation_key(scene) for scene, _, _ in drawn("relations")}
    for split in USUAL:
        for scene, text, _ in drawn(split):
            assert not {(thing.colour, thing.shape) for thing in scene.objects} & set(HELD_OUT_PAIRS)
            assert scene.kind != "pair" or relation_key(scene) not in held_out_scenes
            assert not is_held_out_wording(text)


def relation_key(scene):
    """What stands how to what, whichever of the two is named first."""
    (first, second), relation = scene.objects, scene.relation
    if relation in ("right of", "below"):
        return second.shape, {"right of": "left of", "below": "above"}[relation], first.shape
    return first.shape, relation, second.shape


def is_held_out_wording(text):
    """By the text alone: does any template of the held-out ones produce it?"""
    things = rf"(?:an? (?:(?:small|large) )?(?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)}))"
    several = rf"(?:(?:two|three|four) (?:{'|'.join(COLOURS)}) \w+s)"
    fields = {
        "other": things,
        "place": "|".join(phrase for phrases in PLACE_WORDS.values() for phrase in phrases),
        "relation": "|".join(phrase for phrases in MEANINGS.values() for phrase in phrases),
        "background": rf"a (?:{'|'.join(BACKGROUNDS)}) background",
    }
    fields = {name: f"(?:{pattern})" for name, pattern in fields.items()}
    return any(
        re.fullmatch(form.format(object=several if kind == "count" else things, **fields), text)
        for kind, forms in HELD_OUT.items()
        for form in forms
    )


def test_each_held_out_split_holds_only_its_own():
    assert all(is_held_out_wording(text) for _, text, _ in drawn("wordings"))
    assert not any(is_held_out_wording(text) for split in SPLITS[:4] for _, text, _ in drawn(split))
    for scene, _, _ in drawn("pairs"):
        (thing,) = scene.objects
        assert (thing.colour, thing.shape) in HELD_OUT_PAIRS
    seen = {relation_key(scene) for split in USUAL for scene, _, _ in drawn(split) if scene.kind == "pair"}
    for scene, _, facts in drawn("relations"):
        assert relation_key(scene) not in seen
        assert facts.relation == scene.relation
    usual = seen | {relation_key(scene) for scene, _, _ in drawn("wordings") if scene.kind == "pair"}
    assert not usual & {relation_key(scene) for scene, _, _ in drawn("relations")}
    for split in ("relations", "wordings"):
        painted = {(thing.colour, thing.shape) for scene, _, _ in drawn(split) for thing in scene.objects}
        assert not painted & set(HELD_OUT_PAIRS)


def test_held_out_pairs_leave_every_vivid_colour_and_every_shape_common():
    assert len(set(HELD_OUT_PAIRS)) == 8
    objects = [thing for i in range(10 * N) for thing in Scenes("train").scene(i).objects]
    shapes = Counter(thing.shape for thing in objects)
    assert len(shapes) == 8
    assert min(shapes.values()) > 0.7 * len(objects) / 8
    colours = Counter(thing.colour for thing in objects)
    muted = {colour: colours.pop(colour) for colour in BACKGROUNDS}
    assert len(colours) == 8
    assert min(colours.values()) > 0.9 * len(objects) * 0.965 / 8
    assert sum(muted.values()) / len(objects) == pytest.approx(0.035, abs=0.01)
    # Lavender is the least of them: it hardly differs from three of the backgrounds.
    assert min(muted.values()) > 0.0025 * len(objects)
    assert len({(o.colour, o.shape) for o in objects}) == 13 * 8 - 8


def test_held_out_wordings_use_only_trained_words():
    def words(forms):
        return {
            word for group in forms.values() for form in group for word in re.sub(r"{\w+}", "", form).split()
        }

    assert words(HELD_OUT) <= words(TRAINED)
    for kind, forms in HELD_OUT.items():
        assert not set(forms) & set(TRAINED[kind])
    trained = {word for _, text, _ in drawn("train") for word in text.split()}
    assert {word for _, text, _ in every() for word in text.split()} <= trained


def test_the_prompts_people_try_first_are_trained():
    circle, square = Object("circle", "red", 0.25, 0.5, 0.2), Object("square", "blue", 0.75, 0.5, 0.2)
    stars = tuple(Object("star", "red", x, 0.25, 0.15) for x in (0.2, 0.5, 0.8))
    prompts = {
        "a red circle": Scene("white", (circle,)),
        "a red circle left of a blue square": Scene("white", (circle, square), "left of"),
        "three red stars": Scene("white", stars),
    }
    for prompt, scene in prompts.items():
        assert prompt in {caption(scene, Random(seed), "train")[0] for seed in range(300)}
        assert prompt not in {caption(scene, Random(seed), "wordings")[0] for seed in range(300)}
    assert not is_held_out("circle", "left of", "square")
    assert not {("red", "circle"), ("blue", "square"), ("red", "star")} & set(HELD_OUT_PAIRS)
    bare = [text for _, text, _ in drawn("train") if re.fullmatch(r"an? \w+ \w+ left of an? \w+ \w+", text)]
    assert bare


def test_both_readings_of_a_relation_are_held_out():
    for first, second in product(SHAPES, SHAPES):
        assert is_held_out(first, "left of", second) == is_held_out(second, "right of", first)
        assert is_held_out(first, "above", second) == is_held_out(second, "below", first)
    held_out = Counter(r for f, r, s in product(SHAPES, RELATIONS, SHAPES) if is_held_out(f, r, s))
    assert held_out == {"left of": 8, "right of": 8, "above": 8, "below": 8, "inside": 4}


def test_kinds_come_in_their_shares():
    kinds = Counter(scene.kind for scene, _, _ in drawn("train"))
    shares = {kind: count / N for kind, count in kinds.items()}
    assert shares == pytest.approx({"single": 0.50, "pair": 0.30, "count": 0.20}, abs=0.06)


def test_objects_stay_inside_and_apart():
    for scene, _, _ in every():
        for thing in scene.objects:
            reach = max(abs(thing.x - 0.5), abs(thing.y - 0.5)) + thing.radius
            assert reach <= 0.5
            assert thing.radius >= 0.128
        if scene.relation != "inside":
            for one, other in combinations(scene.objects, 2):
                distance = max(abs(one.x - other.x), abs(one.y - other.y))
                assert distance >= one.radius + other.radius + 0.05


def test_sizes_and_places_have_a_gap():
    alone = [scene.objects[0] for scene, _, _ in every() if scene.kind == "single"]
    radii = sorted(thing.radius for thing in alone)
    assert max(b - a for a, b in pairwise(radii)) > 0.09
    offsets = sorted(abs(at - 0.5) for thing in alone for at in (thing.x, thing.y))
    assert max(b - a for a, b in pairwise(offsets)) > 0.07
    assert {thing.place for thing in alone} == set(PLACE_WORDS)


def test_colours_are_far_apart():
    light = {"white", "beige", "lavender"}
    for one, other in combinations(COLOURS, 2):
        assert distance(COLOURS[one], COLOURS[other]) >= (65 if {one, other} <= light else 85)


def test_pixels_show_the_scene():
    for scene, _, _ in drawn("train")[:400] + drawn("relations")[:100]:
        pixels = np.asarray(draw(scene, 64))
        for corner in (pixels[0, 0], pixels[0, -1], pixels[-1, 0], pixels[-1, -1]):
            assert tuple(corner) == BACKGROUNDS[scene.background]
        for thing in scene.objects[:1] if scene.relation == "inside" else scene.objects:
            middle = tuple(pixels[int(thing.y * 64), int(thing.x * 64)])
            band = tuple(pixels[int(thing.y * 64), int((thing.x + 0.8 * thing.radius) * 64)])
            if thing.shape == "ring":
                assert band == COLOURS[thing.colour]
                assert middle != COLOURS[thing.colour]
            else:
                assert middle == COLOURS[thing.colour]
        if scene.relation == "inside":  # the outer one shows beside the inner
            outer = scene.objects[1]
            beside = tuple(pixels[int(outer.y * 64), int((outer.x + 0.7 * outer.radius) * 64)])
            assert beside == COLOURS[outer.colour]


def test_a_ring_shows_what_lies_under_its_hole():
    ring, square = Object("ring", "red", 0.5, 0.5, 0.15), Object("square", "blue", 0.5, 0.5, 0.35)
    assert draw(Scene("white", (ring, square), "inside"), 64).getpixel((32, 32)) == COLOURS["blue"]
    assert draw(Scene("white", (ring,)), 64).getpixel((32, 32)) == BACKGROUNDS["white"]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_fills_its_box_and_no_more(shape):
    pixels = np.asarray(draw(Scene("white", (Object(shape, "blue", 0.5, 0.5, 0.25),)), 64))
    rows, columns = np.nonzero((pixels != BACKGROUNDS["white"]).any(-1))
    assert min(rows.min(), columns.min()) in range(16, 20)
    assert max(rows.max(), columns.max()) in range(44, 48)
    assert 0.3 < (pixels[..., 0] < 140).sum() / 32**2 < 0.85


def test_shapes_differ_at_the_smallest_radius():
    """No shape is another one's likeness: of the box's pixels at least a tenth differ."""
    flat = {
        shape: np.asarray(draw(Scene("white", (Object(shape, "blue", 0.5, 0.5, 0.13),)), 64))[..., 0]
        for shape in SHAPES
    }
    for one, other in combinations(SHAPES, 2):
        differing = (np.abs(flat[one].astype(int) - flat[other]) > 100).sum()
        assert differing > 0.1 * (0.26 * 64) ** 2, (one, other)


def test_edges_are_smooth():
    pixels = np.asarray(draw(Scene("white", (Object("circle", "blue", 0.5, 0.5, 0.3),)), 64))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 6


@given(size=st.integers(16, 256), index=st.integers(0, 2**24 - 1))
def test_any_size_draws_the_same_scene(size, index):
    sample = Scenes("train", size)[index]
    assert sample.image.size == (size, size)
    assert sample.image.mode == "RGB"
    assert sample.captions == Scenes("train", 64).captions(index)


@given(split=st.sampled_from(SPLITS), index=st.integers(0, 2**16 - 1))
def test_a_sample_is_a_function_of_split_and_index(split, index):
    one, other = Scenes(split), Scenes(split)
    other[(index + 1) % 2**16]  # what was read before does not matter
    a, b = one[index], other[index]
    assert (a.captions, a.key, a.image.tobytes()) == (b.captions, b.key, b.image.tobytes())
    assert a.key == f"scenes/{split}/{index}"
    assert one.captions(index) == a.captions
    assert draw(one.scene(index), 64).tobytes() == a.image.tobytes()


def test_known_scenes_stay_what_they_are():
    """Another stream of random numbers would silently change the data that runs were trained on."""
    assert [Scenes(split).captions(0)[0] for split in SPLITS] == [
        "a cyan diamond and a pink triangle",
        "three cyan diamonds and a black background",
        "there is a small cyan ring in the top left corner",
        "a white background with a purple diamond to the right of a grey triangle",
        "inside a purple diamond there is a pink diamond",
    ]
    places = [
        (thing.shape, thing.colour, *(round(18 * at, 9) for at in (thing.x, thing.y, thing.radius)))
        for thing in Scenes("train").scene(0).objects
    ]
    assert places == [("diamond", "cyan", 3, 3, 3), ("triangle", "pink", 3, 11, 3)]


@pytest.mark.parametrize(("split", "share"), [("train", 0.99), ("heldout", 0.9)])  # few are held out
def test_pictures_are_distinct(split, share):
    pictures = {sample.image.tobytes() for sample in map(Scenes(split).__getitem__, range(500))}
    assert len(pictures) > share * 500


def test_boxes_are_whole_cells():
    for scene, _, _ in every():
        for thing in scene.objects:
            for at in (thing.x, thing.y):
                for side in (at - thing.radius, at + thing.radius):
                    assert CELLS * side == pytest.approx(round(CELLS * side), abs=1e-9)


def test_no_picture_of_another_split_is_in_train():
    """Neither as it is, nor mirrored, nor with its objects in another order."""
    for split in SPLITS:
        for scene, _, _ in drawn(split):
            for other in (scene, mirrored(scene), replace(scene, objects=scene.objects[::-1])):
                assert is_trained_picture(other) == (split == "train")


def test_no_place_size_or_background_tells_the_split():
    """Else a model would learn it, and held-out pictures would surprise by it alone."""
    trained = [scene for scene, _, _ in drawn("train") if scene.kind == "single"]
    heldout = [scene for scene, _, _ in drawn("heldout") if scene.kind == "single"]
    for of in (
        lambda scene: scene.background,
        lambda scene: round((scene.objects[0].x + scene.objects[0].y) * CELLS) % 2,
        lambda scene: scene.objects[0].radius,
        lambda scene: scene.objects[0].place,
    ):
        seen, kept = Counter(map(of, trained)), Counter(map(of, heldout))
        assert seen.keys() == kept.keys()
        for value in seen:
            assert kept[value] / len(heldout) == pytest.approx(seen[value] / len(trained), abs=0.12)


def mirrored(scene: Scene) -> Scene:
    return replace(scene, objects=tuple(replace(thing, x=1 - thing.x) for thing in scene.objects))


@pytest.mark.parametrize(("split", "length"), [("train", 2**24), ("heldout", 2**16), ("pairs", 2**16)])
def test_length_is_kept_to(split, length):
    source = Scenes(split)
    assert len(source) == length
    assert source[length - 1].captions
    for index in (-1, length):
        with pytest.raises(IndexError, match=f"{index} of {length}"):
            source[index]


def test_a_size_too_small_is_refused():
    with pytest.raises(ConfigError, match=r"15 pixels.*at least 16"):
        Scenes(size=15)
