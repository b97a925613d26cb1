"""The whole road on the built-in scenes within a given time: train both stages, draw, judge, report."""

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from dalle.checkpoint import read_json, write_json
from dalle.console import console, duration, say
from dalle.errors import ConfigError
from dalle.metrics import read_metrics
from dalle.pipeline import codes_of
from dalle.report import judge_and_report
from dalle.runs import Options
from stage1_dvae.train import train as train_dvae
from stage2_prior.train import train as train_prior

PRESET, DATA = "tiny", "scenes"
PROMPTS = 100  # of every split
DVAE_SHARE, PRIOR_SHARE = 0.1, 0.76  # of the time; the rest is for measuring, clustering, drawing, judging
# Updates that measure the speed, in quarters, of which the second fastest counts: what else runs on a machine
# slows some of them down, and no machine stays at its best for ten minutes.
TRIAL = 40


def demo(run: Path, minutes: float) -> bool:
    """Run the road in `run`, or what is left of it; True when the report is written.

    How many updates each stage makes is fitted to this machine when the stage begins, and kept from then
    on: a demo that was stopped goes on where it was.

    Raises:
        ConfigError: less than a minute, or a demo of other minutes was begun there.
    """
    if not math.isfinite(minutes):
        raise ConfigError(f"minutes={minutes:g} is no time to train for; give at least 1")
    if minutes < 1:
        raise ConfigError(f"minutes={minutes:g} is too short to see anything learned; give at least 1")
    _same_demo(run / "demo.json", minutes)
    say(f"demo: about {duration(60 * minutes)}, in {run}; a stop loses nothing, the same command goes on")

    # Clustering takes longer than a trial, and an update is as fast without it.
    options = _options(
        run, "dvae", DVAE_SHARE * 60 * minutes, lambda trial: train_dvae(_with(trial, "start=random"))
    )
    if not train_dvae(options):
        return False

    codes = codes_of(run)

    def prior(options: Options) -> bool:
        return train_prior(options, codes, preset=PRESET, data=DATA)

    if not prior(_options(run, "prior", PRIOR_SHARE * 60 * minutes, prior)):
        return False
    judge_and_report(run, PROMPTS, f"dalle demo --minutes {minutes:g}", run)
    return True


def _same_demo(path: Path, minutes: float) -> None:
    if not path.exists():
        write_json(path, {"minutes": minutes})
    elif (before := read_json(path).get("minutes")) != minutes:
        raise ConfigError(
            f"{path.parent} was begun with --minutes {before}, not {minutes:g}: keep it, or use another --run"
        )


def _options(run: Path, stage: str, seconds: float, train: Callable[[Options], bool]) -> Options:
    """What to tell the training command: as many updates as fit, unless the stage was begun before."""
    if (run / stage / "config.json").exists():
        return Options(run)
    pictures_per_second, batch_size = _measure(stage, train)
    steps = max(TRIAL, round(seconds * pictures_per_second / batch_size))
    say(f"demo: {pictures_per_second:,.0f} pictures/s, so the {stage} gets {steps:,} updates of {batch_size}")
    every = max(1, steps // 8)
    return _with(Options(run, DATA, PRESET, steps), f"eval_every={every}", f"save_every={every}")


def _measure(stage: str, train: Callable[[Options], bool]) -> tuple[float, int]:
    """Pictures a second of the training itself, and its batch size: a short run that is thrown away."""
    say(f"demo: measuring how fast this machine trains the {stage}")
    with tempfile.TemporaryDirectory() as folder, _quietly():
        trial = Options(Path(folder), DATA, PRESET, TRIAL)
        train(_with(trial, f"log_every={TRIAL // 4}", "eval_pictures=1"))
        rates = [line["pictures_per_second"] for line in read_metrics(trial.run / stage) if "loss" in line]
        return sorted(rates)[-2], read_json(trial.run / stage / "config.json")["training"]["batch_size"]


def _with(options: Options, *settings: str) -> Options:
    return replace(options, settings=(*options.settings, *settings))


@contextmanager
def _quietly() -> Iterator[None]:
    console.quiet = True
    try:
        yield
    finally:
        console.quiet = False
