"""How to train the prior, before anyone rents a machine: does it fit, what would, what do hours allow."""

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from dalle.cluster import Choice, Cluster
from dalle.config import override
from dalle.config import preset as named_preset
from dalle.errors import ConfigError
from dalle.forecast import Cost, Memory, Traffic, cost, memory, paper_memory, traffic
from dalle.low_rank import paper_rank
from dalle.precision import Arithmetic
from stage1_dvae.config import PRESETS as DVAE_PRESETS
from stage2_prior.config import PRESETS, PriorConfig, PriorTraining, over_codes
from stage2_prior.flops import flops
from stage2_prior.footprint import Footprint, footprint, parameters

TOKENS_PER_PARAMETER = 20  # of training, where the data allows (Hoffmann et al. 2022)
NOTHING = Footprint(0, 0)  # what is needed whatever a pass holds
EPOCHS = 30  # passes over the data beyond which more steps rather memorise


def cheaper(
    model: PriorConfig, choice: Choice, cluster: Cluster, precision: Arithmetic = "bf16"
) -> list[tuple[str, Memory]]:
    """Up to three changes that fit, with what they need.

    First those of the settings, cheapest first, none of which contains another; then the widest and the
    deepest model that fit with 16-bit moments.
    """
    found: list[tuple[Choice, Memory]] = []
    for other in sorted(_changes(choice, cluster), key=lambda c: _price(choice, c)):
        if len(found) == 3:
            break
        changed = _changed(choice, other)
        if any(_changed(choice, c) <= changed and c.micro_batch >= other.micro_batch for c, _ in found):
            continue
        if memory(model, other, cluster, precision, NOTHING).total > cluster.memory:
            continue  # to find the activations takes seconds
        needed = memory(model, other, cluster, precision)
        if needed.total <= cluster.memory:
            found.append((other, needed))
    told = [(other.options(choice), needed) for other, needed in found]
    stage = 3 if _shares(choice.weights, cluster) else choice.stage
    small = replace(choice, stage=stage, moments=_smallest_moments(choice))
    head = model.width // model.heads
    # The first of each is the model itself: the others' activations are taken in proportion to its own.
    narrower = [
        (f"--set width={head * n} --set heads={n}", replace(model, width=head * n, heads=n))
        for n in range(model.heads, 0, -1)
    ]
    shallower = [(f"--set depth={n}", replace(model, depth=n)) for n in range(model.depth, 0, -1)]
    for smaller in (narrower, shallower):
        if len(told) < 3 and (first := _first(smaller, small, cluster, precision)):
            words, suited, needed = first
            shrunk = "" if words == smaller[0][0] else words
            change = f"{shrunk} {suited.options(choice)}".strip()
            if change not in (each for each, _ in told):
                told.append((change, needed))
    return told


def _first(
    smaller: Sequence[tuple[str, PriorConfig]], choice: Choice, cluster: Cluster, precision: Arithmetic
) -> tuple[str, Choice, Memory] | None:
    """The first that fits, by bisection, largest first; with no larger a rank than the paper has for it."""
    largest = smaller[0][1]
    halved = choice.weights == "fp16"
    held = footprint(largest, choice.micro_batch, choice.recompute, precision, halved=halved)

    def suited(model: PriorConfig) -> Choice:
        return replace(choice, rank=min(choice.rank, paper_rank(model.width)))

    def needed(model: PriorConfig) -> Memory:
        share = model.width * model.depth / (largest.width * largest.depth)  # near enough, and at once
        scaled = Footprint(round(held.partitioned * share), round(held.whole * share))
        return memory(model, suited(model), cluster, precision, scaled)

    at = bisect.bisect_left(smaller, True, key=lambda each: needed(each[1]).total <= cluster.memory)
    if at == len(smaller):
        return None
    words, model = smaller[at]
    return words, suited(model), needed(model)


def _shares(weights: str, cluster: Cluster) -> bool:
    """Can ZeRO share anything out? It needs several GPUs and weights in fp32 (see `wiring.make_engine`)."""
    return cluster.gpus > 1 and weights == "fp32"


def _changes(choice: Choice, cluster: Cluster) -> Iterator[Choice]:
    shared = _shares(choice.weights, cluster)
    stages = range(choice.stage, 4) if shared else [choice.stage]
    moments = {choice.moments, _smallest_moments(choice)}
    recompute = {choice.recompute, True}
    batches = [b for b in range(1, choice.micro_batch + 1) if choice.micro_batch % b == 0]
    offload = {choice.offload, shared}
    ranks = {choice.rank, 0} if cluster.machines > 1 else {choice.rank}
    for stage, kind, again, batch, off, rank in itertools.product(
        stages, moments, recompute, batches, offload, ranks
    ):
        other = replace(
            choice, stage=stage, moments=kind, recompute=again, micro_batch=batch, offload=off, rank=rank
        )
        if other != choice and not (other.offload and (other.rank or other.muon)):  # see `wiring.make_engine`
            yield other


