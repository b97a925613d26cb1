"""The commands. Torch is imported inside them, so that `--help` answers at once."""

import gc
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dalle import __version__
from dalle.errors import DalleError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train a DALL·E of your own and draw with it: train-dvae, then train-prior, then sample.",
)

DEFAULT_RUN = Path("runs/default")

Run = Annotated[Path, typer.Option("--run", help="Run folder: everything of one model.")]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Pictures with captions: scenes (built in), a folder of images with .txt captions, a .jsonl, "
        ".csv or .tsv manifest, or WebDataset .tar shards. By default scenes, or what the run began with.",
        show_default=False,
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="tiny (two CPU cores, minutes), small (one GPU, hours), base (one machine of GPUs) or paper. "
        "By default the one that suits this machine.",
        show_default=False,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        "--steps", min=0, help="Updates in all; a new run's schedules scale with it.", show_default=False
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, such as --set lr=1e-3. Repeatable."),
]
Temperature = Annotated[
    float, typer.Option(help="Below 1: likelier and less varied codes; 0: always the likeliest.")
]
TopK = Annotated[int | None, typer.Option(help="Draw only from the K likeliest codes.", show_default=False)]
TopP = Annotated[
    float | None,
    typer.Option(
        help="Draw only from the likeliest codes that reach probability P; by default the run's own.",
        show_default=False,
    ),
]
Processes = Annotated[
    int | None,
    typer.Option(
        "--processes",
        min=1,
        help="Processes on this machine, one for each GPU. Leave it out under torchrun, deepspeed or srun, "
        "which start them themselves.",
        show_default=False,
    ),
]
Machines = Annotated[
    int | None,
    typer.Option(
        "--machines",
        min=1,
        help="Pretend that this machine is so many, each of --processes processes: to try how gradients are "
        "compressed between machines (--set compression_rank=…). Real ones are known by their launcher.",
        show_default=False,
    ),
]
Zero = Annotated[
    int | None,
    typer.Option(
        "--zero",
        min=0,
        max=3,
        help="What several processes partition (DeepSpeed ZeRO): 1 the optimizer's moments, 2 gradients too, "
        "3 weights too; 0 nothing. By default 1, or what the run has.",
        show_default=False,
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        help="Above 1: nearer to the caption and less varied; by default the run's own.",
        show_default=False,
    ),
]
ShowConfig = Annotated[
    bool, typer.Option("--show-config", help="Print every setting with the paper's value, and stop.")
]


@app.command()
def demo(
    minutes: Annotated[float, typer.Option(help="How long it may take, about.")] = 12.0,
    run: Annotated[Path, typer.Option("--run", help="Run folder of the demo.")] = Path("runs/demo"),
) -> None:
    """The whole road on built-in drawings: train both stages, draw unseen prompts, judge, write a report."""
    from dalle.demo import demo as whole_road

    if not whole_road(run, minutes):
        raise typer.Exit(1)
    typer.echo(run / "report.html")


@app.command()
def evaluate(
    run: Run = DEFAULT_RUN,
    prompts: Annotated[int, typer.Option(min=1, help="Of every kind.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Decides the noise.")] = 0,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    guidance: Guidance = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for report.html and report.json; by default the run's.", show_default=False
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures, for machines.")] = False,
) -> None:
    """Draw unseen prompts of the built-in scenes and judge them; writes report.html and report.json."""
    from dalle.builtin import FOLDER, find_run
    from dalle.report import judge_and_report
    from stage2_prior.sample import Sampling

    sampling = Sampling(temperature, top_k, top_p, guidance)
    command = f"dalle evaluate --run {run} --prompts {prompts} --seed {seed}"
    for option, value in (("top-k", top_k), ("top-p", top_p), ("guidance", guidance)):
        command += f" --{option} {value}" if value is not None else ""
    command += f" --temperature {temperature}" if temperature != 1 else ""
    found = find_run(run)
    folder = out or (Path("evaluation") if found == FOLDER else run)
    figures = judge_and_report(found, prompts, command, folder, seed=seed, sampling=sampling)
    if json:
        import json as encoder

        typer.echo(encoder.dumps(figures, indent=2))
    else:
        typer.echo(folder / "report.html")


@app.command("train-dvae")
def train_dvae(
    data: Data = None,
    run: Run = DEFAULT_RUN,
    preset: Preset = None,
    steps: Steps = None,
    settings: Settings = None,
    processes: Processes = None,
    zero: Zero = None,
    show_config: ShowConfig = False,
) -> None:
    """Stage 1: train the discrete VAE. The same command again goes on where it stopped."""
    _become_several(processes, show_config)
    from dalle.distributed import joined
    from dalle.runs import Options
    from stage1_dvae.train import resolve, train

    options = Options(run, data, preset, steps, _with_zero(settings, zero))
    if show_config:
        resolve(options).show()
        return
    with joined(processes):
        done = train(options)
    if not done:
        raise typer.Exit(1)


