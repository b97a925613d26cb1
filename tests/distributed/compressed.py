"""What the processes of test_compressed run: small priors whose gradients are compressed between machines."""

import math
from pathlib import Path
from typing import Any

import torch

from dalle.distributed import topology
from dalle.errors import DalleError
from dalle.optim import full_shape
from dalle.states import Saver
from dalle.training import LargeTraining, Session, resume
from dalle.wiring import build, make_engine
from stage2_prior.config import PriorConfig
from stage2_prior.model import Prior
from tests.distributed.team import Samples, Toy, finish, nothing_kept, train
from tests.tiny import PRIOR_SHAPE

BATCH, STEPS, RANK = 8, 6, 4
STAGES = (0, 1, 2, 3)
SOME = (0, 2)  # stages at which factors in fp32 are tried: their format does not depend on it
KINDS: dict[str, dict[str, Any]] = {
    "compressed": {},
    "full": {"compression_start": STEPS},
    "packed": {"moments": "16bit"},
    "fp32": {"compression_format": "fp32"},
}
CASES = [(kind, zero) for kind in ("compressed", "full", "packed") for zero in STAGES] + [
    ("fp32", zero) for zero in SOME
]
SHAPE = PRIOR_SHAPE | {"width": 48, "heads": 4}


def settings(**changes: Any) -> LargeTraining:
    values = {
        "steps": STEPS, "batch_size": BATCH, "lr": 1e-2, "beta1": 0.9, "beta2": 0.96, "weight_decay": 0.1,
        "clip": 0.2, "ema_decay": 0.9, "ema_every": 1, "seed": 3, "workers": 0, "precision": "fp32",
        "compression_rank": RANK, "compression_start": 1, "compression_sample": 3,
    }  # fmt: skip
    return LargeTraining(**(values | changes))


def session(folder: Path = Path(), **changes: Any) -> Session:
    config = settings(**changes)
    with nothing_kept():
        model = build(lambda: Prior(PriorConfig(**SHAPE)), config)
        model.recompute = config.zero == 3
        engine = make_engine(model, config, "fp32", variance_limit=5.0, matrices=model.matrices())
    size = config.pictures_at_once(topology().world)
    return Session(Toy(model, False, config), engine, Samples(size), folder, topology())


def course(one: Session, start: int, stop: int) -> dict[str, list[float]]:
    lines = train(one, start, stop)
    names = ("loss", "grad_norm", "between_bytes", "between_saved", "between_cosine", "between_plain_seconds")
    return {name: [line.get(name) for line in lines] for name in names}


def stages() -> dict[str, Any]:
    """A short training at every stage: compressed, with all averaged in full, and with 16-bit moments."""
    result: dict[str, Any] = {}
    for zero in STAGES:
        for name, changes in KINDS.items():
            if name == "fp32" and zero not in SOME:
                continue
            one = session(zero=zero, **changes)
            result[f"{name} {zero}"] = {**course(one, 0, STEPS), "same": same(one), "bytes": formula(one)}
            if name == "packed":
                held = one.engine.state()["moments"]["layers.0.mlp.up.weight/exp_avg"]
                result[f"{name} {zero}"]["moments"] = str(held.values.dtype)
            finish(one)
    return result


def alike() -> dict[str, bool]:
    """Whether machines that would begin with weights of their own hold the same ones, averages too."""
    result = {}
    for zero in STAGES:
        one = session(zero=zero, seed=3 + topology().rank // topology().local_world)
        wire = one.engine.compression.wire
        result[str(zero)] = wire.same(one.engine._own_weights()) and wire.same(one.engine.average.weights)
        finish(one)
    return result


def same(one: Session) -> bool:
    """Whether a save would find the machines alike; and it must find a change of one bit on one of them."""
    weights = one.engine._own_weights()
    one.engine._compare_machines()
    last = topology().rank == topology().world - 1
    bits = weights[0].detach().view(-1).view(torch.int32)
    if last:
        bits[0] ^= 1
    try:
        one.engine._compare_machines()
    except DalleError as error:
        return "no longer hold the same weights" in str(error)
    finally:
        if last:
            bits[0] ^= 1
    return False


def formula(one: Session) -> float:
    """What process 0 sends in an update by the formula: r·(rows + columns) for the rows that it holds."""
    total = 0
    for name, p in one.engine.named.items():
        offset, numel = one.engine._share_of(name)
        shape = full_shape(p)
        columns = shape[-1]
        first, last = math.ceil(offset / columns), (offset + numel) // columns
        total += 4 * numel
        if not name.startswith("layers.") or len(shape) < 2:
            continue
        height = shape[0] // 3 if "qkv" in name else shape[0]  # q, k and v lie below one another
        for top in range(0, shape[0], height):
            rows = max(0, min(last, top + height) - max(first, top))
            rank = min(rows, columns, max(1, round(RANK * rows / height)))
            factors = rank * (rows + columns)
            if factors < rows * columns:
                width = 2 if one.config.compression_format == "16bit" else 4
                total += width * factors - 4 * rows * columns
    return total


def leg(folder: str, zero: str, steps: str, kind: str) -> dict[str, Any]:
    """Some updates from the state in the folder on, saved there again."""
    one = session(Path(folder), zero=int(zero), **KINDS[kind])
    start = resume(one)
    stop = start + int(steps)
    found = course(one, start, stop)
    state = one.engine.state()
    errors = state.get("errors")  # one machine has none
    found["machines"] = [int(errors["machines"].values) if errors else 1] if topology().main else []
    saver = Saver(Path(folder), 2, topology())
    saver.save(stop, state, {"task": one.task.state()})
    saver.wait()
    topology().barrier()
    finish(one)
    return found
