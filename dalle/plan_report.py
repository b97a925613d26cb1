"""A plan as people and programs read it."""

from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dalle.console import duration
from dalle.forecast import Memory, compression
from dalle.plan import Plan, Proposal
from stage2_prior.footprint import parameters

GB = 1e9


def facts(plan: Plan, proposal: Proposal | None = None) -> dict[str, Any]:
    """The plan for machines."""
    matrices, rest = parameters(plan.model)

    def of(memory: Memory) -> dict[str, float]:
        return {**asdict(memory), "total": memory.total}

    return {
        **({"proposal": asdict(proposal)} if proposal else {}),
        "preset": plan.preset,
        "parameters": {"resblocks": matrices, "rest": rest, "all": matrices + rest},
        "cluster": {**asdict(plan.cluster), "machines": plan.cluster.machines},
        "choice": asdict(plan.choice),
        "fits": plan.fits,
        "memory": {f"zero_{stage}": of(needed) for stage, needed in plan.stages.items()},
        "memory_of_the_paper": of(plan.paper),
        "compression": 1 - plan.sent.kept,
        "compression_of_the_paper": (
            compression(plan.choice.rank, plan.model.width, plan.cluster.local) if plan.choice.rank else 0.0
        ),
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
        paper = 1 - compression(plan.choice.rank, plan.model.width, cluster.local)
        lines.append(
            f"compressed to rank {plan.choice.rank} between machines: {sent.kept:.0%} of the numbers of "
            f"matrices ({paper:.0%} as the paper cuts them), {sent.between / sent.plain_between:.0%} of the "
            "bytes of plain fp32"
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
