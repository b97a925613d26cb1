"""Curves over the updates as SVG, to stand in a page or alone."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dalle.checkpoint import replacing
from dalle.metrics import read_metrics

COLOURS = ("#2563ae", "#d9730d", "#2a9d4a", "#8b3fb0")
MOST = 600  # points drawn of a curve


@dataclass(frozen=True)
class Curve:
    """Points (update, value) in order of the updates; a curve without a label is not in the legend."""

    points: Sequence[tuple[int, float]]
    label: str = ""
    colour: str = COLOURS[0]
    width: float = 1.6


def curves(named: Mapping[str, Sequence[tuple[int, float]]]) -> list[Curve]:
    """One curve for each name, in colours of their own."""
    return [Curve(points, name, COLOURS[i % len(COLOURS)]) for i, (name, points) in enumerate(named.items())]


def shades(series: Sequence[Sequence[tuple[int, float]]], first: str, last: str) -> list[Curve]:
    """Many curves, coloured from blue to orange in their order; only the first and the last are named."""
    steps = max(1, len(series) - 1)
    labels = {0: first, len(series) - 1: last}
    return [
        Curve(points, labels.get(i, ""), f"hsl({210 - 180 * i / steps:.0f} 65% 45%)")
        for i, points in enumerate(series)
    ]


def svg(drawn: Sequence[Curve], title: str = "", *, width: int = 390, height: int = 170) -> str:
    """The curves in one frame, from update 0 to the last; empty where there are no points."""
    points = [point for curve in drawn for point in curve.points]
    if not points:
        return ""
    left, right, top, bottom = 40, width - 10, 32 if title else 20, height - 20
    last = max(x for x, _ in points) or 1
    low, high = min(y for _, y in points), max(y for _, y in points)
    span = high - low or 1.0
    parts, at = [], left + 8
    for curve in drawn:
        every = max(1, len(curve.points) // MOST)
        dots = " ".join(
            f"{left + (right - left) * x / last:.1f},{bottom - (bottom - top) * (y - low) / span:.1f}"
            for x, y in curve.points[::every]
        )
        pen = f'fill="none" stroke="{curve.colour}" stroke-width="{curve.width}"'
        parts.append(f'<polyline points="{dots}" {pen}/>')
        if curve.label:
            parts.append(
                f'<text x="{at}" y="{top - 8}" fill="{curve.colour}">{html.escape(curve.label)}</text>'
            )
            at += 16 + 6 * len(curve.label)
    heading = f'<text x="{left + 8}" y="12" font-weight="600">{html.escape(title)}</text>' if title else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-size="10" '
        f'font-family="system-ui,sans-serif"><rect width="{width}" height="{height}" fill="#fff"/>{heading}'
        f'<path d="M{left} {top}V{bottom}H{right}" stroke="#bbb" fill="none"/>'
        f'<text x="2" y="{top + 6}">{high:.3g}</text><text x="2" y="{bottom}">{low:.3g}</text>'
        f'<text x="{right}" y="{height - 4}" text-anchor="end">{last:,.0f} updates</text>'
        f"{''.join(parts)}</svg>\n"
    )


def of_scales(folder: Path) -> str:
    """The gradient scale of every resblock over the run in `folder`; empty where it has none."""
    lines = [line for line in read_metrics(folder) if "log2_scales" in line]
    series = zip(*([(line["step"], scale) for scale in line["log2_scales"]] for line in lines), strict=True)
    drawn = shades(list(series), "first resblock", "last resblock")
    return svg(drawn, "Gradient scales, log₂", width=560, height=260)


def draw_scales(folder: Path) -> None:
    """Write `folder`/scales.svg, once there is something to draw."""
    if drawn := of_scales(folder):
        with replacing(folder / "scales.svg") as partial:
            partial.write_text(drawn, encoding="utf-8")
