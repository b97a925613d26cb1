"""Machines of one process each, simulated by processes on this one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing


def _enter(rank: int, world: int, folder: Path, work: Callable[..., Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(work(rank), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def on_machines(world: int, folder: Path, work: Callable[[int], Any]) -> list[Any]:
    """What `work(rank)` gives on each of `world` processes that can reach one another."""
    torch.multiprocessing.spawn(_enter, (world, folder, work), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
