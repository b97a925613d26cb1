"""The training loop of both stages."""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from dalle.chart import draw_scales
from dalle.checkpoint import newest_state, save_state
from dalle.config import setting
from dalle.console import Bar, Stopwatch, duration, say, warn
from dalle.data.loader import Loader
from dalle.engine import Engine
from dalle.errors import CheckpointError, ConfigError
from dalle.metrics import MetricsLog, Window
from dalle.precision import Precision
from dalle.process import keep_freed_memory, only_process, stop_signals


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a run trains, saved with it. The stages add their own fields."""

    steps: int = setting(MISSING, "updates in all")
    batch_size: int = setting(MISSING, "pictures per update, over all processes")
    micro_batch: int = setting(0, "pictures per forward pass; 0: the whole batch at once")
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
    workers: int = setting(1, "processes that read and prepare pictures; 0: the training process itself")
    log_every: int = setting(10, "updates between two lines of metrics.jsonl")
    eval_every: int = setting(500, "updates between two evaluations on held-out data")
    eval_pictures: int = setting(256, "held-out pictures per evaluation")
    save_every: int = setting(500, "updates between two saved training states")
    keep: int = setting(2, "training states kept")
    tensorboard: bool = setting(False, "also write TensorBoard files")

    def __post_init__(self) -> None:
        at_least_1 = (
            "batch_size", "log_every", "eval_every", "eval_pictures", "save_every", "keep", "ema_every",
        )  # fmt: skip
        for name in at_least_1:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("steps", "micro_batch", "workers", "seed", "weight_decay"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("heldout", "beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        if self.lr <= 0:
            raise ConfigError(f"lr={self.lr} must be above 0")
        if self.clip is not None and self.clip <= 0:
            raise ConfigError(f"clip={self.clip} must be above 0; clip=none sets no limit")
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise ConfigError(
                f"batch_size={self.batch_size} must be a multiple of micro_batch={self.micro_batch}"
            )

    @property
    def micro_batches(self) -> int:
        """Forward passes per update."""
        return self.batch_size // (self.micro_batch or self.batch_size)


SETTLED = 10  # updates after which the time left is worth saying

# What may differ between a run and its continuation without making it another run.
CHANGEABLE = {
    "steps", "workers", "log_every", "eval_every", "eval_pictures", "save_every", "keep", "tensorboard",
}  # fmt: skip


@runtime_checkable
class Task(Protocol):
    """What a stage tells the loop. `step` counts the updates made before."""

    label: str
    tokens_per_picture: int

    def loss(self, batch: tuple[Tensor, ...], step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise for micro-batch `micro` of this step, and metrics to log with it."""

    def lr(self, step: int) -> float:
        """The step size of this update."""

    def after(self, loss: float) -> None:
        """Take note of an update's training loss."""

    def evaluate(self, step: int) -> dict[str, float]:
        """Measure and draw on held-out data; the model holds its averaged weights."""

    def publish(self) -> None:
        """Write the averaged weights for drawing; the model holds them."""

    def state(self) -> dict[str, Any]:
        """JSON values that resuming needs beyond the engine's tensors."""

    def load(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""


def keyed(device: torch.device, *key: int) -> torch.Generator:
    """A random generator that is a function of its key alone.

    All noise of training is drawn from generators keyed by (seed, step, micro-batch). So a resumed
    run repeats the uninterrupted one without any random state in the checkpoint.
    """
    seed = 0
    for number in key:
        seed = (seed * 1_000_003 + number) & 0x7FFF_FFFF_FFFF_FFFF
    return torch.Generator(device).manual_seed(seed)


def fit(task: Task, engine: Engine, loader: Loader, config: Training, folder: Path) -> bool:
    """Train until `config.steps` updates are made; go on from the newest state under `folder`.

    Logs, evaluates and saves on the way and at the end. Ctrl-C and SIGTERM save first.

    Returns:
        True when all steps are made, False when a signal stopped it before.

    Raises:
        CheckpointError: another process trains there, states exist but none is whole, or saving failed.
    """
    keep_freed_memory()
    with only_process(folder), stop_signals() as stopped:
        step = _resume(task, engine, folder)
        if step >= config.steps:
            say(f"{task.label}: {folder} has its {step:,} steps already; a larger --steps trains on")
            return True
        log, clock = MetricsLog(folder, step, config.tensorboard), Stopwatch()
        window = Window(task.tokens_per_picture, clock)
        stream = closing(loader.batches(step * config.batch_size))
        with stream as batches, Bar(task.label, config.steps, step, clock) as bar:
            stopping = False
            while step < config.steps and not stopping:
                metrics = _update(task, engine, batches, config, step, window)
                step, stopping = step + 1, stopped()
                last = step == config.steps
                if step == bar.start + SETTLED and not last:
                    say(f"{task.label}: about {duration(bar.left(step))} for the remaining steps")
                if step % config.log_every == 0 or last:
                    log.write(step, {**window.close(), **engine.per_resblock()})
                tokens = bar.rate(step) * config.batch_size * task.tokens_per_picture
                bar.show(step, {"tokens/s": f"{tokens:,.0f}", "loss": f"{metrics['loss']:.4g}"})
                with clock.paused():
                    if step % config.eval_every == 0 or last:
                        with engine.averaged():
                            log.write(step, task.evaluate(step))
                    if step % config.save_every == 0 or last or stopping:
                        _save(task, engine, config, folder, step)
    _name_skipped(loader)
    if step < config.steps:
        say(f"stopped after step {step:,} of {config.steps:,}, saved; the same command goes on from there")
    return step >= config.steps


def _update(
    task: Task,
    engine: Engine,
    batches: Iterator[tuple[Tensor, ...]],
    config: Training,
    step: int,
    window: Window,
) -> dict[str, float]:
    """One update: its metrics, averaged over the micro-batches."""
    means: dict[str, float] = {}
    for micro in range(config.micro_batches):
        began = time.monotonic()
        batch = tuple(t.to(engine.device, non_blocking=True) for t in next(batches))
        window.waited += time.monotonic() - began
        with engine.arithmetic():
            loss, metrics = task.loss(batch, step, micro)
        engine.backward(loss, config.micro_batches)
        for name, value in {"loss": loss, **metrics}.items():
            means[name] = means.get(name, 0.0) + value.item() / config.micro_batches
    lr = task.lr(step)
    health = engine.update(lr, step + 1)
    task.after(means["loss"])
    metrics_of_step = {**means, "lr": lr, **health}
    window.add(metrics_of_step, pictures=config.batch_size)
    return metrics_of_step


def _resume(task: Task, engine: Engine, folder: Path) -> int:
    """Load the newest whole state, if there is one; the number of updates it has seen."""
    found, refused = newest_state(folder / "state")
    for error in refused:
        warn(f"{error}; the training state before it is used")
    if found is None:
        if refused:
            raise CheckpointError(
                f"no training state in {folder / 'state'} is whole; delete it to start anew"
            )
        return 0
    state, tensors = found
    engine.load(tensors)
    task.load(state["task"])
    say(f"{task.label}: going on from step {state['step']:,} in {folder}")
    return int(state["step"])


def _save(task: Task, engine: Engine, config: Training, folder: Path, step: int) -> None:
    # The weights first: were the state there without them, a finished run would never write them again.
    with engine.averaged():
        task.publish()
    save_state(folder / "state", step, engine.tensors(), {"task": task.state()}, config.keep)
    if engine.scaling is not None:
        draw_scales(folder)


def _name_skipped(loader: Loader) -> None:
    for key, reason in list(loader.skipped.items())[:10]:
        warn(f"skipped {key}: {reason}")
    if loader.skipped:
        warn(f"{len(loader.skipped):,} pictures were skipped; the next readable ones took their places")
