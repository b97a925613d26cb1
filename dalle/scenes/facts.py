"""What a scene holds and what a caption says about it; every number is in units of the picture's side."""

from dataclasses import dataclass
from typing import Literal, cast, get_args

Shape = Literal["circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring"]
Background = Literal["white", "black", "grey", "beige", "lavender"]
Colour = Literal["red", "green", "blue", "yellow", "orange", "purple", "pink", "cyan", Background]
Size = Literal["small", "large"]
Place = Literal[
    "middle", "top", "bottom", "left", "right", "top left", "top right", "bottom left", "bottom right"
]
Relation = Literal["left of", "right of", "above", "below", "inside"]
Kind = Literal["single", "pair", "count"]
RGB = tuple[int, int, int]

SHAPES: tuple[Shape, ...] = get_args(Shape)
RELATIONS: tuple[Relation, ...] = get_args(Relation)

# Any two are at least 85 apart (Euclidean, of 255 a channel), but for white, beige and lavender: 68.
COLOURS: dict[Colour, RGB] = {
    "red": (215, 25, 35),
    "green": (30, 150, 50),
    "blue": (35, 70, 225),
    "yellow": (255, 222, 30),
    "orange": (255, 135, 10),
    "purple": (125, 35, 165),
    "pink": (255, 120, 195),
    "cyan": (30, 200, 220),
    "white": (252, 252, 252),
    "black": (12, 12, 12),
    "grey": (125, 125, 125),
    "beige": (226, 208, 178),
    "lavender": (200, 195, 240),
}
BACKGROUNDS: dict[Background, RGB] = {name: COLOURS[name] for name in get_args(Background)}
CONTRAST = 85  # between an object and what it lies on, at least

SMALL_BELOW = 0.22  # the radius between small and large; no object's is near it
SIDE_BEYOND = 0.08  # from the middle, per axis: further out is a side; no object alone is near it


@dataclass(frozen=True)
class Object:
    """A flat-coloured shape inside the box of half side `radius` around (x, y); y grows downwards."""

    shape: Shape
    colour: Colour
    x: float
    y: float
    radius: float

    @property
    def size(self) -> Size:
        return "small" if self.radius < SMALL_BELOW else "large"

    @property
    def place(self) -> Place:
        """Where in the picture it is: low, middle or high along each axis."""
        row = _side(self.y, "top", "bottom")
        column = _side(self.x, "left", "right")
        return cast(Place, f"{row} {column}".strip() or "middle")


def _side(at: float, low: str, high: str) -> str:
    return "" if abs(at - 0.5) < SIDE_BEYOND else low if at < 0.5 else high


@dataclass(frozen=True)
class Scene:
    """One object; two of which the first stands in `relation` to the second; or two to four equal ones."""

    background: Background
    objects: tuple[Object, ...]  # the first lies on top
    relation: Relation | None = None

    @property
    def kind(self) -> Kind:
        if len(self.objects) == 1:
            return "single"
        return "pair" if self.relation else "count"


@dataclass(frozen=True)
class Facts:
    """What a caption states, for a judge to check in a picture; None where it says nothing.

    `shapes` and `colours` run side by side: one entry for a single object or for `count` equal ones,
    two for a pair, of which the first stands in `relation` to the second.
    """

    count: int
    shapes: tuple[Shape, ...]
    colours: tuple[Colour, ...]
    size: Size | None = None
    place: Place | None = None
    relation: Relation | None = None
    background: Background | None = None
