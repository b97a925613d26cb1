"""The training loop of both stages."""

import shutil
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import MISSING, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from dalle.budget import Budget, record
from dalle.ceiling import gemm_rate
from dalle.chart import draw_scales
from dalle.checkpoint import read_json, replacing, sha256
from dalle.config import require, setting
from dalle.console import Bar, Stopwatch, duration, say, warn
from dalle.data.loader import Loader
from dalle.distributed import Topology
from dalle.engine import Engine
from dalle.errors import CheckpointError, ConfigError
from dalle.metrics import MetricsLog, Window, read_metrics
from dalle.precision import Precision
from dalle.process import only_process, stop_signals
from dalle.states import STATE, Saver, SharedState, newest_state


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a run trains, saved with it. The stages add their own fields."""

    steps: int = setting(MISSING, "updates in all")
    batch_size: int = setting(MISSING, "pictures per update, over all processes")
    micro_batch: int = setting(0, "pictures per forward pass of a process, at most; 0: its whole share")
    lr: float = setting(MISSING, "peak step size")
    beta1: float = setting(MISSING, "AdamW's decay of the mean")
    beta2: float = setting(MISSING, "AdamW's decay of the variance")
    weight_decay: float = setting(MISSING, "AdamW's weight decay")
    clip: float | None = setting(MISSING, "largest norm of the gradient; none: no limit")
    ema_decay: float = setting(MISSING, "decay of the averaged weights at each copy")
    ema_every: int = setting(MISSING, "updates between two copies into the average")
    precision: Precision = setting(  # noqa: RUF009 (a field, which ruff cannot see here)
        "auto",
        "fp32, bf16, fp16 (stage 2 only), or auto: what this device is faster in",
        paper="fp16 (App. D)",
    )
    seed: int = setting(0, "decides the weights at the start, the order of the data and all noise")
    heldout: float = setting(0.02, "share of the data kept for evaluation where it names no split")
    workers: int = setting(1, "processes that read ahead for each one that trains; 0: it reads by itself")
    zero: int = setting(
        1,
        "what several processes partition: 1 the moments, 2 gradients too, 3 weights too; 0 nothing",
        paper="3 within each machine (App. E)",
    )
    offload: Literal["none", "cpu"] = setting(
        "none", "cpu: with ZeRO 1 to 3, moments and fp32 weights are kept and updated in main memory"
    )
    log_every: int = setting(10, "updates between two lines of metrics.jsonl")
    eval_every: int = setting(500, "updates between two evaluations on held-out data")
    eval_pictures: int = setting(256, "held-out pictures per evaluation")
    save_every: int = setting(500, "updates between two saved training states")
    keep: int = setting(2, "training states kept")
    tensorboard: bool = setting(False, "also write TensorBoard files")

    def __post_init__(self) -> None:
        counts = ("batch_size", "log_every", "eval_every", "eval_pictures", "save_every", "keep", "ema_every")
        require(self, "be at least 1", lambda v: v >= 1, *counts)
        not_negative = ("steps", "micro_batch", "workers", "seed", "weight_decay")
        require(self, "not be negative", lambda v: v >= 0, *not_negative)
        require(self, "be below 2**63", lambda v: v < 2**63, "seed")
        shares = ("heldout", "beta1", "beta2", "ema_decay")
        require(self, "be at least 0 and below 1", lambda v: 0 <= v < 1, *shares)
        require(self, "be above 0", lambda v: v > 0, "lr")
        require(self, "be above 0; clip=none sets no limit", lambda v: v is None or v > 0, "clip")
        require(self, "be 0, 1, 2 or 3", lambda v: v in range(4), "zero")

    def micro_batches(self, processes: int) -> int:
        """Forward passes of each process per update: as few as `micro_batch` allows.

        Raises:
            ConfigError: the batch cannot be shared equally.
        """
        share, rest = divmod(self.batch_size, processes)
        if rest:
            raise ConfigError(
                f"batch_size={self.batch_size} is that of all {processes} processes: it must be a multiple "
                "of their number"
            )
        largest = self.micro_batch or share
        return next(n for n in range(1, share + 1) if share % n == 0 and share // n <= largest)

    def pictures_at_once(self, processes: int) -> int:
        """Pictures in a forward pass of each process; see `micro_batches`."""
        return self.batch_size // processes // self.micro_batches(processes)


@dataclass(frozen=True, kw_only=True)
class LargeTraining(Training):
    """What the prior can be trained with besides: Muon, and what the paper does for models of its size."""

    optimizer: Literal["adamw", "muon"] = setting(
        "adamw",
        "of the resblocks' matrices; muon: steps along their orthogonalised momentum, for small models",
        paper="AdamW",
    )
    muon_lr: float = setting(0.01, "peak step size of the matrices with optimizer=muon", paper="no muon")
    moments: Literal["fp32", "16bit"] = setting(
        "fp32",
        "AdamW's moments of the resblocks' matrices: fp32, or 1-6-9 and 0-6-10 in half the memory",
        paper="16 bit (App. D)",
    )
    weights: Literal["fp32", "fp16"] = setting(
        "fp32",
        "the resblocks' matrices: fp32, or fp16 rounded at random (with moments=16bit 2+2+2 bytes, zero=0)",
        paper="fp16 (App. D)",
    )
    compression_rank: int = setting(
        0,
        "total rank of the gradients that machines exchange (PowerSGD); 0: in full",
        paper="896 (App. E.1)",
    )
    compression_start: int = setting(
        200, "updates at the beginning whose gradients are averaged in full", paper="not stated"
    )
    compression_format: Literal["16bit", "fp32"] = setting(
        "16bit", "how the factors are sent and the error sums held", paper="1-6-9 (App. D)"
    )
    compression_sample: int = setting(
        100, "updates between two comparisons with a plain mean; 0: none", paper="not stated"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        compression = ("compression_rank", "compression_start", "compression_sample")
        require(self, "not be negative", lambda v: v >= 0, *compression)
        require(self, "be above 0", lambda v: v > 0, "muon_lr")
        if self.optimizer == "muon" and self.moments != "fp32":
            raise ConfigError("optimizer=muon has no variances to pack: leave moments=fp32")
        if self.weights == "fp16" and (self.moments != "16bit" or self.precision != "fp16"):
            raise ConfigError(
                "weights=fp16 leaves no fp32 weights to compute with or to update: "
                "it needs precision=fp16 and moments=16bit"
            )


SETTLED = 10  # updates after which the time left is worth saying
STARVED = 0.5  # share of the time that training waits for data from which it is worth a warning
REFIT = 10  # updates between two looks at the time left, where a run is to end in time

# What may differ between a run and its continuation without making it another run.
CHANGEABLE = {
    "steps", "workers", "log_every", "eval_every", "eval_pictures", "save_every", "keep", "tensorboard",
    "attention", "guidance", "top_p", "micro_batch", "recompute", "zero", "offload",
}  # fmt: skip

Batch: TypeAlias = tuple[Tensor, ...]


@runtime_checkable
class Task(Protocol):
    """What a stage tells the loop. `step` counts the updates made before."""

    config: Any  # the stage's Training; the loop replaces it where a run is to end in time
    label: str
    tokens_per_picture: int
    flops_per_picture: int  # of the matrix products of a forward and a backward pass

    def begin(self, batches: Sequence[Batch], run: Callable[..., Any]) -> None:
        """Look at all micro-batches of this process before an update: what their losses have in common.

        A function that runs the model is called through `run`.
        """

    def loss(self, batch: Batch, step: int, positions: range) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise for one micro-batch, and metrics to log with it.

        The mean over the micro-batches of all processes must not depend on how the batch is divided.
        `positions` are the places of the samples in the stream of the data; noise is keyed by them.
        """

    def lr(self, step: int) -> float:
        """The step size of this update."""

    def after(self, loss: float) -> None:
        """Take note of an update's training loss."""

    def evaluate(self, step: int) -> dict[str, float]:
        """Measure and draw on held-out data; the model holds its averaged weights.

        What it measures is named `heldout_…`. Every process does, and comes to the same; only the first one
        writes.
        """

    def state(self) -> dict[str, Any]:
        """JSON values that resuming needs beyond the engine's tensors."""

    def load(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""


class Session(NamedTuple):
    """All that trains one stage of a run."""

    task: Task
    engine: Engine
    loader: Loader
    folder: Path
    topology: Topology
    budget: Budget | None = None
    write_config: Callable[[], None] = lambda: None  # how the stage trains, into its folder

    @property
    def config(self) -> Training:
        """How the run trains."""
        training: Training = self.task.config
        return training

    @property
    def micro_batches(self) -> int:
        """Forward passes of this process per update."""
        return self.config.micro_batches(self.topology.world)


def alone(folder: Path, here: Topology) -> AbstractContextManager[None]:
    """Hold a stage's folder for this run, from before its config.json is read or written until it is trained.

    Raises:
        CheckpointError: another process trains there, or the folder cannot be written or locked.
    """
    return only_process(folder) if here.main else nullcontext()


def fit(session: Session) -> bool:
    """Train until `config.steps` updates are made; go on from the newest state in the folder.

    Logs, saves and evaluates on the way and at the end. Ctrl-C and SIGTERM save first. With a budget the
    number of updates follows the time that is left.

    Returns:
        True when all steps are made, False when a signal stopped it before.

    Raises:
        CheckpointError: states exist but none is whole, or saving failed.
    """
    task, engine, loader, folder, topology, budget, write_config = session
    with stop_signals() as stopped:
        if topology.main:
            write_config()
        step, config = resume(session), session.config
        if topology.main:
            _restore_weights(folder, step)
        owed = _owes_an_evaluation(session, step)
        if step >= config.steps and budget is None and not owed:
            say(f"{task.label}: {folder} has its {step:,} steps already; a larger --steps trains on")
            return True
        if budget:
            config = task.config = budget.fitted(max(config.steps, step + REFIT))
        log = MetricsLog(folder, step, config.tensorboard) if topology.main else None
        clock, saver = Stopwatch(), Saver(folder, config.keep, topology)
        ceiling = topology.world * gemm_rate(engine.device, engine.precision)
        window = Window(task.tokens_per_picture, clock, task.flops_per_picture, ceiling)
        bar = Bar(task.label, config.steps, step, clock)
        # The readers end before the last state is waited for, which may take longer than a killed one lives.
        with saver, closing(stream(session, step)) as batches, bar:
            if owed:
                with clock.paused():
                    _evaluate(session, step, log)
            stopping = starved = False
            while step < config.steps and not stopping:
                saver.check()  # rather than train on for what would be lost
                metrics = update(session, batches, step, window)
                step, stopping = step + 1, topology.any(stopped())
                if budget:
                    config = _fit_to_budget(session, budget, step, bar)
                last = step == config.steps
                if log and (step % config.log_every == 0 or last):
                    line = window.close()
                    log.write(step, {**line, **engine.per_resblock()})
                    starved = starved or _is_starved(task.label, step - bar.start, line["data_wait"])
                _show(session, bar, step, metrics["loss"], ceiling)
                with clock.paused():
                    if step % config.save_every == 0 or last or stopping:
                        _save(session, saver, step)
                    # After saving, so that what fails here costs no update; and a stop does not wait for it.
                    if _evaluation_is_due(config, step) and (last or not stopping):
                        _evaluate(session, step, log)
        topology.barrier()  # process 0 has written
    _name_skipped(topology.gather(loader.skipped))
    if engine.dropped:
        warn(
            f"{task.label}: the gradient of the last {engine.dropped} updates was not finite, so they "
            "changed nothing: another --run with a lower step size (--set lr=…) may do better"
        )
    if step < config.steps:
        say(f"stopped after step {step:,} of {config.steps:,}, saved; the same command goes on from there")
    return step >= config.steps


def _is_starved(label: str, updates: int, waited: float) -> bool:
    """Warn where training waits for its pictures; not of the first updates, while the readers start."""
    if updates < 2 * SETTLED or waited < STARVED:
        return False
    warn(
        f"{label}: {waited:.0%} of the time is spent waiting for pictures: --set workers=… reads with more "
        "processes, and pictures that are made smaller once are read faster"
    )
    return True


def _show(session: Session, bar: Bar, step: int, loss: float, ceiling: float) -> None:
    task, config = session.task, session.config
    if step == bar.start + SETTLED and step < config.steps:
        say(f"{task.label}: about {duration(bar.left(step))} for the remaining steps")
    pictures = bar.rate(step) * config.batch_size
    rates = {
        "tokens/s": f"{pictures * task.tokens_per_picture:,.0f}",
        "of GEMM rate": f"{pictures * task.flops_per_picture / ceiling:.0%}",
    }
    bar.show(step, {**rates, "loss": f"{loss:.4g}"})


def _save(session: Session, saver: Saver, step: int) -> None:
    task, engine, main = session.task, session.engine, session.topology.main
    if main and session.budget:
        record(session.folder, session.config)
    saver.save(step, engine.state(), {"task": task.state()})
    if main and engine.scaling is not None:
        draw_scales(session.folder)


def _evaluation_is_due(config: Training, step: int) -> bool:
    return step > 0 and (step % config.eval_every == 0 or step == config.steps)


def _owes_an_evaluation(session: Session, step: int) -> bool:
    """Was the run saved after update `step` and then ended before the evaluation that was due?"""
    here = session.topology
    lines = read_metrics(session.folder) if here.main else []
    made = any(line["step"] == step and any(k.startswith("heldout_") for k in line) for line in lines)
    return _evaluation_is_due(session.config, step) and not here.any(made)


def _evaluate(session: Session, step: int, log: MetricsLog | None) -> None:
    with session.engine.averaged():
        measured = session.engine.run(session.task.evaluate, step)
        # Process 0 alone draws; on GPUs the others' next exchange would wait ten minutes for it and give up.
        session.topology.barrier()
    if log:
        log.write(step, measured)


def _fit_to_budget(session: Session, budget: Budget, step: int, bar: Bar) -> Training:
    """How to train on after update `step`: now and then to another end, as there is time for."""
    topology = session.topology
    over = topology.any(budget.left == 0)
    if over or (step - bar.start) % REFIT == 0:
        steps = step if over else topology.share(budget.steps(step, bar.rate(step)))
        session.task.config = budget.fitted(steps)
        bar.expect(steps)
    return session.config


def stream(session: Session, step: int) -> Generator[Batch, None, None]:
    """This process' micro-batches from update `step` on: every `world`-th sample of what one would read."""
    topology = session.topology
    return session.loader.batches(step * session.config.batch_size + topology.rank, topology.world)


def update(session: Session, batches: Iterator[Batch], step: int, window: Window) -> dict[str, float]:
    """One update: its metrics, averaged over the micro-batches of all processes."""
    task, engine, config, topology = session.task, session.engine, session.config, session.topology
    began = time.monotonic()
    parts = [
        tuple(t.to(engine.device, non_blocking=True) for t in batch)
        for batch in islice(batches, session.micro_batches)
    ]
    window.waited += time.monotonic() - began
    task.begin(parts, engine.run)
    told: list[dict[str, Tensor]] = []
    start = step * config.batch_size + topology.rank
    for batch in parts:
        positions = range(start, start + topology.world * len(batch[0]), topology.world)
        start = positions.stop
        loss, metrics = engine.run(task.loss, batch, step, positions)
        engine.backward(loss, len(parts))
        told.append({"loss": loss.detach(), **metrics})
    # Read once all passes are under way, or a GPU would wait for the host between them.
    means = topology.mean({name: sum(each[name].item() / len(told) for each in told) for name in told[0]})
    lr = task.lr(step)
    health = engine.update(lr, step + 1)
    task.after(means["loss"])
    metrics_of_step = {**means, "lr": lr, **health}
    window.add(metrics_of_step, pictures=config.batch_size)
    return metrics_of_step


def resume(session: Session) -> int:
    """Load the newest whole state, if there is one; the number of updates it has seen."""
    task, engine, folder, topology = session.task, session.engine, session.folder, session.topology
    found, refused = newest_state(folder / "state") if topology.main else (None, [])
    for error in refused:
        warn(f"{error}; the training state before it is used")
    if found is None and refused:
        raise CheckpointError(
            f"no training state in {folder / 'state'} is whole; delete {folder} to start anew"
        )
    saved = SharedState(found, topology)
    if saved.values is None:
        return 0
    engine.load(saved)
    task.load(saved.values["task"])
    step = int(saved.values["step"])
    say(f"{task.label}: going on from step {step:,} in {folder}")
    return step


def _restore_weights(folder: Path, step: int) -> None:
    """Lost or damaged ones come back from the state that was loaded."""
    weights, state = folder / "weights.safetensors", folder / "state" / f"step-{step:08d}"
    if not state.exists():
        return
    average = state / "average.safetensors"
    written: str = read_json(state / STATE)["sha256"][average.name]
    if not weights.exists() or sha256(weights) != written:
        warn(f"{weights} was not that of step {step:,}; written anew from the training state")
        with replacing(weights) as copy:
            shutil.copyfile(average, copy)


def _name_skipped(skipped: Sequence[dict[str, str]]) -> None:
    reasons = {key: reason for each in skipped for key, reason in each.items()}
    for key, reason in list(reasons.items())[:10]:
        warn(f"skipped {key}: {reason}")
    if reasons:
        warn(f"{len(reasons):,} pictures were skipped; the next readable ones took their places")