def _smallest_moments(choice: Choice) -> str:
    return choice.moments if choice.muon else "16bit"


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
    settings: tuple[str, ...] = (),
) -> Plan:  # fmt: skip
    """Work out the plan of a preset on a cluster.

    Args:
        preset: of the prior.
        cluster: the machines.
        zero: stage; by default the lowest that fits, or 3.
        rank: total rank between machines; 0 for none; by default that of the settings.
        settings: as for training.

    Raises:
        ConfigError: an unknown preset or setting, or a batch that the GPUs cannot share.
    """
    model, training = _trained(preset, settings)
    if training.batch_size % cluster.gpus:
        raise ConfigError(
            f"batch_size={training.batch_size} cannot be shared by {cluster.gpus} GPUs: "
            f"use --set batch_size={max(1, training.batch_size // cluster.gpus) * cluster.gpus}"
        )
    precision: Arithmetic = "bf16" if training.precision == "auto" else training.precision
    rank = training.compression_rank if rank is None else rank
    possible = range(4) if _shares(training.weights, cluster) else range(1)
    if training.weights == "fp16" and zero and cluster.gpus > 1:
        raise ConfigError(
            f"weights=fp16 needs the whole model on each GPU: --zero 0 in place of --zero {zero}"
        )
    choice = Choice(
        possible[-1] if zero is None else min(zero, possible[-1]), training.moments, training.recompute,
        training.pictures_at_once(cluster.gpus), training.offload == "cpu",
        rank=rank if cluster.machines > 1 else 0, muon=training.optimizer == "muon", weights=training.weights,
        factor_bytes=2 if training.compression_format == "16bit" else 4,
    )  # fmt: skip
    stages = {s: memory(model, replace(choice, stage=s), cluster, precision) for s in possible}
    if zero is None:
        suits = [s for s, needed in stages.items() if needed.total <= cluster.memory]
        choice = replace(choice, stage=min(suits, default=choice.stage))
    fits = stages[choice.stage].total <= cluster.memory
    return Plan(
        preset, model, training, cluster, choice, stages,
        paper=paper_memory(model, choice.micro_batch, cluster.local),
        sent=traffic(model, choice, cluster),
        cost=cost(model, training, choice, cluster),
        cheaper=[] if fits else cheaper(model, choice, cluster, precision),
    )  # fmt: skip


def _trained(preset: str, settings: tuple[str, ...] = ()) -> tuple[PriorConfig, PriorTraining]:
    """The prior of a preset over the codes of its dVAE."""
    model, training = named_preset(PRESETS, preset)
    sections = override({"model": model, "training": training}, settings)
    model, training = sections["model"], sections["training"]
    if preset in DVAE_PRESETS:
        dvae, _ = DVAE_PRESETS[preset]
        model = over_codes(model, training, dvae.grid, dvae.vocab_size)
    return model, training


@dataclass(frozen=True)
class Proposal:
    """A run that a budget of hours allows."""

    preset: str
    batch_size: int
    steps: int
    epochs: float
    tokens_per_parameter: float
    hours: float


def propose(cluster: Cluster, pictures: int, hours: float) -> Proposal:
    """The largest preset that fits, and that so many hours and pictures can train.

    It sees 20 tokens for each weight of its resblocks, without passing over the data more than 30 times.
    Where no preset can have that, the smallest one is proposed, for as many steps as there is time.

    Raises:
        ConfigError: there are no pictures, no time, or no preset that fits.
    """
    if pictures < 1 or not 0 < hours < math.inf:
        raise ConfigError(
            f"a proposal needs pictures and time; there are {pictures:,} pictures, {hours:g} hours"
        )
    found: Proposal | None = None
    for name in PRESETS:
        model, training = _trained(name)
        wanted = TOKENS_PER_PARAMETER * parameters(model)[0]
        products = hours * 3600 * cluster.gpus * cluster.rate
        if found and model.length * min(EPOCHS * pictures, products / flops(model, False)) < wanted:
            continue  # whether it fits or not, which takes seconds to find
        batch = max(1, round(training.batch_size / cluster.gpus)) * cluster.gpus
        try:
            plan = make_plan(name, cluster, settings=(f"batch_size={batch}",))
        except ConfigError:
            continue
        if not plan.fits:
            continue
        affordable = int(hours * 3600 / plan.cost.step_seconds)
        steps = min(affordable, EPOCHS * pictures // batch, training.steps)
        seen = steps * batch * model.length
        if found is None or (seen >= wanted and steps > 0):
            taken = steps * plan.cost.step_seconds / 3600
            found = Proposal(name, batch, steps, steps * batch / pictures, seen / parameters(model)[0], taken)
    if found is None or found.steps < 1:
        raise ConfigError("no preset fits into this memory and these hours: more of either is needed")
    return found
