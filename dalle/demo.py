"""The whole road on the built-in scenes within a given time: train both stages, draw, judge, report."""

import math
import time
from pathlib import Path

from dalle.checkpoint import read_json, write_json
from dalle.console import duration, say
from dalle.errors import ConfigError
from dalle.pipeline import codec_of
from dalle.report import judge_and_report
from dalle.runs import Options
from dalle.states import newest_step
from dalle.training import REFIT
from stage1_dvae.train import train as train_dvae
from stage2_prior.train import train as train_prior

PRESET, DATA = "tiny", "scenes"
PROMPTS = 100  # of every split
DVAE_SHARE = 0.05  # of the time, clustering apart: what follows it changes little (docs/log.md)
JUDGING_SHARE = 0.05  # for drawing and judging; the prior has what is left
PRIOR_SHARE = 0.85  # at most, where a demo goes on that was stopped after its first stage
EVALUATIONS = {"dvae": 50, "prior": 250}  # updates between two of them


def demo(run: Path, minutes: float) -> bool:
    """Run the road in `run`, or what is left of it; True when the report is written.

    How many updates each stage makes is fitted to this machine while it trains. A stage that was stopped
    goes on to the number that it had then.

    Raises:
        ConfigError: less than a minute, or there is a demo of other minutes or a run that is none.
    """
    if not math.isfinite(minutes):
        raise ConfigError(f"minutes={minutes:g} is no time to train for; give at least 1")
    if minutes < 1:
        raise ConfigError(f"minutes={minutes:g} is too short to see anything learned; give at least 1")
    _same_demo(run / "demo.json", minutes)
    deadline = time.monotonic() + (1 - JUDGING_SHARE) * 60 * minutes
    say(f"demo: about {duration(60 * minutes)}, in {run}; a stop loses nothing, the same command goes on")

    if not train_dvae(_options(run, "dvae", DVAE_SHARE * minutes)):
        return False
    left = (deadline - time.monotonic()) / 60
    options = _options(run, "prior", min(left, PRIOR_SHARE * minutes))
    if not train_prior(options, codec_of(run), preset=PRESET, data=DATA):
        return False
    judge_and_report(run, PROMPTS, f"dalle demo --minutes {minutes:g}", run)
    return True


def _same_demo(path: Path, minutes: float) -> None:
    if not path.exists():
        if any((path.parent / stage / "config.json").exists() for stage in ("dvae", "prior")):
            raise ConfigError(
                f"{path.parent} holds a training that was not begun as a demo: use another --run"
            )
        write_json(path, {"minutes": minutes})
    elif (before := read_json(path).get("minutes")) != minutes:
        raise ConfigError(
            f"{path.parent} was begun with --minutes {before}, not {minutes:g}: keep it, or use another --run"
        )


def _options(run: Path, stage: str, minutes: float) -> Options:
    """What to tell the training command: to end in time, unless the stage has saved how far it is to go."""
    if made := newest_step(run / stage / "state"):
        steps = read_json(run / stage / "config.json").get("training", {}).get("steps", 0)
        fitted = made >= min(REFIT, steps)  # else the number of steps is still the preset's guess
        return Options(run, minutes=None if fitted else minutes)
    every = EVALUATIONS[stage]
    settings = (f"eval_every={every}", f"save_every={every}")
    return Options(run, DATA, PRESET, settings=settings, minutes=max(minutes, 1 / 60))
