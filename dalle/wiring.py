"""From settings to a model, an engine and a loader, for one process or for several."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from dalle.console import warn
from dalle.data.loader import Loader, Prepare
from dalle.data.source import Source
from dalle.distributed import Topology, topology
from dalle.engine import Engine
from dalle.errors import ConfigError
from dalle.muon import Muon
from dalle.optim import AdamW, Average, full_shape
from dalle.packed import PackedAdamW
from dalle.powersgd import PowerSGD
from dalle.precision import Arithmetic, best_device, choose
from dalle.scaling import Scaling
from dalle.training import LargeTraining, Training
from dalle.zero import ZeroEngine, partitioned_from_birth

M = TypeVar("M", bound=nn.Module)


def partitioned(config: Training) -> bool:
    """Does no process hold the whole model?"""
    return topology().world > 1 and config.zero == 3


def _whole(config: Training) -> bool:
    """Does each process hold the whole model and its moments?"""
    return topology().world == 1 or config.zero == 0


def processes_used(config: Training) -> str:
    """How many there are and what they partition, for a line that a person reads."""
    world = topology().world
    return f" · {world} processes, ZeRO {config.zero}" if world > 1 else ""


def to_device(
    model: nn.Module, config: Training, layout: torch.memory_format = torch.contiguous_format
) -> None:
    """Move a model to this process' device; in this layout, if the engine leaves the layout to us."""
    if partitioned(config):
        return  # it is there
    if not _whole(config):
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
    with partitioned_from_birth(topology_for(config).shards):
        return kind()


def topology_for(config: Training) -> Topology:
    """This process' place; its `shards` are its machine where gradients are compressed between machines.

    Raises:
        ConfigError: machines that run unequally many processes cannot compress.
    """
    here = topology()
    if not isinstance(config, LargeTraining) or not config.compression_rank or here.machines < 2:
        return here
    if here.between is None:
        raise ConfigError(
            f"compression_rank needs as many processes on each machine, and these {here.world} are spread "
            "otherwise: set compression_rank=0"
        )
    return replace(here, shards=here.within)


def make_compression(config: Training, matrices: Mapping[str, int]) -> PowerSGD | None:
    """What compresses the gradients between machines, if these settings ask for it."""
    if not isinstance(config, LargeTraining) or not config.compression_rank:
        return None
    here, whole = topology_for(config), _whole(config)
    if whole and here.machines > 1 and here.local_world > 1:
        warn(
            f"with zero=0 each of the {here.local_world} processes of a machine exchanges the whole model's "
            "factors with the other machines; zero=1 or more shares that out among them"
        )
    return PowerSGD(
        here.between, None if whole else here.within, matrices=matrices, rank=config.compression_rank,
        factors=config.compression_format, start=config.compression_start,
        sample=config.compression_sample, seed=config.seed,
    )  # fmt: skip


def _refuse_offload(config: Training, machines: int) -> None:
    """Raises `ConfigError` for what exchanges gradients that lie in main memory: NCCL cannot."""
    exchanging = {"optimizer": "adamw"} | ({"compression_rank": 0} if machines > 1 else {})
    for name, off in exchanging.items():
        if (value := getattr(config, name, off)) != off:
            raise ConfigError(
                f"offload=cpu leaves gradients in main memory, from where {name}={value} cannot exchange "
                f"them on GPUs: set offload=none, or {name}={off}"
            )


def make_engine(
    model: nn.Module,
    config: Training,
    precision: Arithmetic,
    *,
    variance_limit: float | None = None,
    matrices: Mapping[str, int] = {},
) -> Engine:
    """The engine that these settings and the number of processes ask for.

    Args:
        model: to be trained.
        config: its settings.
        precision: of the arithmetic.
        variance_limit: see `AdamW`.
        matrices: parameters whose moments may be held in 16 bits, whose gradients may be compressed, and that
            muon may train, with the number of matrices that lie below one another in each.
    """
    here = topology_for(config)
    micro_batches = config.micro_batches(here.world)
    whole = _whole(config)
    if not whole and config.offload != "none" and best_device().type == "cuda":
        _refuse_offload(config, here.machines)
    muon: Muon | None = None
    adamw: Callable[..., AdamW] = AdamW
    if isinstance(config, LargeTraining) and config.moments == "16bit":
        if config.weights == "fp16" and not whole:
            raise ConfigError(
                f"weights=fp16 needs the whole model in each process (--zero 0): at stage {config.zero} "
                f"DeepSpeed holds fp32 weights, shared out among {here.world} processes"
            )
        adamw = partial(PackedAdamW, matrices=matrices, halved=config.weights == "fp16")
    if isinstance(config, LargeTraining) and config.optimizer == "muon":
        ratio, named = config.muon_lr / config.lr, dict(model.named_parameters())
        adamw = partial(AdamW, plain=matrices, plain_decay=ratio * config.weight_decay)
        device = next(model.parameters()).device
        muon = Muon(
            {n: full_shape(named[n]) for n in matrices}, ratio, not whole, here.shards,
            torch.bfloat16 if precision == "bf16" or device.type == "cuda" else torch.float32,
        )  # fmt: skip
    optimizer = adamw(
        model, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay,
        variance_limit=variance_limit,
    )  # fmt: skip
    ema = (config.ema_decay, config.ema_every)
    engine: Callable[..., Engine]
    if whole:
        engine = partial(Engine, model, optimizer, Average(model.parameters(), *ema))
    else:
        engine = partial(
            ZeroEngine, model, optimizer, ema=ema,
            stage=config.zero, micro_batches=micro_batches, offload=config.offload,
        )  # fmt: skip
    compression = make_compression(config, matrices)
    scaling = Scaling(model, micro_batches) if precision == "fp16" else None
    return engine(
        clip=config.clip, precision=precision, scaling=scaling, topology=here, compression=compression,
        muon=muon,
    )  # fmt: skip


def make_loader(source: Source, prepare: Prepare, config: Training, min_side: int) -> Loader:
    """The stream of this process' micro-batches."""
    size = config.pictures_at_once(topology().world)
    return Loader(
        source, prepare, batch_size=size, seed=config.seed, workers=config.workers, min_side=min_side
    )
