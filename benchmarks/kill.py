"""kill −9 of one process of a run, at random moments: nothing is lost but the steps since the last save.

    python benchmarks/kill.py --kills 20 --processes 2

Trains a tiny prior that saves after every update, kills one of its processes at a random moment, and looks
at what is left: how soon the run ended, whether its newest state is whole, and how many updates were lost.
Then the same command goes on, at another ZeRO stage. Many kills fall into the writing of a state.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from dalle.launch import DALLE
from dalle.metrics import read_metrics
from dalle.states import newest_state, newest_step

SMALL = "workers=0 eval_pictures=3 batch_size=4 precision=fp32 save_every=1 log_every=1 eval_every=100000"
DVAE = "image_size=16 hidden=12 codebook_width=12 blocks_per_group=1 patch=4 vocab_size=16"
PRIOR = "width=12 heads=3 depth=3 text_length=29 bpe_vocab=290 bpe_captions=50"


def command(kind: str, run: Path, steps: int, settings: str, *more: str) -> list[str]:
    """A training command."""
    chosen = [part for text in f"{SMALL} {settings}".split() for part in ("--set", text)]
    return [*DALLE, kind, "--preset", "tiny", "--run", str(run), "--steps", str(steps), *chosen, *more]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    moments = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        states = run / "prior" / "state"
        subprocess.run(command("train-dvae", run, 2, DVAE), check=True, stderr=subprocess.DEVNULL)
        seconds, lost, writing = [], [], 0
        for kill in range(asked.kills):
            several = ("--processes", str(asked.processes), "--zero", str((2, 3, 1, 0)[kill % 4]))
            log = Path(name) / "log"
            with log.open("wb") as file:
                dalle = subprocess.Popen(
                    command("train-prior", run, 100_000, PRIOR, *several), stdout=file, stderr=file
                )
            begun = newest_step(states)
            while newest_step(states) < begun + 2:
                assert dalle.poll() is None, log.read_text()
                time.sleep(0.01)
            time.sleep(moments.random() * 1.5)
            children = Path(f"/proc/{dalle.pid}/task/{dalle.pid}/children").read_text().split()
            writing += any(states.glob("*.partial"))
            os.kill(int(children[moments.randrange(asked.processes)]), signal.SIGKILL)
            killed = time.monotonic()
            status = dalle.wait(120)
            seconds.append(time.monotonic() - killed)
            found, refused = newest_state(states)
            trained = max(line["step"] for line in read_metrics(run / "prior"))
            assert status == 1, log.read_text()
            assert not refused, refused
            assert found is not None
            assert "was killed (SIGKILL)" in log.read_text(), log.read_text()
            lost.append(trained - found.values["step"])
            left = [pid for pid in children if Path(f"/proc/{pid}").exists()]
            assert not left, f"still there: {left}"
            print(
                f"kill {kill + 1}: ZeRO {several[-1]}, step {trained}, ended in {seconds[-1]:.2f} s, "
                f"updates lost {lost[-1]}",
                flush=True,
            )
        facts = {
            "kills": asked.kills,
            "processes": asked.processes,
            "seconds to the end, most": round(max(seconds), 2),
            "updates lost, most": max(lost),
            "kills while a state was being written": writing,
            "states refused": 0,
        }
        print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
