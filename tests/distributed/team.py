"""What the processes of test_stages run: small trainings of a prior, one after another."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import dalle.zero
from dalle.console import Stopwatch
from dalle.distributed import topology
from dalle.engine import Engine
from dalle.errors import CheckpointError, DalleError
from dalle.metrics import Window
from dalle.noise import keyed
from dalle.states import Saver
from dalle.training import LargeTraining, Session, resume, stream, update
from dalle.wiring import build, make_engine
from stage2_prior.config import PriorConfig
from stage2_prior.loss import losses
from stage2_prior.model import Prior
from tests.tiny import PRIOR_SHAPE

MODEL = PriorConfig(**PRIOR_SHAPE, code_channels=5)
BATCH, STEPS = 8, 4
STAGES = (0, 1, 2, 3)
COURSES = tuple((parts, precision) for parts in (1, 2) for precision in ("fp32", "bf16", "fp16"))
SICK, SICK_STEP = "layers.1.mlp", 2  # where and when an infinity is planted


def settings(**changes: Any) -> LargeTraining:
    values = {
        "steps": STEPS, "batch_size": BATCH, "lr": 1e-2, "beta1": 0.9, "beta2": 0.96, "weight_decay": 0.1,
        "clip": 0.2, "ema_decay": 0.9, "ema_every": 1, "seed": 3, "workers": 0, "precision": "fp32",
    }  # fmt: skip
    return LargeTraining(**(values | changes))


class Samples:
    """A loader of random tokens and codes; the sample at a position is a function of that alone."""

    def __init__(self, size: int) -> None:
        self.size = size

    def batches(self, start: int, stride: int) -> Iterator[tuple[Tensor, ...]]:
        while True:
            places = range(start, start + stride * self.size, stride)
            start = places.stop
            yield tuple(torch.stack(column) for column in zip(*map(self.sample, places), strict=True))

    def sample(self, place: int) -> tuple[Tensor, Tensor]:
        random, shape = keyed(torch.device("cpu"), 7, place), PRIOR_SHAPE
        tokens = torch.randint(shape["text_vocab"], (shape["text_length"] - 1,), generator=random)
        tokens[place % 5 :] = -1  # captions of different lengths, some of them empty
        return tokens, torch.randint(shape["image_vocab"], (shape["grid"] ** 2,), generator=random)


class Toy:
    """A prior on random data."""

    label, tokens_per_picture, flops_per_picture = "toy", 1, 1

    def __init__(self, model: Prior, sick: bool, config: LargeTraining) -> None:
        self.model, self.sick, self.config = model, sick, config
        self.last = math.nan

    def begin(self, batches: Any, run: Any) -> None:
        words = topology().sum(torch.stack([(tokens >= 0).sum() for tokens, _ in batches]).sum())
        self.words = int(words) / (len(batches) * topology().world)

    def loss(self, batch: Any, step: int, positions: range) -> tuple[Tensor, dict[str, Tensor]]:
        here = topology()
        with self.poisoned(self.sick and step == SICK_STEP and here.rank == here.world - 1):
            text, image = losses(self.model, *batch, self.words)
        return text / 8 + image * 7 / 8, {}

    @contextmanager
    def poisoned(self, now: bool) -> Iterator[None]:
        """The gradient of one resblock's branch becomes infinite."""
        if not now:
            yield
            return

        def plant(_module: Any, _inputs: Any, output: Tensor) -> None:
            output.register_hook(lambda grad: grad * math.inf)

        hook = self.model.get_submodule(f"{SICK}.down").register_forward_hook(plant)
        try:
            yield
        finally:
            hook.remove()

    def lr(self, step: int) -> float:
        return 1e-2

    def after(self, loss: float) -> None:
        self.last = loss

    def evaluate(self, step: int) -> dict[str, float]:
        samples = Samples(4)
        with torch.no_grad():
            text, image = losses(self.model, *next(samples.batches(1 << 30, 1)))
        return {"heldout": float(text + image)}

    def state(self) -> dict[str, Any]:
        return {"last": self.last}

    def load(self, state: dict[str, Any]) -> None:
        self.last = state["last"]


