"""What a trained run is worth, on one page: curves, reconstructions, drawings and verdicts."""

import base64
import html
import io
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dalle import __version__
from dalle.chart import curves, of_scales, svg
from dalle.checkpoint import read_json, refuse_unwritable, replacing, write_json
from dalle.console import Bar, say
from dalle.errors import ConfigError
from dalle.evaluate import AT_ONCE, SPLITS, TITLES, Drawing, Score, evaluate, interval
from dalle.metrics import read_metrics
from dalle.pipeline import TextToImage
from stage2_prior.sample import Sampling

SHOWN = 24  # drawings of every split on the page
FACTS = ("count", "shape", "colour", "size", "place", "relation", "background")


def judge_and_report(
    run: Path, prompts: int, command: str, out: Path, *, seed: int = 0, sampling: Sampling | None = None
) -> dict[str, Any]:
    """Draw and judge held-out prompts of the scenes; write report.html and report.json into `out`.

    Args:
        prompts: of every split.
        command: what to name as the way to get this report.

    Returns:
        What report.json holds.

    Raises:
        ConfigError: the run was trained on other data.
    """
    refuse_unwritable(out)
    model = TextToImage.load(run, at_once=AT_ONCE)
    if (data := read_json(run / "prior" / "config.json").get("data")) != "scenes":
        raise ConfigError(f"{run} was trained on {data}: only drawings of the built-in scenes can be judged")
    with Bar("drawing and judging", prompts * len(SPLITS), unit="pictures") as bar:
        scores = evaluate(model, prompts, seed=seed, sampling=sampling, on_drawn=bar.advance)
    figures = {
        "version": __version__,
        "command": command,
        "splits": {name: score.to_json() for name, score in scores.items()},
        "sampling": vars(model.resolve(sampling)) | {"seed": seed},
        "machine": machine(),
        "stages": {stage: _stage(run / stage) for stage in ("dvae", "prior")},
    }
    write_json(out / "report.json", figures)
    with replacing(out / "report.html") as partial:
        partial.write_text(page(figures, run, scores), encoding="utf-8")
    for name, score in scores.items():
        say(f"{TITLES[name]}: {score.right} of {len(score.drawings)} right")
    return figures


