"""The machines of a training, and what may be traded on them for memory."""

import math
import re
from dataclasses import dataclass

from dalle.config import require
from dalle.errors import ConfigError


@dataclass(frozen=True)
class Cluster:
    """The machines.

    Args:
        gpus: in all.
        per_machine: GPUs of each machine.
        memory: bytes of one GPU.
        within: bytes a second that a GPU sends to others of its machine.
        between: bytes a second that a machine sends to other machines.
        rate: FLOP/s of one GPU's matrix products.
    """

    gpus: int
    per_machine: int
    memory: float
    within: float
    between: float
    rate: float

    def __post_init__(self) -> None:
        names = ("gpus", "per_machine", "memory", "within", "between", "rate")
        require(self, "be above 0", lambda v: 0 < v < math.inf, *names)
        if self.gpus > self.per_machine and self.gpus % self.per_machine:
            raise ConfigError(
                f"--gpus {self.gpus} must be a multiple of --gpus-per-machine {self.per_machine}, "
                "or no more than that"
            )

    @property
    def machines(self) -> int:
        """How many there are."""
        return max(1, self.gpus // self.per_machine)

    @property
    def local(self) -> int:
        """GPUs of each machine that are used."""
        return self.gpus // self.machines


@dataclass(frozen=True)
class Choice:
    """How a model is trained on a cluster: what may be traded for memory."""

    stage: int  # of ZeRO
    moments: str
    recompute: bool
    micro_batch: int  # pictures in one pass of one GPU
    offload: bool = False
    rank: int = 0  # total rank of the gradients between machines; 0: not compressed
    muon: bool = False  # matrices have one moment, in fp32
    weights: str = "fp32"  # of the matrices, where each GPU holds the whole model
    factor_bytes: int = 2  # of a number of what compression sends, and of its error sums

    def options(self, other: "Choice") -> str:
        """What changes from `other` to this, as one would type it."""
        words = {
            "stage": f"--zero {self.stage}",
            "moments": f"--set moments={self.moments}",
            "recompute": f"--set recompute={str(self.recompute).lower()}",
            "micro_batch": f"--set micro_batch={self.micro_batch}",
            "offload": f"--set offload={'cpu' if self.offload else 'none'}",
            "rank": f"--set compression_rank={self.rank}",
        }
        return " ".join(w for name, w in words.items() if getattr(self, name) != getattr(other, name))


def size_in_bytes(text: str) -> float:
    """`16GB` and the like in bytes. Raises `ConfigError` for anything else."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+) *([KMGT])(I?)B?", text.strip().upper())
    if match is None:
        raise ConfigError(f"--memory {text!r} is no size; write it as 16GB or 40GiB")
    thousand = 1024 if match[3] else 1000
    return float(match[1]) * thousand ** " KMGT".index(match[2])
