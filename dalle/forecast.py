"""What a training of the prior takes of a cluster: memory of a GPU, traffic of an update, time of a run.

Memory is that of this program: DeepSpeed in fp32 mode, partitioned over the GPUs of one machine where
gradients are compressed between machines, over all GPUs otherwise. Beside it stands what the paper held, with
weights in fp16. Activations are found by running a step on tensors without data (`stage2_prior.footprint`).
"""

from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import NamedTuple

import torch

from dalle.cluster import Choice, Cluster
from dalle.low_rank import compressed
from dalle.overlap import BLOCK
from dalle.precision import Arithmetic
from dalle.zero import BUCKET, LIVE
from stage2_prior.config import PriorConfig, PriorTraining
from stage2_prior.flops import flops
from stage2_prior.footprint import Footprint, footprint, parameters
from stage2_prior.model import Prior


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU."""

    weights: float
    gradients: float
    moments: float
    average: float
    errors: float  # what compression holds: error sums, projections, and the factors of an update
    activations: float
    buffers: float

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(asdict(self).values()))


def memory(
    model: PriorConfig,
    choice: Choice,
    cluster: Cluster,
    precision: Arithmetic = "bf16",
    held: Footprint | None = None,
) -> Memory:
    """What one GPU holds in this program; `held` by forward and backward pass, if it is known.

    ZeRO keeps an fp32 copy of its partition of the weights beside the ones that the model computes with.
    """
    matrices, rest = parameters(model)
    n, stage = matrices + rest, choice.stage if cluster.gpus > 1 else 0
    shards = cluster.local if choice.rank else cluster.gpus
    of_weights, of_gradients, of_moments = (shards if stage >= least else 1 for least in (3, 2, 1))
    halved = choice.weights == "fp16" and stage == 0
    held = held or footprint(model, choice.micro_batch, choice.recompute, precision, halved=halved)
    activations = held.partitioned if stage >= 2 else held.whole - 4 * n
    errors = 0.0
    if choice.rank:
        low = low_rank(model, choice.rank, shards if stage == 3 else 1)
        held_so = choice.factor_bytes * (matrices + low.projections)  # P and Q are fp32 until all are there
        errors = (held_so + 4.0 * low.factors) / of_moments
    on_gpu = not (choice.offload and stage)
    for_matrices = 4 if choice.moments == "16bit" or choice.muon else 8  # bytes of a number's moments
    return Memory(
        weights=(2 * matrices + 4 * rest if halved else 4 * n) / of_weights
        + (4 * n / of_moments if stage and on_gpu else 0),
        gradients=4 * n / of_gradients,
        moments=(for_matrices * matrices + 8 * rest) / of_moments if on_gpu else 0.0,
        average=4 * n / of_moments if on_gpu else 0.0,
        errors=errors,
        activations=float(max(0, activations)),
        buffers=_buffers(model, n, stage, cluster),
    )


def _buffers(model: PriorConfig, n: int, stage: int, cluster: Cluster) -> float:
    if cluster.gpus == 1:
        return 0.0
    if stage == 0:
        largest = model.width * max(4 * model.width, model.text_vocab, model.image_vocab)
        return float(max(BLOCK, 4 * largest))  # gradients are averaged some at a time
    if stage == 3:
        return 4.0 * (min(n, BUCKET) + min(n, LIVE))
    # Two for gradients, which take turns and have one size for every model, and one for weights.
    return 4.0 * (2 * BUCKET + min(n, BUCKET))


def paper_memory(model: PriorConfig, batch: int, shards: int) -> Memory:
    """What one GPU held in the paper.

    Weights of the resblocks in fp16, their moments and error sums in 16 bits, all partitioned; gradients go
    straight into the error sums; the average lives in main memory; the input of every resblock is kept in
    fp32. The weights of two resblocks and the gradient of one are whole at a time.

    Source: paper, §3 and App. D and E.
    """
    matrices, rest = parameters(model)
    resblock = 2.0 * 8 * model.width**2
    kept = 4.0 * batch * model.length * model.width * 2 * model.depth
    within = 2.0 * batch * model.length * 4 * model.width * 3  # hidden layer, its activation and a gradient
    return Memory(
        weights=(2 * matrices + 4 * rest) / shards,
        gradients=4 * rest / shards,
        moments=(4 * matrices + 8 * rest) / shards,
        average=0.0,
        errors=2 * matrices / shards,
        activations=kept + within,
        buffers=3 * resblock,
    )


def compression(rank: int, width: int, shards: int) -> float:
    """Share of the numbers between machines that low rank saves where matrices are cut as in the paper.

    Source: paper, App. E.1: 1 − r(m+2)/(2dm), which is 1 − 5r/8d for m = 8 GPUs a machine.
    """
    return 1 - rank * (shards + 2) / (2 * width * shards)


class LowRank(NamedTuple):
    """Numbers of a machine's resblocks' matrices where they are compressed."""

    factors: int  # sent: P and Q
    projections: int  # never sent: Q₀
    plain: int  # sent in full


@cache
def low_rank(model: PriorConfig, rank: int, shards: int) -> LowRank:
    """What compressing gradients to a total rank makes of them.

    Each parameter is cut into so many equal runs, as ZeRO 3 cuts it; the paper cuts the second MLP matrix
    along its other side. ZeRO 1 and 2 cut all of them together and leave nearly every matrix whole: one run.
    """
    with torch.device("meta"):
        layer = Prior(replace(model, depth=1))
    factors = projections = plain = 0
    for name, stacked in layer.matrices().items():
        parameter = layer.get_parameter(name)
        run = -(-parameter.numel() // shards)
        for offset in range(0, parameter.numel(), run):
            numel = min(run, parameter.numel() - offset)
            matrices = compressed(name, tuple(parameter.shape), offset, numel, rank, stacked)
            factors += sum(matrix.factors for matrix in matrices)
            projections += sum(matrix.long * matrix.rank for matrix in matrices)
            plain += numel - sum(matrix.numel for matrix in matrices)
    return LowRank(model.depth * factors, model.depth * projections, model.depth * plain)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one update sends, and seconds that they take."""

    within: float  # by one GPU, to others of its machine
    between: float  # by one machine, to the others
    plain_between: float  # the same without compression
    kept: float  # numbers that a machine sends of the resblocks' matrices, for each number of these
    within_seconds: float
    between_seconds: float


