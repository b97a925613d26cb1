"""What a training of the prior takes, before anyone rents a machine: memory, traffic, time, what would fit.

Memory is that of this program: DeepSpeed in fp32 mode, partitioned over the GPUs of one machine where
gradients are compressed between machines, over all GPUs otherwise. Beside it stands what the paper held, with
weights in fp16. Activations are found by running a step on tensors without data (`stage2_prior.footprint`).
"""

import bisect
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dalle.config import override
from dalle.config import preset as named_preset
from dalle.console import duration
from dalle.errors import ConfigError
from dalle.powersgd import paper_rank
from dalle.zero import BUCKET, LIVE
from stage1_dvae.config import PRESETS as DVAE_PRESETS
from stage2_prior.config import PRESETS, PriorConfig, PriorTraining
from stage2_prior.footprint import Footprint, flops, footprint, parameters

GB = 1e9
TOKENS_PER_PARAMETER = 20  # of training, where the data allows (Hoffmann et al. 2022)
EPOCHS = 30  # passes over the data beyond which more steps rather memorise


@dataclass(frozen=True)
class Cluster:
    """The machines.

    Args:
        gpus: in all.
        per_machine: GPUs of each machine.
        memory: bytes of one GPU.
        within: bytes a second that a GPU sends to others of its machine.
        between: bytes a second that a machine sends to other machines.
        rate: multiplications and additions a second of one GPU's matrix products.
    """

    gpus: int
    per_machine: int
    memory: float
    within: float
    between: float
    rate: float

    def __post_init__(self) -> None:
        for name in ("gpus", "per_machine", "memory", "within", "between", "rate"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0")
        if self.gpus > self.per_machine and self.gpus % self.per_machine:
            raise ConfigError(
                f"--gpus {self.gpus} must be a multiple of --gpus-per-machine {self.per_machine}, "
                "or no more than that"
            )

    @property
    def machines(self) -> int:
        """How many there are."""
        return max(1, self.gpus // self.per_machine)


@dataclass(frozen=True)
class Choice:
    """How a model is trained on a cluster: what may be traded for memory."""

    stage: int
    moments: str
    recompute: bool
    micro_batch: int  # pictures in one pass of one GPU
    offload: bool = False
    rank: int = 0  # total rank of the gradients between machines; 0: not compressed

    def options(self, other: "Choice") -> str:
        """What changes from `other` to this, as one would type it."""
        words = {
            "stage": f"--zero {self.stage}",
            "moments": f"--set moments={self.moments}",
            "recompute": f"--set recompute={str(self.recompute).lower()}",
            "micro_batch": f"{self.micro_batch} pictures in one pass of a GPU",
            "offload": "--offload cpu",
            "rank": f"rank {self.rank} between machines" if self.rank else "no compression between machines",
        }
        return ", ".join(w for name, w in words.items() if getattr(self, name) != getattr(other, name))


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU."""

    weights: float
    gradients: float
    moments: float
    average: float
    errors: float
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
    precision: Any = "bf16",
    held: Footprint | None = None,
) -> Memory:
    """What one GPU holds in this program; `held` by forward and backward pass, if it is known.

    ZeRO keeps an fp32 copy of its partition of the weights beside the ones that the model computes with.
    """
    matrices, rest = parameters(model)
    n, stage = matrices + rest, choice.stage if cluster.gpus > 1 else 0
    shards = cluster.gpus if not choice.rank else cluster.gpus // cluster.machines
    share = (
        [1, 1, 1, 1]
        if stage == 0
        else [shards if stage >= 3 else 1, shards if stage >= 2 else 1, shards, shards]
    )
    of_weights, of_gradients, of_moments, of_average = share
    held = held or footprint(model, choice.micro_batch, choice.recompute, precision)
    activations = held.partitioned if stage >= 2 else held.whole - 4 * n
    errors = 2.0 * matrices / shards if choice.rank else 0.0
    on_gpu = not (choice.offload and stage)
    packed = choice.moments == "16bit"
    return Memory(
        weights=4 * n / of_weights + (4 * n / of_moments if stage and on_gpu else 0),
        gradients=4 * n / of_gradients,
        moments=(4 * matrices + 8 * rest if packed else 8 * n) / of_moments if on_gpu else 0.0,
        average=4 * n / of_average if on_gpu else 0.0,
        errors=errors,
        activations=float(max(0, activations)),
        buffers=_buffers(n, stage, cluster),
    )


def _buffers(n: int, stage: int, cluster: Cluster) -> float:
    if cluster.gpus == 1:
        return 0.0
    if stage == 0:
        return 4.0 * n  # the gradients, flat, while they are averaged
    return 4.0 * (min(n, BUCKET) + min(n, LIVE if stage == 3 else BUCKET))


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
    """Share of the bytes between machines that low rank saves for a layer's matrices.

    Source: paper, App. E.1: 1 − r(m+2)/(2dm), which is 1 − 5r/8d for m = 8 GPUs a machine.
    """
    return 1 - rank * (shards + 2) / (2 * width * shards)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one update sends, and seconds that they take."""

    within: float  # by one GPU, to others of its machine
    between: float  # by one machine, to the others
    plain_between: float  # the same without compression
    within_seconds: float
    between_seconds: float


def traffic(model: PriorConfig, choice: Choice, cluster: Cluster) -> Traffic:
    """Of an update: gradients are averaged and weights gathered; with recomputation stage 3 gathers twice."""
    matrices, rest = parameters(model)
    n, m, machines = matrices + rest, cluster.gpus // cluster.machines, cluster.machines
    all_reduce, gather = 2 * 4 * n * (m - 1) / m, 4 * n * (m - 1) / m
    within = {0: all_reduce, 1: all_reduce + gather, 2: all_reduce + gather, 3: 3 * gather}[choice.stage]
    ring = 2 * (machines - 1) / machines
    plain = ring * 4.0 * n
    if choice.rank:
        kept = 1 - compression(choice.rank, model.width, m)
        between = ring * (2.0 * matrices * kept + 4.0 * rest)
    else:
        # Without it ZeRO partitions over all machines: stage 3 also gathers the weights across them.
        between = plain * {0: 1.0, 1: 1.5, 2: 1.5, 3: 1.5}[choice.stage]
    return Traffic(within, between, plain, within / cluster.within, between / cluster.between)


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
    of_step = flops(model, choice.recompute) * training.batch_size
    compute = of_step / cluster.gpus / cluster.rate
    sent = traffic(model, choice, cluster)
    step = max(compute, sent.within_seconds) + sent.between_seconds
    matrices, _ = parameters(model)
    tokens = float(training.steps) * training.batch_size * model.length
    return Cost(
        step, compute, of_step * training.steps, 6.0 * matrices * tokens, training.steps * step / 86_400
    )


def cheaper(
    model: PriorConfig, choice: Choice, cluster: Cluster, precision: Any = "bf16"
) -> list[tuple[str, Memory]]:
    """Up to three changes that fit, with what they need.

    First those of the settings, cheapest first, none of which contains another; then the widest and the
    deepest model that fit with 16-bit moments.
    """
    found: list[tuple[Choice, Memory]] = []
    for other in sorted(_changes(choice, cluster), key=lambda c: _price(choice, c)):
        changed = _changed(choice, other)
        if any(_changed(choice, c) <= changed and c.micro_batch >= other.micro_batch for c, _ in found):
            continue
        needed = memory(model, other, cluster, precision)
        if needed.total <= cluster.memory and len(found) < 3:
            found.append((other, needed))
    told = [(other.options(choice), needed) for other, needed in found]
    small = replace(choice, stage=3 if cluster.gpus > 1 else choice.stage, moments="16bit")
    head = model.width // model.heads
    # The first of each is the model itself: the others' activations are taken in proportion to its own.
    narrower = [
        (f"--set width={head * n} --set heads={n}", replace(model, width=head * n, heads=n))
        for n in range(model.heads, 0, -1)
    ]
    shallower = [(f"--set depth={n}", replace(model, depth=n)) for n in range(model.depth, 0, -1)]
    for smaller in (narrower, shallower):
        if len(told) < 3 and (fits := _first(smaller, small, cluster, precision)):
            more = small.options(choice)
            told.append((f"{fits[0]}, {more}" if more else fits[0], fits[1]))
    return told


def _first(
    smaller: Sequence[tuple[str, PriorConfig]], choice: Choice, cluster: Cluster, precision: Any
) -> tuple[str, Memory] | None:
    """The first that fits, by bisection: they are ordered from the largest to the smallest."""

    largest = smaller[0][1]
    held = footprint(largest, choice.micro_batch, choice.recompute, precision)

    def needed(model: PriorConfig) -> Memory:
        share = model.width * model.depth / (largest.width * largest.depth)  # near enough, and at once
        scaled = Footprint(round(held.partitioned * share), round(held.whole * share))
        suited = replace(choice, rank=choice.rank and paper_rank(model.width))
        return memory(model, suited, cluster, precision, scaled)

    at = bisect.bisect_left(smaller, True, key=lambda each: needed(each[1]).total <= cluster.memory)
    return (smaller[at][0], needed(smaller[at][1])) if at < len(smaller) else None


def _changes(choice: Choice, cluster: Cluster) -> Iterator[Choice]:
    stages = range(choice.stage, 4) if cluster.gpus > 1 else [choice.stage]
    moments = {choice.moments, "16bit"}
    recompute = {choice.recompute, True}
    batches = [b for b in range(1, choice.micro_batch + 1) if choice.micro_batch % b == 0]
    offload = {choice.offload, cluster.gpus > 1}
    ranks = {choice.rank, 0} if cluster.machines > 1 else {choice.rank}
    for each in itertools.product(stages, moments, recompute, batches, offload, ranks):
        if (other := Choice(*each)) != choice:
            yield other


def _changed(one: Choice, other: Choice) -> frozenset[str]:
    return frozenset(name for name, value in asdict(one).items() if asdict(other)[name] != value)


def _price(choice: Choice, other: Choice) -> float:
    """How much slower, roughly: the order in which changes are tried."""
    return (
        0.5 * (other.moments != choice.moments)
        + 1.0 * (other.stage - choice.stage)
        + 1.0 * math.log2(choice.micro_batch / other.micro_batch)
        + 3.0 * (other.recompute != choice.recompute)
        + 4.0 * (other.rank != choice.rank)
        + 6.0 * (other.offload != choice.offload)
    )


@dataclass(frozen=True)
class Plan:
    """Everything that `dalle plan` tells."""

    preset: str
    model: PriorConfig
    training: PriorTraining
    cluster: Cluster
    choice: Choice
    stages: dict[int, Memory]
    paper: Memory
    sent: Traffic
    cost: Cost
    cheaper: list[tuple[str, Memory]]

    @property
    def fits(self) -> bool:
        """Does the choice fit into a GPU?"""
        return self.stages[self.choice.stage].total <= self.cluster.memory


def make_plan(
    preset: str, cluster: Cluster, *, zero: int | None = None, rank: int | None = None,
    settings: tuple[str, ...] = (), precision: Any = "bf16",
) -> Plan:  # fmt: skip
    """Work out the plan of a preset on a cluster.

    Args:
        preset: of the prior.
        cluster: the machines.
        zero: stage; by default the lowest that fits, or 3.
        rank: total rank between machines; by default the paper's rule, 0 for none.
        settings: as for training.
        precision: of the products.

    Raises:
        ConfigError: an unknown preset or setting, or a batch that the GPUs cannot share.
    """
    model, training = named_preset(PRESETS, preset)
    sections = override({"model": model, "training": training}, settings)
    model, training = sections["model"], sections["training"]
    if preset in DVAE_PRESETS:
        dvae, _ = DVAE_PRESETS[preset]
        model = replace(
            model, grid=dvae.grid, image_vocab=dvae.vocab_size, text_vocab=training.bpe_vocab
        )  # fmt: skip
    if training.batch_size % cluster.gpus:
        raise ConfigError(
            f"batch_size={training.batch_size} cannot be shared by {cluster.gpus} GPUs: "
            f"use --set batch_size={max(1, training.batch_size // cluster.gpus) * cluster.gpus}"
        )
    local = training.batch_size // cluster.gpus
    micro = max(1, training.micro_batch // cluster.gpus) if training.micro_batch else local
    if rank is None:
        rank = paper_rank(model.width) if cluster.machines > 1 else 0
    choice = Choice(zero if zero is not None else 3, training.moments, training.recompute, micro, rank=rank)
    stages = {s: memory(model, replace(choice, stage=s), cluster, precision) for s in range(4)}
    if cluster.gpus == 1:
        stages, choice = {0: stages[0]}, replace(choice, stage=0)
    elif zero is None:
        suits = [s for s, needed in stages.items() if needed.total <= cluster.memory]
        choice = replace(choice, stage=min(suits, default=3))
    fits = stages[choice.stage].total <= cluster.memory
    shards = cluster.gpus // cluster.machines
    return Plan(
        preset, model, training, cluster, choice, stages,
        paper=paper_memory(model, micro, shards),
        sent=traffic(model, choice, cluster),
        cost=cost(model, training, choice, cluster),
        cheaper=[] if fits else cheaper(model, choice, cluster, precision),
    )  # fmt: skip


@dataclass(frozen=True)
class Proposal:
    """A run that a budget of hours allows."""

    preset: str
    batch_size: int
    steps: int
    epochs: float
    tokens_per_parameter: float
    hours: float


def propose(cluster: Cluster, pictures: int, hours: float, precision: Any = "bf16") -> Proposal:
    """The largest preset that fits, and that so many hours and pictures can train.

    It sees 20 tokens for each weight of its resblocks, without passing over the data more than 30 times.
    Where no preset can have that, the smallest one is proposed, for as many steps as there is time.

    Raises:
        ConfigError: there are no pictures, no time, or no preset that fits.
    """
    if pictures < 1 or hours <= 0:
        raise ConfigError(
            f"a proposal needs pictures and time; there are {pictures:,} pictures, {hours:g} hours"
        )
    found: Proposal | None = None
    for name, (model, training) in PRESETS.items():
        batch = max(1, round(training.batch_size / cluster.gpus)) * cluster.gpus
        try:
            plan = make_plan(name, cluster, settings=(f"batch_size={batch}",), precision=precision)
        except ConfigError:
            continue
        if not plan.fits:
            continue
        affordable = int(hours * 3600 / plan.cost.step_seconds)
        steps = min(affordable, EPOCHS * pictures // batch, training.steps)
        seen = steps * batch * model.length / parameters(model)[0]
        if found is None or (seen >= TOKENS_PER_PARAMETER and steps > 0):
            taken = steps * plan.cost.step_seconds / 3600
            found = Proposal(name, batch, steps, steps * batch / pictures, seen, taken)
    if found is None or found.steps < 1:
        raise ConfigError("no preset fits into this memory and these hours: more of either is needed")
    return found


def size_in_bytes(text: str) -> float:
    """`16GB` and the like in bytes. Raises `ConfigError` for anything else."""
    match = re.fullmatch(r"([0-9.]+) *([KMGT]?)(I?)B?", text.strip().upper())
    try:
        assert match is not None
        thousand = 1024 if match[3] else 1000
        return float(match[1]) * thousand ** " KMGT".index(match[2] or " ")
    except (AssertionError, ValueError):
        raise ConfigError(f"--memory {text!r} is no size; write it as 16GB or 40GiB") from None


def facts(plan: Plan, proposal: Proposal | None = None) -> dict[str, Any]:
    """The plan for machines."""
    matrices, rest = parameters(plan.model)

    def of(memory: Memory) -> dict[str, float]:
        return {**asdict(memory), "total": memory.total}

    shards = plan.cluster.gpus // plan.cluster.machines
    return {
        **({"proposal": asdict(proposal)} if proposal else {}),
        "preset": plan.preset,
        "parameters": {"resblocks": matrices, "rest": rest, "all": matrices + rest},
        "cluster": {**asdict(plan.cluster), "machines": plan.cluster.machines},
        "choice": asdict(plan.choice),
        "fits": plan.fits,
        "memory": {f"zero_{stage}": of(needed) for stage, needed in plan.stages.items()},
        "memory_of_the_paper": of(plan.paper),
        "compression": compression(plan.choice.rank, plan.model.width, shards) if plan.choice.rank else 0.0,
        "traffic": asdict(plan.sent),
        "cost": asdict(plan.cost),
        "steps": plan.training.steps,
        "batch_size": plan.training.batch_size,
        "cheaper": [{"change": change, "memory": of(needed)} for change, needed in plan.cheaper],
    }


def table(plan: Plan) -> Table:
    """Bytes of one GPU in gigabytes, by stage and kind."""
    kinds = ("weights", "gradients", "moments", "average", "errors", "activations", "buffers")
    short = {"gradients": "grads", "average": "EMA", "activations": "activ."}
    title = f"GB of one GPU that has {plan.cluster.memory / GB:.3g}"
    heads = ("", *(short.get(kind, kind) for kind in kinds), "total", "fits")
    drawn = Table(*heads, title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    rows = {f"ZeRO {stage}" if plan.cluster.gpus > 1 else "one GPU": m for stage, m in plan.stages.items()}
    for name, needed in {**rows, "the paper's": plan.paper}.items():
        cells = [f"{getattr(needed, kind) / GB:.2f}" for kind in kinds]
        fits = "yes" if needed.total <= plan.cluster.memory else "no"
        drawn.add_row(name, *cells, f"{needed.total / GB:.2f}", fits)
    return drawn


def words(plan: Plan) -> list[str]:
    """The plan for people, but for the table."""
    matrices, rest = parameters(plan.model)
    c, cluster, sent = plan.cost, plan.cluster, plan.sent
    machines = f"{cluster.machines} machine{'s' if cluster.machines > 1 else ''}"
    lines = [
        f"preset {plan.preset}: {(matrices + rest) / 1e9:.3g} billion parameters ({matrices / 1e9:.3g} in "
        f"matrices of resblocks), batch {plan.training.batch_size:,}, {plan.training.steps:,} steps",
        f"{cluster.gpus:,} GPUs in {machines}, {plan.choice.micro_batch} pictures in one pass of each",
    ]
    if cluster.gpus > 1:
        text = f"{sent.within / GB:.3g} GB by a GPU within its machine ({sent.within_seconds:.3g} s)"
        if cluster.machines > 1:
            text += f", {sent.between / GB:.3g} GB by a machine to others ({sent.between_seconds:.3g} s)"
        lines.append(f"sent in an update: {text}")
    if plan.choice.rank:
        saved = compression(plan.choice.rank, plan.model.width, cluster.gpus // cluster.machines)
        lines.append(
            f"compressed to rank {plan.choice.rank} between machines: {saved:.0%} fewer numbers, "
            f"{1 - sent.between / sent.plain_between:.0%} fewer bytes than plain fp32"
        )
    lines.append(
        f"a step takes {c.step_seconds:.3g} s ({c.compute_seconds:.3g} s of matrix products at "
        f"{cluster.rate / 1e12:.3g} TFLOP/s), the run {duration(c.days * 86_400)} and {c.flops:.2g} FLOPs "
        f"({c.flops_6nd:.2g} by 6ND)"
    )
    if plan.fits:
        lines.append(f"it fits: {'--zero ' + str(plan.choice.stage) if cluster.gpus > 1 else 'on one GPU'}")
    elif plan.cheaper:
        lacking = plan.stages[plan.choice.stage].total / GB
        lines.append(f"it does not fit: --zero {plan.choice.stage} needs {lacking:.1f} GB. What would fit:")
        lines += [f"  {change} ({needed.total / GB:.1f} GB)" for change, needed in plan.cheaper]
    else:
        lines.append("it does not fit, whatever is traded: a smaller preset, or more GPUs")
    return lines


def show(plan: Plan, proposal: Proposal | None = None) -> None:
    """Print the plan for people."""
    console, lines = Console(highlight=False), words(plan)
    if proposal:
        p = proposal
        lines.insert(
            0,
            f"proposed: --preset {p.preset} --set batch_size={p.batch_size} --steps {p.steps}: "
            f"{p.epochs:.2g} passes over the data, {p.tokens_per_parameter:.2g} tokens for each weight, "
            f"{duration(3600 * p.hours)}",
        )
    console.print(table(plan))
    for line in lines:
        console.print(Text(line), soft_wrap=True)
