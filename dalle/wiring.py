"""From settings to a model, an engine and a loader, for one process or for several."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from dalle.data.loader import Loader, Prepare
from dalle.data.source import Source
from dalle.distributed import topology
from dalle.engine import Engine
from dalle.optim import AdamW, Average
from dalle.precision import Arithmetic, best_device, choose
from dalle.scaling import Scaling
from dalle.training import Training

M = TypeVar("M", bound=nn.Module)


def partitioned(config: Training) -> bool:
    """Does no process hold the whole model?"""
    return topology().world > 1 and config.zero == 3


def processes(config: Training) -> str:
    """How many there are and what they partition, for a line that a person reads."""
    world = topology().world
    return f" · {world} processes, ZeRO {config.zero}" if world > 1 else ""


def place(model: nn.Module, config: Training, layout: torch.memory_format = torch.contiguous_format) -> None:
    """Move a model to this process' device; in this layout, if the engine leaves the layout to us."""
    if partitioned(config):
        return  # it is there
    if topology().world > 1 and config.zero:
        layout = torch.contiguous_format
    model.to(best_device(), memory_format=layout)  # type: ignore[call-overload]


def precision_of(config: Training) -> Arithmetic:
    """What all processes compute in: what the first one finds."""
    chosen: Arithmetic = topology().share(choose(config.precision, best_device()))
    return chosen


def build(kind: Callable[[], M], config: Training) -> M:
    """A new model with the weights that `config.seed` decides; partitioned where it is to be."""
    torch.manual_seed(config.seed)
    if not partitioned(config):
        return kind()
    from dalle.zero import partitioned_from_birth

    with partitioned_from_birth():
        return kind()


def make_engine(
    model: nn.Module, config: Training, precision: Arithmetic, *, variance_limit: float | None = None
) -> Engine:
    """The engine that these settings and the number of processes ask for."""
    here = topology()
    micro_batches = config.micro_batches(here.world)
    optimizer = AdamW(
        model, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay,
        variance_limit=variance_limit,
    )  # fmt: skip
    scaling = Scaling(model, micro_batches) if precision == "fp16" else None
    if here.world == 1 or config.zero == 0:
        average = Average(model.parameters(), config.ema_decay, config.ema_every)
        return Engine(
            model, optimizer, average, clip=config.clip, precision=precision, scaling=scaling, topology=here
        )
    from dalle.zero import ZeroEngine

    return ZeroEngine(
        model, optimizer, ema=(config.ema_decay, config.ema_every), clip=config.clip, precision=precision,
        scaling=scaling, topology=here, stage=config.zero, micro_batches=micro_batches,
        offload=config.offload,
    )  # fmt: skip


def make_loader(source: Source, prepare: Prepare, config: Training, min_side: int) -> Loader:
    """The stream of this process' micro-batches."""
    world = topology().world
    size = config.batch_size // world // config.micro_batches(world)
    return Loader(
        source, prepare, batch_size=size, seed=config.seed, workers=config.workers, min_side=min_side
    )
