"""The paper's prior, at a reduced depth, built partitioned under ZeRO-3: memory per process against theory.

    python benchmarks/zero_init.py --processes 4 --depth 1

Each process reports its peak resident memory beyond what Python, torch and DeepSpeed take before the model.
Computed: its share of the weights (DeepSpeed's and the fp32 ones that are updated, with their average), and
the largest parameter whole, three times: as drawn, scaled, and in its place.
"""

import argparse
import dataclasses
import json
import resource
import sys
import tempfile
from pathlib import Path

import torch

from dalle.distributed import joined
from dalle.launch import launch
from dalle.optim import full_shape, parameter_count
from dalle.wiring import build, make_engine
from stage2_prior.config import PRESETS
from stage2_prior.model import Prior

MB = 1e6


def peak() -> float:
    """MB of main memory, the most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB


def member(depth: int, out: Path) -> None:
    """One of the processes."""
    model_config, training = PRESETS["paper"]
    config = dataclasses.replace(training, zero=3, precision="fp32")
    with joined() as here:
        from dalle.zero import deepspeed

        deepspeed()
        before = peak()
        model = build(lambda: Prior(dataclasses.replace(model_config, depth=depth)), config)
        built = peak() - before
        numbers = parameter_count(model)
        largest = max(torch.Size(full_shape(p)).numel() for p in model.parameters())
        engine = make_engine(model, config, "fp32", variance_limit=config.variance_limit)
        ready = peak() - before
        share = 4 * numbers / here.world / MB
        found = here.gather({"built": built, "ready": ready})
        if here.main:
            facts = {
                "processes": here.world,
                "depth": depth,
                "parameters": numbers,
                "whole model, MB": 4 * numbers / MB,
                "computed to build, MB": share + 3 * 4 * largest / MB,
                "measured to build, MB": [round(each["built"]) for each in found],
                "computed with the engine, MB": 3 * share + 3 * 4 * largest / MB,
                "measured with the engine, MB": [round(each["ready"]) for each in found],
            }
            out.write_text(json.dumps(facts, indent=2))
        engine.close()  # type: ignore[attr-defined]
        del engine


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--member", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.member:
        member(asked.depth, asked.member)
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "facts.json"
        arguments = [__file__, "--depth", str(asked.depth), "--member", str(out)]
        status = launch(asked.processes, arguments, program=[sys.executable])
        if status:
            sys.exit(status)
        print(out.read_text())


if __name__ == "__main__":
    main()
