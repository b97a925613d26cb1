"""Curves as SVG."""

import json
import xml.etree.ElementTree as ET

from dalle.chart import Curve, curves, draw_scales, of_scales, shades, svg

NAMESPACE = "{http://www.w3.org/2000/svg}"


def points(picture: str) -> list[list[tuple[float, float]]]:
    """What is drawn, curve by curve; it must be XML."""
    found = ET.fromstring(picture).iter(f"{NAMESPACE}polyline")
    return [[tuple(map(float, dot.split(","))) for dot in line.get("points").split()] for line in found]


def words(picture: str) -> list[str]:
    return [text.text for text in ET.fromstring(picture).iter(f"{NAMESPACE}text")]


def test_points_lie_where_their_values_are():
    rising, flat = points(svg(curves({"a": [(0, 1.0), (50, 2.0), (100, 3.0)], "b": [(0, 1.0), (100, 1.0)]})))
    (x0, low), (x1, middle), (x2, high) = rising
    assert x1 - x0 == x2 - x1 > 0
    assert low - middle == middle - high > 0  # y grows downwards
    assert flat == [(x0, low), (x2, low)]


def test_the_frame_says_what_it_spans_and_the_legend_whose_curve_it_is():
    said = words(svg(curves({"<train>": [(0, 0.25), (1200, 4.0)]}), "Loss & all"))
    assert {"<train>", "Loss & all", "4", "0.25", "1,200 updates"} <= set(said)


def test_nothing_is_drawn_of_nothing():
    assert svg([]) == svg([Curve([])]) == ""


def test_long_curves_are_thinned():
    (line,) = points(svg([Curve([(i, i % 7.0) for i in range(100_000)])]))
    assert 500 < len(line) < 1300


def test_of_many_curves_the_first_and_the_last_are_named_and_each_has_a_shade():
    drawn = shades([[(0, 1.0), (1, 0.5 * i)] for i in range(5)], "first", "last")
    assert [curve.label for curve in drawn] == ["first", "", "", "", "last"]
    assert len({curve.colour for curve in drawn}) == 5


def test_the_scales_of_a_run(tmp_path):
    draw_scales(tmp_path)
    assert not (tmp_path / "scales.svg").exists()
    lines = [
        {"step": 1, "loss": 2.0, "log2_scales": [13.0, 13.0, 13.0]},
        {"step": 1, "heldout_loss": 2.0},
        {"step": 2, "loss": 1.0, "log2_scales": [13.5, 13.0, 12.5]},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_scales(tmp_path)
    up, level, down = points((tmp_path / "scales.svg").read_text())
    assert up[1][1] < level[1][1] < down[1][1]
    assert of_scales(tmp_path / "none") == ""
