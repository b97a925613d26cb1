"""Turns a scene into a picture."""

from math import cos, pi, sin

from PIL import Image, ImageDraw

from dalle.scenes.facts import BACKGROUNDS, COLOURS, Object, Scene, Shape

SAMPLES = 4  # per pixel and axis; their mean is the pixel, which smooths the edges
HOLE = 0.58  # of a ring, as a part of its radius

Points = list[tuple[float, float]]


def _star() -> Points:
    tips = [(1.05 if i % 2 == 0 else 0.47, i * pi / 5) for i in range(10)]
    return [(r * sin(angle), 0.1 - r * cos(angle)) for r, angle in tips]


def _heart() -> Points:
    angles = [2 * pi * i / 40 for i in range(40)]
    return [
        (sin(t) ** 3, -(13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t)) / 16 - 0.1)
        for t in angles
    ]


# Corners within [-1, 1]², the box of an object.
_OUTLINES: dict[Shape, Points] = {
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0, -0.95), (1, 0.82), (-1, 0.82)],
    "star": _star(),
    "heart": _heart(),
    "diamond": [(0, -1), (0.8, 0), (0, 1), (-0.8, 0)],
    "cross": [
        *((-0.32, -1), (0.32, -1), (0.32, -0.32), (1, -0.32), (1, 0.32), (0.32, 0.32)),
        *((0.32, 1), (-0.32, 1), (-0.32, 0.32), (-1, 0.32), (-1, -0.32), (-0.32, -0.32)),
    ],
}


def draw(scene: Scene, size: int) -> Image.Image:
    """Draw `scene` on `size` × `size` pixels, RGB."""
    side = size * SAMPLES
    canvas = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(canvas)
    for thing in reversed(scene.objects):
        _draw_object(pen, thing, side)
    return canvas.reduce(SAMPLES)


def _draw_object(pen: ImageDraw.ImageDraw, thing: Object, side: int) -> None:
    # Pillow paints both end samples of a span: half a sample less each way keeps the width and the middle.
    x, y, radius = thing.x * side, thing.y * side, thing.radius * side - 0.5
    colour = COLOURS[thing.colour]
    if thing.shape in _OUTLINES:
        outline = _OUTLINES[thing.shape]
        pen.polygon([(int(x + radius * a), int(y + radius * b)) for a, b in outline], fill=colour)
        return
    box = (int(x - radius), int(y - radius), int(x + radius), int(y + radius))
    if thing.shape == "circle":
        pen.ellipse(box, fill=colour)
    else:  # only the band, so that a ring's hole shows what lies under it
        pen.ellipse(box, outline=colour, width=round((1 - HOLE) * radius))