def machine() -> str:
    """The device that this ran on, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads, kind = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    return f"{threads} threads of a {platform.machine()} CPU, {kind}"


def _stage(folder: Path) -> dict[str, Any]:
    """How a stage was trained, as far as its folder knows: an imported or exported one has no metrics."""
    config = read_json(folder / "config.json")
    training = config.get("training", {})
    lines = read_metrics(folder)
    last = {k: v for line in lines for k, v in line.items() if k.startswith("heldout_")}
    return {
        "steps": lines[-1]["step"] if lines else config.get("steps", training.get("steps")),
        "seconds": round(sum(line.get("seconds", 0) for line in lines), 1),
        "batch_size": training.get("batch_size"),
        **last,
    }


def page(figures: Mapping[str, Any], run: Path, scores: Mapping[str, Score]) -> str:
    """The page, with everything it shows inside it."""
    stages = figures["stages"]
    parts = [
        f"<h1>{html.escape(figures['command'])}</h1>",
        f"<p class=quiet>{html.escape(figures['machine'])} · dalle {figures['version']}</p>",
        "<h2>Drawn right</h2>",
        f"<p>One drawing a prompt, {_settings(figures['sampling'])}. Training saw none of these pictures; "
        "a drawing is right when a program that reads pictures finds all that the prompt says, and nothing "
        "more.</p>",
        _table(scores),
        "<h2>Drawings</h2>",
        *(_gallery(name, score.drawings[:SHOWN]) for name, score in scores.items()),
        "<h2>Stage 1: pictures to codes</h2>",
        f"<p>{_timing(stages['dvae'])}</p><div class=charts>",
        _chart("Reconstruction of held-out pictures, dB", run / "dvae", ["heldout_psnr"]),
        _chart("Codes in use, as a perplexity", run / "dvae", ["codebook_perplexity"]),
        "</div>",
        _newest_picture(run / "dvae" / "pictures"),
        "<h2>Stage 2: text to codes</h2>",
        f"<p>{_timing(stages['prior'])}</p><div class=charts>",
        _chart("Image loss, nats per token", run / "prior", ["image_loss", "heldout_image_loss"]),
        _chart("Text loss, nats per token", run / "prior", ["text_loss", "heldout_text_loss"]),
        "</div>",
        of_scales(run / "prior"),
    ]
    head = f"<!doctype html><meta charset=utf-8><title>dalle report</title><style>{_STYLE}</style>"
    return f"{head}<main>{''.join(parts)}</main>\n"


def _settings(sampling: Mapping[str, Any]) -> str:
    cuts = [f"top-{name[-1]} {sampling[name]}" for name in ("top_k", "top_p") if sampling[name] is not None]
    chosen = [f"temperature {sampling['temperature']:g}", *cuts]
    if sampling["guidance"] != 1:
        chosen.append(f"guidance {sampling['guidance']:g}")
    return f"at {', '.join(chosen)}"


def _timing(stage: Mapping[str, Any]) -> str:
    if stage["steps"] is None:
        return "How it was trained is not known here."
    minutes = f" in {stage['seconds'] / 60:.1f} minutes" if stage["seconds"] else ""
    return f"{stage['steps']:,} updates of {stage['batch_size']} pictures{minutes}."


def _table(scores: Mapping[str, Score]) -> str:
    facts = [fact for fact in FACTS if any(fact in score.facts() for score in scores.values())]
    head = "".join(f"<th>{fact}" for fact in facts)
    rows = []
    for name, score in scores.items():
        asked = len(score.drawings)
        low, high = interval(score.right, asked)
        cells = []
        for fact in facts:
            of, right = score.facts().get(fact, (0, 0))
            cells.append(f"<td>{right / of:.0%}" if of else "<td>–")
        rows.append(
            f"<tr><td>{TITLES[name]}<td>{asked}<td><b>{score.right / asked:.0%}</b> "
            f"<span class=quiet>{low:.0%}–{high:.0%}</span>{''.join(cells)}"
        )
    return (
        f"<table><tr><th>prompts<th>number<th>entirely right, 95 % interval{head}{''.join(rows)}</table>"
        "<p class=quiet>The columns to the right count single facts, where a prompt states them.</p>"
    )


def _gallery(name: str, drawings: Sequence[Drawing]) -> str:
    figures = []
    for drawing in drawings:
        right = drawing.verdict.right
        said = "right" if right else "; ".join(drawing.verdict.reasons) or "wrong"
        figures.append(
            f"<figure class={'right' if right else 'wrong'}>{_image(drawing.picture)}"
            f"<figcaption>{html.escape(drawing.prompt)}<small>{html.escape(said)}</small></figcaption></figure>"
        )
    return f"<h3>{TITLES[name].capitalize()}</h3><div class=gallery>{''.join(figures)}</div>"


def _image(picture: Image.Image, kind: str = "") -> str:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img class="{kind}" src="data:image/png;base64,{data}">'


def _newest_picture(folder: Path) -> str:
    paths = sorted(folder.glob("step-*.png"))
    if not paths:
        return ""
    with Image.open(paths[-1]) as picture:
        shown = _image(picture, "wide")
    return f"<p>Held-out pictures; through relaxed codes; through hard codes.</p>{shown}"


def _chart(title: str, folder: Path, names: Sequence[str]) -> str:
    lines = read_metrics(folder)
    found = {
        name.replace("_", " "): [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        for name in names
    }
    drawn = svg(curves(found))
    return f"<figure class=chart>{drawn}<figcaption>{title}</figcaption></figure>" if drawn else ""


_STYLE = """
body{margin:0;background:#faf9f7;color:#222;font:16px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:auto;padding:2rem 1.5rem 4rem}
h1{font-size:1.7rem;margin:0}h2{margin:2.5rem 0 .5rem}h3{margin:1.5rem 0 .5rem;font-weight:600}
.quiet,small{color:#777}table{border-collapse:collapse;width:100%;font-size:.93rem}
th{text-align:left;font-weight:600;border-bottom:2px solid #ccc}td{border-bottom:1px solid #e4e2de}
th,td{padding:.35rem .6rem .35rem 0}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(118px,1fr));gap:14px}
figure{margin:0;font-size:.78rem;line-height:1.3}small{display:block}
.gallery img{width:100%;image-rendering:pixelated;display:block}
.gallery img{border-bottom:4px solid #c33;margin-bottom:4px}
.gallery .right img{border-color:#2a9d4a}.wide{width:100%;image-rendering:pixelated}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(380px,1fr));gap:1rem}
svg{width:100%}
"""
