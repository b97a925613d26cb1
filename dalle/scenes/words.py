"""The grammar of captions: lower case, no full stop, and nothing that is not true of the scene."""

from random import Random

from dalle.scenes.facts import Facts, Kind, Object, Place, Relation, Scene
from dalle.scenes.splits import SPLITS, Split

# A template states the place, the relation or the background exactly if it has that field.
# {object} is "a small red circle" or "a red circle"; of several, "three red circles". After "and" an object
# may follow or the background, so no words before a colour tell of which of the two it is.
TRAINED: dict[Kind, tuple[str, ...]] = {
    "single": (
        "{object}",
        "a picture of {object}",
        "there is {object}",
        "{object} {place}",
        "there is {object} {place}",
        "{place} is {object}",
        "{object} on {background}",
        "a picture of {object} on {background}",
        "{background} with {object}",
        "{object} {place} on {background}",
        "{background} with {object} {place}",
        "{object} and {background}",
        "there is {background} with {object}",
    ),
    "pair": (
        "{object} {relation} {other}",
        "there is {object} {relation} {other}",
        "a picture of {object} {relation} {other}",
        "{relation} {other} is {object}",
        "{object} and {other}",
        "{object} {relation} {other} on {background}",
        "{background} with {object} {relation} {other}",
        "a picture of {background} with {object} {relation} {other}",
    ),
    "count": (
        "{object}",
        "a picture of {object}",
        "there are {object}",
        "{object} on {background}",
        "{background} with {object}",
        "a picture of {object} on {background}",
        "{object} and {background}",
    ),
}

# Other arrangements of the same words, which "wordings" alone uses for scenes of the kind.
HELD_OUT: dict[Kind, tuple[str, ...]] = {
    "single": (
        "a picture of {object} {place}",
        "{place} there is {object}",
        "there is {object} on {background}",
        "a picture of {background} with {object}",
    ),
    "pair": (
        "{relation} {other} there is {object}",
        "{object} is {relation} {other}",
        "a picture of {object} {relation} {other} on {background}",
        "there is {background} with {object} {relation} {other}",
    ),
    "count": (
        "on {background} there are {object}",
        "there are {object} on {background}",
        "a picture of {background} with {object}",
    ),
}

RELATION_WORDS: dict[Relation, tuple[str, ...]] = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "inside": ("inside", "in"),
}
PLACE_WORDS: dict[Place, tuple[str, ...]] = {
    "middle": ("in the middle", "in the centre"),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    "left": ("on the left",),
    "right": ("on the right",),
    "top left": ("in the top left", "in the top left corner"),
    "top right": ("in the top right", "in the top right corner"),
    "bottom left": ("in the bottom left", "in the bottom left corner"),
    "bottom right": ("in the bottom right", "in the bottom right corner"),
}
NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}


_TEMPLATES: dict[Split, dict[Kind, tuple[str, ...]]] = {
    **dict.fromkeys(SPLITS, TRAINED),
    "relations": {"pair": tuple(form for form in TRAINED["pair"] if "{relation}" in form)},
    "wordings": HELD_OUT,
}


def caption(scene: Scene, rng: Random, split: Split) -> tuple[str, Facts]:
    """One caption of `scene` in a form that `split` allows, and what it states."""
    template = rng.choice(_TEMPLATES[split][scene.kind])
    first, last = scene.objects[0], scene.objects[-1]
    named = scene.objects if scene.kind == "pair" else (first,)
    size = first.size if scene.kind == "single" and rng.random() < 0.5 else None
    facts = Facts(
        count=len(scene.objects),
        shapes=tuple(thing.shape for thing in named),
        colours=tuple(thing.colour for thing in named),
        size=size,
        place=first.place if "{place}" in template else None,
        relation=scene.relation if "{relation}" in template else None,
        background=scene.background if "{background}" in template else None,
    )
    text = template.format(
        object=_several(len(scene.objects), first) if scene.kind == "count" else _one(size, first),
        other=_one(None, last),
        place=rng.choice(PLACE_WORDS[first.place]),
        relation=rng.choice(RELATION_WORDS[scene.relation]) if scene.relation else "",
        background=f"a {scene.background} background",
    )
    return text, facts


def _one(size: str | None, thing: Object) -> str:
    words = f"{thing.colour} {thing.shape}"
    return with_article(f"{size} {words}" if size else words)


def with_article(words: str) -> str:
    """With "a" or "an" before them."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _several(count: int, thing: Object) -> str:
    plural = "crosses" if thing.shape == "cross" else f"{thing.shape}s"
    return f"{NUMBER_WORDS[count]} {thing.colour} {plural}"