@contextmanager
def nothing_kept() -> Iterator[None]:
    """Stage 3 partitions even the smallest parameter, and lets go of each as soon as its layer has run.

    Otherwise it keeps parameters below 100,000 numbers whole, and what it has use for again soon: all here.
    """
    real = dalle.zero.settings
    nothing = (
        "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size",
        "stage3_max_live_parameters", "stage3_max_reuse_distance",
    )  # fmt: skip

    def settings(*arguments: Any) -> dict[str, Any]:
        found = real(*arguments)
        found["zero_optimization"] |= dict.fromkeys(nothing, 0)
        return found

    with patch("dalle.zero.settings", settings):
        yield


def session(folder: Path = Path(), *, sick: bool = False, **changes: Any) -> Session:
    config = settings(**changes)
    with nothing_kept():
        model = build(lambda: Prior(MODEL), config)
        model.recompute = config.zero == 3
        engine = make_engine(model, config, config.precision, variance_limit=5.0, matrices=model.matrices())
    size = config.pictures_at_once(topology().world)
    return Session(Toy(model, sick, config), engine, Samples(size), folder, topology())


def train(one: Session, start: int, stop: int) -> list[dict[str, Any]]:
    """The metrics of updates `start` to `stop`."""
    window, batches = Window(1, Stopwatch(), flops_per_picture=1, ceiling=1.0), stream(one, start)
    found = []
    for step in range(start, stop):
        metrics = update(one, batches, step, window)
        found.append({**metrics, **one.engine.per_resblock()})
    return found


def finish(one: Session) -> None:
    if hasattr(one.engine, "close"):
        one.engine.close()


def whole(engine: Engine) -> dict[str, Tensor]:
    """All that the engine saves; of use in process 0."""
    files = engine.state()
    return {
        f"{f}:{n}": topology().assemble(part).clone()
        for f, group in files.items()
        for n, part in group.items()
    }


def evaluate(one: Session) -> float:
    with one.engine.averaged():
        return one.engine.run(one.task.evaluate, 0)["heldout"]


def curve(**changes: Any) -> dict[str, Any]:
    """One training: losses, norms, scales, and the held-out loss of its averaged weights."""
    one = session(**changes)
    metrics = train(one, 0, STEPS)
    result = {
        name: [line.get(name) for line in metrics]
        for name in ("loss", "grad_norm", "dropped_updates", "log2_scales", "overflows")
    }
    result["heldout"] = evaluate(one)
    result["after"] = train(one, STEPS, STEPS + 1)[0]["loss"]  # the trained weights are back
    finish(one)
    return result


def key(zero: int, micro_batches: int, precision: str) -> str:
    return f"zero {zero}, {micro_batches} micro-batches, {precision}"


def matrix() -> dict[str, Any]:
    """Every stage with each number of micro-batches in each precision."""
    world = topology().world
    return {
        key(zero, parts, precision): curve(
            zero=zero, micro_batch=BATCH // world // parts, precision=precision
        )
        for zero in STAGES
        for parts, precision in COURSES
    }


def sick() -> dict[str, Any]:
    """An infinity planted in one process, at every stage."""
    return {str(zero): curve(zero=zero, precision="fp16", sick=True) for zero in STAGES}


def offloaded() -> dict[str, Any]:
    """The optimizer in main memory."""
    return {str(zero): curve(zero=zero, offload="cpu") for zero in (1, 2, 3)}


def muon() -> dict[str, Any]:
    """Matrices that are orthogonalised whole, wherever their parts are."""
    return {str(zero): curve(zero=zero, optimizer="muon") for zero in STAGES}