def traffic(model: PriorConfig, choice: Choice, cluster: Cluster) -> Traffic:
    """Of an update: gradients are averaged and weights gathered; with recomputation stage 3 gathers twice."""
    matrices, rest = parameters(model)
    n, m, machines = matrices + rest, cluster.local, cluster.machines
    all_reduce, gather = 2 * 4 * n * (m - 1) / m, 4 * n * (m - 1) / m
    within = {0: all_reduce, 1: all_reduce + gather, 2: all_reduce + gather, 3: 3 * gather}[choice.stage]
    ring = 2 * (machines - 1) / machines
    plain, kept = ring * 4.0 * n, 1.0
    if choice.rank:
        factors, _, whole = low_rank(model, choice.rank, m if choice.stage == 3 else 1)
        senders = m if choice.stage == 0 else 1  # nothing is shared out: every process sends all of it
        between = senders * ring * (choice.factor_bytes * factors + 4.0 * (whole + rest))
        kept = senders * (factors + whole) / matrices
    else:
        # Without it ZeRO partitions over all machines, and weights are gathered across them too.
        between = plain * (1.5 if choice.stage else 1.0)
    return Traffic(within, between, plain, kept, within / cluster.within, between / cluster.between)


@dataclass(frozen=True)
class Cost:
    """Of a whole run."""

    step_seconds: float
    compute_seconds: float
    flops: float  # of the run, as executed
    flops_6nd: float  # 6 for every weight of the resblocks and every token
    days: float


def cost(model: PriorConfig, training: PriorTraining, choice: Choice, cluster: Cluster) -> Cost:
    """Time of matrix products at the given rate, and of traffic between machines after them.

    Traffic within a machine runs beside the products; only what is longer than they are is waited for.
    """
    of_step = float(flops(model, choice.recompute) * training.batch_size)
    compute = of_step / cluster.gpus / cluster.rate
    sent = traffic(model, choice, cluster)
    step = max(compute, sent.within_seconds) + sent.between_seconds
    matrices, _ = parameters(model)
    tokens = float(training.steps) * training.batch_size * model.length
    return Cost(
        step, compute, of_step * training.steps, 6.0 * matrices * tokens, training.steps * step / 86_400
    )