@app.command("train-prior")
def train_prior(
    data: Data = None,
    run: Run = DEFAULT_RUN,
    preset: Preset = None,
    steps: Steps = None,
    settings: Settings = None,
    processes: Processes = None,
    machines: Machines = None,
    zero: Zero = None,
    show_config: ShowConfig = False,
) -> None:
    """Stage 2: train the prior on the run's dVAE. The same command again goes on where it stopped."""
    _become_several(processes, show_config, machines)
    from dalle.checkpoint import read_json
    from dalle.distributed import joined
    from dalle.pipeline import codes_of
    from dalle.runs import Options, machine_preset
    from stage2_prior.train import resolve, train

    codes = codes_of(run)
    began = read_json(run / "dvae" / "config.json")
    imported = "training" not in began
    suits = {
        "preset": machine_preset() if imported else began["preset"],
        "data": "scenes" if imported else began["data"],
    }
    options = Options(run, data, preset, steps, _with_zero(settings, zero))
    if show_config:
        resolve(options, codes, **suits).show()
        return
    with joined(processes):
        done = train(options, codes, **suits)
    if not done:
        raise typer.Exit(1)


@app.command("verify-resume")
def verify_resume(
    run: Annotated[Path, typer.Argument(help="Run folder.")] = DEFAULT_RUN,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Replay three updates of each stage, with and without a stop: is what was saved all that counts?"""
    from dalle.checkpoint import state_folders
    from dalle.errors import CheckpointError
    from dalle.pipeline import codes_of
    from dalle.runs import Options
    from dalle.verify import verify_resume as verify
    from stage1_dvae.train import prepare as prepare_dvae
    from stage2_prior.train import prepare as prepare_prior

    def prior() -> Any:
        return prepare_prior(Options(run), codes_of(run), preset="tiny", data="scenes")  # it has its own

    stages = {"dvae": lambda: prepare_dvae(Options(run)), "prior": prior}
    saved = [stage for stage in stages if state_folders(run / stage / "state")]
    if not saved:
        raise CheckpointError(f"{run} has no training state: train it first")
    found = {stage: verify(stages[stage]) for stage in saved}
    if json:
        import json as encoder

        typer.echo(encoder.dumps(found, indent=2))
    else:
        for stage, difference in found.items():
            typer.echo(f"{stage}: {difference or 'identical'}")
    if any(found.values()):
        raise typer.Exit(1)


def _become_several(processes: int | None, show_config: bool, machines: int | None = None) -> None:
    """With --processes or --machines: run this command as so many processes, and end as they do."""
    from dalle.launch import launch, launched

    local, pretended = processes or 1, machines or 1
    if local * pretended > 1 and not launched() and not show_config:
        raise typer.Exit(launch(local, sys.argv[1:], machines=pretended))


def _with_zero(settings: list[str] | None, zero: int | None) -> tuple[str, ...]:
    return (*(settings or ()), *((f"zero={zero}",) if zero is not None else ()))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run folder of a trained model.")],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
) -> None:
    """What drawing needs of a run, to hand on: weights in 16 bits, no training states."""
    from dalle.builtin import export as write
    from dalle.console import say

    size = write(run, out)
    say(f"{size / 1e6:.1f} MB in {out}; draw with it: dalle sample PROMPT --run {out}")


@app.command()
def sample(
    prompts: Annotated[
        list[str],
        typer.Argument(
            metavar="PROMPT…", help="What to draw; - reads prompts from standard input, one a line."
        ),
    ],
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            help="Run folder, or scenes: the built-in model, which is the default without runs/default.",
            show_default=False,
        ),
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Pictures per prompt.")] = 1,
    seed: Annotated[
        int, typer.Option(min=0, help="Decides the noise: the same seed draws the same pictures.")
    ] = 0,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    guidance: Guidance = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the pictures; by default R/samples, or samples for the built-in model.",
            show_default=False,
        ),
    ] = None,
    at_once: Annotated[
        int, typer.Option(min=1, help="Pictures drawn side by side: more are faster, and need more memory.")
    ] = 16,
    weights: Annotated[
        Literal["auto", "fp32", "fp16", "bf16", "int8"],
        typer.Option(
            help="The prior's weights while it draws. auto: the fastest form that changes none of them, or "
            "bf16 where the machine computes in it; int8 rounds them to 8 bits."
        ),
    ] = "auto",
    preview: Annotated[
        bool, typer.Option("--preview", help="Show what is drawn so far in preview.png, every few rows.")
    ] = False,
) -> None:
    """Draw pictures for prompts; prints the paths of the PNGs, and of a sheet of all if they are several."""
    from dalle.builtin import ABOUT, FOLDER, NAME, find_run
    from dalle.console import Bar, say
    from dalle.drawings import previewing, save_drawings
    from dalle.pipeline import TextToImage
    from stage2_prior.sample import Sampling

    wanted = [p for given in prompts for p in (_standard_input() if given == "-" else [given])]
    wanted = [p.strip().encode("utf-8", "replace").decode("utf-8") for p in wanted if p.strip()]
    if not wanted:
        raise DalleError('no prompt was given; say what to draw, such as: dalle sample "a red circle"')
    sampling = Sampling(temperature, top_k, top_p, guidance)
    if run is None and not DEFAULT_RUN.exists():
        say(f"drawing with the built-in model, which knows {ABOUT}; dalle train-dvae begins one of your own")
        run = Path(NAME)
    run = find_run(run or DEFAULT_RUN)
    builtin = run == FOLDER
    out = out or (Path("samples") if builtin else run / "samples")
    model = TextToImage.load(run, weights=weights, at_once=at_once)
    captions = [prompt for prompt in wanted for _ in range(n)]
    total = len(captions) * model.prior.config.cells
    with Bar("drawing", total, unit="tokens") as bar, previewing(out, captions, preview) as shown:
        pictures = model(wanted, n, seed=seed, sampling=sampling, on_token=bar.advance, preview=shown)
    how = model.resolve(sampling)
    made = {
        "run": NAME if builtin else str(run),
        "seed": seed,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": how.top_p,
        "guidance": how.guidance,
    }
    paths = save_drawings(out, pictures, captions, n, made)
    say(f"drew {len(pictures)} picture{'s' if len(pictures) > 1 else ''} in {bar.clock.seconds:.1f} s")
    for path in paths:
        typer.echo(path)


def _standard_input() -> list[str]:
    """Its lines; what is not UTF-8 becomes a replacement character."""
    return sys.stdin.buffer.read().decode("utf-8", "replace").splitlines()


@app.command()
def reconstruct(
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE…", help="Pictures to pass through the dVAE and back.")
    ],
    run: Run = DEFAULT_RUN,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results; by default R/reconstructions.", show_default=False),
    ] = None,
) -> None:
    """Pictures through the dVAE and back; prints the path of each pair, before and after."""
    from dalle.builtin import find_run
    from dalle.drawings import save_reconstructions
    from dalle.precision import best_device
    from stage1_dvae.model import DVAE

    model = DVAE.load(find_run(run) / "dvae", best_device())
    for path in save_reconstructions(out or run / "reconstructions", model, images):
        typer.echo(path)


@app.command("import-dvae")
def import_dvae(
    encoder: Annotated[Path, typer.Option(help="OpenAI's encoder.pkl.")],
    decoder: Annotated[Path, typer.Option(help="OpenAI's decoder.pkl.")],
    run: Run,
) -> None:
    """Take over OpenAI's released dVAE. Nothing in the two files is executed: only tensors are read."""
    from dalle.console import say
    from stage1_dvae.released import import_released

    config = import_released(encoder, decoder, run / "dvae")
    shape = f"{config.image_size}×{config.image_size} pixels ↔ {config.grid}×{config.grid} codes"
    say(
        f"imported into {run / 'dvae'}: {shape} of {config.vocab_size:,}; next: dalle train-prior --run {run}"
    )


@app.command()
def info(
    run: Annotated[Path, typer.Argument(help="Run folder.")] = DEFAULT_RUN,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """What a run folder holds: shapes, parameters, steps, data, the last metrics."""
    from dalle.builtin import find_run
    from dalle.info import describe_run, facts_of_run

    facts = facts_of_run(find_run(run))
    if json:
        import json as encoder

        typer.echo(encoder.dumps(facts, indent=2))
    else:
        typer.echo(describe_run(facts))


@app.command()
def bench(
    json: Annotated[bool, typer.Option("--json", help="For machines, on standard output.")] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for a dated JSON file and the table.", show_default=False),
    ] = None,
) -> None:
    """Measure training, drawing, the dVAE and data reading, beside what this machine reaches: 2 minutes."""
    from dalle.bench import bench as measure
    from dalle.bench import report

    result = measure()
    if json:
        import json as encoder

        typer.echo(encoder.dumps(result, indent=2))
    if (path := report(result, out, quiet=json)) is not None:
        typer.echo(f"written to {path}", err=True)


@app.command()
def plan(
    preset: Annotated[str, typer.Option(help="Of the prior: tiny, small, base or paper.")] = "paper",
    gpus: Annotated[int, typer.Option(min=1, help="GPUs in all.")] = 1,
    gpus_per_machine: Annotated[int, typer.Option(min=1, help="GPUs of one machine.")] = 8,
    memory: Annotated[str, typer.Option(help="Memory of one GPU, such as 16GB.")] = "16GB",
    zero: Annotated[
        int | None,
        typer.Option(min=0, max=3, help="ZeRO stage; by default the lowest that fits.", show_default=False),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=0, help="Total rank of gradients between machines; 0: in full. By default the paper's rule.",
            show_default=False,
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            help="TFLOP/s of one GPU's matrix products; by default measured on this machine.",
            show_default=False,
        ),
    ] = None,
    within: Annotated[float, typer.Option(help="GB/s that a GPU sends within its machine.")] = 100.0,
    between: Annotated[float, typer.Option(help="GB/s that a machine sends to others.")] = 12.5,
    data: Data = None,
    hours: Annotated[
        float | None,
        typer.Option(help="Propose preset, batch and steps for --data in so many hours.", show_default=False),
    ] = None,
    settings: Settings = None,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:  # fmt: skip
    """What a training of the prior takes: memory of each GPU, traffic, time; and what would fit."""
    from dalle.ceiling import gemm_rate
    from dalle.cluster import Cluster, size_in_bytes
    from dalle.data.open import open_source
    from dalle.plan import make_plan, propose
    from dalle.plan_report import facts, show
    from dalle.precision import best_device, choose

    device = best_device()
    speed = rate * 1e12 if rate is not None else gemm_rate(device, choose("auto", device))
    cluster = Cluster(gpus, gpus_per_machine, size_in_bytes(memory), within * 1e9, between * 1e9, speed)
    if (data is None) != (hours is None):
        raise DalleError("--data and --hours go together: both are needed to propose a run")
    made = None
    if data is not None and hours is not None:
        made = propose(cluster, len(open_source(data, "train", 256)), hours)
        preset, settings = made.preset, [f"batch_size={made.batch_size}", f"steps={made.steps}"]
    worked_out = make_plan(preset, cluster, zero=zero, rank=rank, settings=tuple(settings or ()))
    if json:
        import json as encoder

        typer.echo(encoder.dumps(facts(worked_out, made), indent=2))
    else:
        show(worked_out, made)


@app.command("audit-precision")
def audit_precision(
    run: Annotated[Path, typer.Argument(help="Run folder of a trained model.")] = DEFAULT_RUN,
    batches: Annotated[int, typer.Option(min=1, help="Batches to look at.")] = 4,
    data: Data = None,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Which gradients of the prior fp16 would lose: under one scale, and under one for each resblock."""
    from dalle.audit import describe
    from dalle.builtin import find_run
    from dalle.pipeline import codes_of
    from stage2_prior.audit import audit

    found = find_run(run)
    facts = {"run": str(run), **audit(found / "prior", codes_of(found), batches, data)}
    if json:
        import json as encoder

        typer.echo(encoder.dumps(facts, indent=2))
    else:
        typer.echo(describe(facts))


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"dalle {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The console script: a caller's mistake is one line and exit status 2."""
    # Threads that spin while they wait lose most of a busy machine; read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `dalle … | head` is no error
    try:
        app()
    except DalleError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _end(1)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            _fail(
                "the device's memory is too small: use a smaller --set micro_batch=… or --set recompute=true"
            )
        _end_of_one_among_several(error)
        raise
    finally:
        gc.freeze()  # or the interpreter looks through all of torch once more at its end: 0.4 s


def _end_of_one_among_several(error: Exception) -> None:
    """Where another process ended, this one cannot go on: it says so, and leaves the reason to that one."""
    from dalle.launch import LOST, launched

    if launched():
        if any(word in str(error) for word in ("gloo", "NCCL", "Connection closed", "Connection reset")):
            typer.echo("this process lost the others of its run, and ends", err=True)
            _end(LOST)
        traceback.print_exc()
        _end(1)


def _fail(message: str) -> Any:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    _end(2)


def _end(status: int) -> None:
    """Leave; one among several without waiting for the others, which notice."""
    from dalle.launch import launched

    if launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