def born() -> dict[str, Any]:
    """At every stage, which of the weights at the start differ from those of one process."""
    result = {}
    for zero in STAGES:
        one = session(zero=zero)
        tensors = whole(one.engine)
        finish(one)
        torch.manual_seed(one.config.seed)
        alone = Prior(MODEL).state_dict()
        result[str(zero)] = [
            name for name, p in alone.items()
            if topology().main and not torch.equal(tensors[f"weights:{name}"], p)
        ]  # fmt: skip
    return result


def alike() -> list[list[float]]:
    """Sums of the weights and their averages in each process, where each began with others."""
    one = session(seed=3 + topology().rank, zero=0)
    tensors = (*one.engine.parameters, *one.engine.average.weights)
    return topology().gather([tensor.detach().double().sum().item() for tensor in tensors])


class Nothing:
    """A training state of another model."""

    def names(self, file: str) -> set[str]:
        return set()

    def read(self, file: str, name: str) -> Tensor:
        raise CheckpointError(f"holds no {name}")


def refused() -> dict[str, list[str]]:
    """At every stage: what is said of another model's state, and by each process of an infinity in one."""
    result = {}
    for zero in STAGES:
        one, said = session(zero=zero), []
        try:
            one.engine.load(Nothing())
        except CheckpointError as error:
            said.append(str(error))
        finish(one)
        one = session(zero=zero, sick=True)
        try:
            with patch("dalle.engine.PATIENCE", 1):
                train(one, 0, SICK_STEP + 1)
        except DalleError as error:
            said += topology().gather(str(error))
        finish(one)
        result[str(zero)] = said
    return result


def halved() -> dict[str, Any]:
    """Weights in fp16, rounded at random: the course, and sums of the weights in each process after it."""
    with patch("dalle.packed.SMALL", 1):
        one = session(zero=0, precision="fp16", moments="16bit", weights="fp16")
    losses = [line["loss"] for line in train(one, 0, STEPS)]
    held = [p for p in one.engine.parameters if p.dtype == torch.float16]
    sums = topology().gather([p.detach().double().sum().item() for p in one.engine.parameters])
    return {"loss": losses, "halved": len(held), "sums": sums}


def gathered() -> list[list[str]]:
    """Which layers are whole whenever one of them runs, in an update of stage 3.

    It is the third one: DeepSpeed lets go of everything while it still watches what is used when.
    """
    one = session(zero=3)
    train(one, 0, 2)
    found = []

    def look(_module: Any, _inputs: Any) -> None:
        names = (name for name, p in one.task.model.named_parameters() if p.ds_status.name == "AVAILABLE")
        found.append(sorted({".".join(name.split(".")[:2]) for name in names if name.startswith("layers.")}))

    for layer in one.task.model.layers:
        layer.mlp.down.register_forward_pre_hook(look)
    train(one, 2, 3)
    finish(one)
    return found


def relay_with_muon(folder: str) -> dict[str, Any]:
    """The same with mean gradients of matrices."""
    return relay(folder, optimizer="muon")


def relay(folder: str, **changes: Any) -> dict[str, Any]:
    """From stage to stage by way of the disk: losses, and what is not the same after loading."""
    found: list[float] = []
    before: dict[str, Tensor] = {}
    differ = {}
    for turn, zero in enumerate((2, 0, 3, 1, 3)):
        one = session(Path(folder), zero=zero, precision="fp16", **changes)
        start = resume(one)
        assert start == 2 * turn
        if turn:
            now = whole(one.engine)
            differ[f"turn {turn}, into {zero}"] = [
                n for n, t in before.items() if topology().main and not torch.equal(t, now[n])
            ]
            assert one.task.last == found[-1]
        found += [line["loss"] for line in train(one, start, start + 2)]
        saver = Saver(Path(folder), 2, topology())
        saver.save(start + 2, one.engine.state(), {"task": one.task.state()})
        before = whole(one.engine)
        train(one, start + 2, start + 3)  # while it is being written
        saver.wait()
        topology().barrier()
        finish(one)
    return {"losses": found, "differ": differ}
