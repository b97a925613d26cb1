"""Where this process stands among those that train together, and what they tell each other.

One process is the plain case: everything here then answers at once, without `torch.distributed`.
"""

import gc
import json
import math
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dalle.console import console
from dalle.errors import ConfigError
from dalle.launch import STORE, die_with_parent, launched

# How long the others wait for process 0 to read a long list of captions; a death is noticed at once.
PATIENCE = timedelta(days=1)


class Part(NamedTuple):
    """What this process holds of a tensor: a contiguous share, flattened, from `offset`; maybe nothing."""

    shape: tuple[int, ...]
    offset: int
    values: Tensor


@dataclass(frozen=True)
class Topology:
    """All processes of a run, and this one's place among them.

    Args:
        rank: number of this process, from 0.
        world: how many there are.
        local_rank: number of this process on its machine.
        local_world: how many each machine runs.
        cpu: the group of all of them for tensors in main memory.
        shards: the group over which an engine partitions and averages; all of them by default.
        within: the group of this machine's processes, where there are several machines.
        between: the group of the processes of the same number on all machines, likewise.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    cpu: Any = None
    shards: Any = None
    within: Any = None
    between: Any = None

    @property
    def machines(self) -> int:
        """How many machines there are."""
        return self.world // self.local_world

    @property
    def main(self) -> bool:
        """Is this the process that speaks and writes?"""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of everybody's `values`, a tensor of the same shape on each; on the CPU."""
        values = values.detach().cpu().clone()
        if self.world > 1:
            dist.all_reduce(values, group=self.cpu)
        return values

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """The mean of everybody's numbers; all have the same names in the same order."""
        total = self.sum(torch.tensor(list(values.values()), dtype=torch.float64)) / self.world
        return dict(zip(values, total.tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """True if `flag` is set on any process."""
        return bool(self.sum(torch.tensor(int(flag))))

    def share(self, value: Any, source: int = 0) -> Any:
        """The JSON value that process `source` gives."""
        if self.world == 1:
            return value
        text = json.dumps(value).encode() if self.rank == source else b""
        size = torch.tensor(len(text))
        dist.broadcast(size, source, group=self.cpu)
        buffer = torch.zeros(int(size), dtype=torch.uint8)
        if self.rank == source and text:
            buffer = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        dist.broadcast(buffer, source, group=self.cpu)
        return json.loads(bytes(buffer.tolist()))

    def gather(self, value: Any) -> list[Any]:
        """Everybody's JSON value, by rank."""
        return [self.share(value, source) for source in range(self.world)]

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The tensor of process 0, in place; on the CPU, contiguous, of the same shape on each."""
        if self.world > 1:
            dist.broadcast(_bytes(tensor), 0, group=self.cpu)
        return tensor

    def assemble(self, part: Part) -> Tensor:
        """The whole tensor on process 0; on the others, nothing that is of use."""
        size = math.prod(part.shape)
        if self.world == 1:
            return part.values.view(part.shape)
        whole = torch.zeros(size, dtype=part.values.dtype)
        values = part.values.flatten()
        whole[part.offset : part.offset + values.numel()] = values
        dist.reduce(_bytes(whole), 0, group=self.cpu)  # bytes, so that the sum with nothing is exact
        return whole.view(part.shape)

    def apart(self) -> "Topology":
        """The same processes with channels of their own, for a thread beside the training."""
        return replace(self, cpu=dist.new_group(backend="gloo", timeout=PATIENCE)) if self.world > 1 else self

    def barrier(self) -> None:
        """Wait until all have come here."""
        if self.world > 1:
            dist.barrier(group=self.cpu)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Process 0 runs the body before the others do: it makes a file that they then find."""
        if not self.main:
            self.barrier()
        yield
        if self.main:
            self.barrier()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


ALONE = Topology()
_current = ALONE


def topology() -> Topology:
    """This process' place; alone unless `joined` holds."""
    return _current


def place(environ: Mapping[str, str] = os.environ) -> tuple[int, int, int, int]:
    """(rank, world, local rank, local world) as `dalle`, torchrun, deepspeed or Slurm tells them.

    Raises:
        ConfigError: a part is missing.
    """
    sources = {
        "rank": ("RANK", "SLURM_PROCID"),
        "world": ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"),
        "local_rank": ("LOCAL_RANK", "SLURM_LOCALID"),
        "local_world": ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE"),
    }
    found: dict[str, int] = {}
    for part, names in sources.items():
        value = next((environ[name] for name in names if environ.get(name)), None)
        if value is None and part == "local_world":
            value = str(found["world"])
        if value is None:
            raise ConfigError(
                f"this is one of several processes, but none of {', '.join(names)} tells its {part}: "
                "start them with dalle --processes, torchrun, deepspeed --no_local_rank, or srun"
            )
        found[part] = int(value.split("(")[0].split(",")[0])  # Slurm writes 8(x2): eight on each of two
    return found["rank"], found["world"], found["local_rank"], found["local_world"]


@contextmanager
def joined(asked: int | None = None) -> Iterator[Topology]:
    """Join the other processes of this run, if this is one of several, and leave them at the end.

    Args:
        asked: how many processes the user asked for on each machine, if any.

    Raises:
        ConfigError: others than `asked` were started on this machine, there are fewer GPUs than processes, or
            nothing tells where the processes meet.
    """
    global _current
    rank, world, local_rank, local_world = place() if launched() else (0, 1, 0, 1)
    if asked not in (None, local_world):
        raise ConfigError(
            f"--processes {asked}, but {local_world} were started on this machine: leave --processes out"
        )
    if world == 1:
        yield _current
        return
    die_with_parent()
    refuse_stale_addresses()
    cuda = torch.cuda.is_available()
    gpu = gpu_of(local_rank, local_world, torch.cuda.device_count()) if cuda else local_rank
    os.environ.setdefault("LOCAL_RANK", str(gpu))  # DeepSpeed asks for it, Slurm does not set it
    if cuda:
        torch.cuda.set_device(gpu)
    if STORE in os.environ:
        where = f"file://{os.environ[STORE]}"
    else:
        _find_master()
        where = "env://"
    timeout = None if cuda else PATIENCE
    dist.init_process_group(
        "nccl" if cuda else "gloo", init_method=where, rank=rank, world_size=world, timeout=timeout
    )
    cpu = dist.new_group(backend="gloo", timeout=PATIENCE)
    console.quiet = rank > 0
    _current = with_machines(Topology(rank, world, local_rank, local_world, cpu))
    yield _current
    # Reached only without an error: then all leave together. One that fails just ends (`cli.ending`).
    del cpu
    here, _current = _current, ALONE
    here.barrier()
    del here
    gc.collect()  # or a group that something still holds on to aborts the process at its end
    dist.destroy_process_group()


def gpu_of(local_rank: int, local_world: int, gpus: int, environ: Mapping[str, str] = os.environ) -> int:
    """The GPU of a process that sees so many.

    Raises:
        ConfigError: there are fewer than processes.
    """
    if gpus == 1 and "RANK" not in environ:  # Slurm may show each task its own one alone
        return 0
    if local_rank >= gpus:
        raise ConfigError(f"{local_world} processes on a machine of {gpus} GPUs: start at most {gpus}")
    return local_rank


def refuse_stale_addresses(environ: Mapping[str, str] = os.environ) -> None:
    """Raises `ConfigError` where torchrun has started these processes again beside its old store.

    In it they would find the addresses of those that ended, and wait for them.
    """
    again = environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if again and environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ConfigError(
            "torchrun has started these processes again, for which its environment needs "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: set it, or leave --max-restarts out; "
            "the same command goes on from the last save"
        )


def with_machines(here: Topology) -> Topology:
    """The groups of and between machines, agreed on by all; none where machines run unequally many processes.

    Raises:
        ConfigError: the processes' numbers do not go machine by machine.
    """
    told = torch.zeros(here.world, 2, dtype=torch.long)
    told[here.rank] = torch.tensor([here.local_world, here.local_rank])
    sizes, numbers = here.sum(told).t().tolist()
    if len(set(sizes)) > 1 or here.world % here.local_world:
        return replace(here, local_world=1)
    if numbers != [rank % here.local_world for rank in range(here.world)]:
        raise ConfigError(
            "the processes must be numbered machine by machine: start them with srun --distribution=block"
        )
    if here.machines < 2:
        return here
    ranks = torch.arange(here.world).view(here.machines, here.local_world)
    within = [dist.new_group(machine) for machine in ranks.tolist()]
    between = [dist.new_group(same) for same in ranks.t().tolist()]
    machine, number = divmod(here.rank, here.local_world)
    return replace(here, within=within[machine], between=between[number])


def _find_master() -> None:
    """Under Slurm the first machine of the job is where all meet, unless MASTER_ADDR says otherwise."""
    environ = os.environ
    if "MASTER_ADDR" in environ and "MASTER_PORT" in environ:
        return
    if "SLURM_JOB_NODELIST" not in environ:
        raise ConfigError("MASTER_ADDR and MASTER_PORT must say where the processes of this run meet")
    if "MASTER_ADDR" not in environ:
        command = ["scontrol", "show", "hostnames", environ["SLURM_JOB_NODELIST"]]
        try:
            hosts = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        except (OSError, subprocess.CalledProcessError) as error:
            raise ConfigError(f"{' '.join(command)} failed ({error}); set MASTER_ADDR to one host") from None
        environ["MASTER_ADDR"] = hosts[0]
    environ.setdefault("MASTER_PORT", str(15_000 + int(environ.get("SLURM_JOB_ID", "0")) % 20_000))
