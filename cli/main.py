"""The commands. Torch is imported inside them, so that `--help` answers at once."""

import os
import signal
import sys
from io import TextIOWrapper
from json import dumps
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from cli import options as opt
from cli.ending import ending
from dalle import __version__
from dalle.errors import DalleError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train a DALL·E of your own and draw with it: train-dvae, then train-prior, then sample.",
)
DEFAULT_RUN = Path("runs/default")


@app.command()
def demo(minutes: opt.Minutes = 12.0, run: opt.DemoRun = Path("runs/demo")) -> None:
    """The whole road on built-in drawings: train both stages, draw unseen prompts, judge, write a report.

    The same command again goes on where it stopped.
    """
    from dalle.demo import demo as whole_road

    if not whole_road(run, minutes):
        raise typer.Exit(1)
    _echo_path(run / "report.html")


@app.command()
def evaluate(
    run: opt.TrainedRun = DEFAULT_RUN,
    prompts: opt.PromptsOfAKind = 100,
    seed: opt.Seed = 0,
    temperature: opt.Temperature = 1.0,
    top_k: opt.TopK = None,
    top_p: opt.TopP = None,
    guidance: opt.Guidance = None,
    out: opt.ReportFolder = None,
    json: opt.Json = False,
) -> None:
    """Draw prompts of the built-in scenes that training never saw, judge each picture, write a report.

    For models trained on scenes. Prints the path of report.html; report.json lies beside it.
    """
    from dalle.builtin import FOLDER, find_run
    from dalle.process import suit_computing
    from dalle.report import judge_and_report
    from stage2_prior.sample import Sampling

    sampling = Sampling(temperature, top_k, top_p, guidance)
    command = f"dalle evaluate --run {quote(str(run))} --prompts {prompts} --seed {seed}"
    for option, value in (("top-k", top_k), ("top-p", top_p), ("guidance", guidance)):
        command += f" --{option} {value}" if value is not None else ""
    command += f" --temperature {temperature}" if temperature != 1 else ""
    suit_computing()
    found = find_run(run)
    folder = out or (Path("evaluation") if found == FOLDER else run)
    figures = judge_and_report(found, prompts, command, folder, seed=seed, sampling=sampling)
    if json:
        _echo_json(figures)
    else:
        _echo_path(folder / "report.html")


@app.command("train-dvae")
def train_dvae(
    data: opt.Data = None,
    run: opt.Run = DEFAULT_RUN,
    preset: opt.Preset = None,
    steps: opt.Steps = None,
    minutes: opt.TrainingMinutes = None,
    settings: opt.Settings = None,
    processes: opt.Processes = None,
    zero: opt.Zero = None,
    show_config: opt.ShowConfig = False,
) -> None:
    """Stage 1: train the discrete VAE. The same command again goes on where it stopped."""
    _become_several(processes, show_config)
    from dalle.distributed import joined
    from dalle.runs import Options
    from stage1_dvae.train import resolve, train

    options = Options(run, data, preset, steps, _with_zero(settings, zero), minutes)
    if show_config:
        resolve(options).show()
        return
    with joined(processes):
        done = train(options)
    if not done:
        raise typer.Exit(1)


@app.command("train-prior")
def train_prior(
    data: opt.Data = None,
    run: opt.Run = DEFAULT_RUN,
    preset: opt.Preset = None,
    steps: opt.Steps = None,
    minutes: opt.TrainingMinutes = None,
    settings: opt.Settings = None,
    processes: opt.Processes = None,
    machines: opt.Machines = None,
    zero: opt.Zero = None,
    grow_from: opt.GrowFrom = None,
    show_config: opt.ShowConfig = False,
) -> None:
    """Stage 2: train the prior on the run's dVAE. The same command again goes on where it stopped."""
    _become_several(processes, show_config, machines)
    from dalle.checkpoint import read_json
    from dalle.distributed import joined
    from dalle.pipeline import coarse_of, codec_of
    from dalle.runs import Options, begun, machine_preset
    from stage1_dvae.train import check_settled
    from stage2_prior.train import resolve, train

    options = Options(run, data, preset, steps, _with_zero(settings, zero), minutes)
    if show_config and not (run / "dvae" / "weights.safetensors").is_file():
        _show_without_dvae(options)
        return
    with joined(None if show_config else processes):  # first: it decides which GPU is this process' own
        codec = codec_of(run)
        began = read_json(run / "dvae" / "config.json")
        imported = "training" not in began
        suits = {
            "preset": machine_preset() if imported else began.get("preset", machine_preset()),
            "data": "scenes" if imported else began.get("data", "scenes"),
        }
        if show_config:
            resolve(options, codec, **suits).show()
            return
        if not begun(run / "prior"):
            check_settled(run)
        done = train(options, codec, **suits, coarse=coarse_of(grow_from) if grow_from else None)
    if not done:
        raise typer.Exit(1)


@app.command("verify-resume")
def verify_resume(
    run: opt.RunArgument = DEFAULT_RUN,
    json: opt.Json = False,
) -> None:
    """Check that a stop changes nothing: make the next three updates with and without one, and compare.

    Both stages are tried; nothing in the run folder changes. Exits with 1 where anything differs.
    """
    from dalle.errors import CheckpointError
    from dalle.pipeline import codec_of
    from dalle.runs import Options
    from dalle.states import state_folders
    from dalle.verify import verify_resume as verify
    from stage1_dvae.train import prepare as prepare_dvae
    from stage2_prior.train import prepare as prepare_prior

    def prior() -> Any:
        return prepare_prior(Options(run), codec_of(run), preset="tiny", data="scenes")  # it has its own

    stages = {"dvae": lambda: prepare_dvae(Options(run)), "prior": prior}
    saved = [stage for stage in stages if state_folders(run / stage / "state")]
    if not saved:
        raise CheckpointError(f"{run} has no training state: train it first")
    found = {stage: verify(stages[stage]) for stage in saved}
    if json:
        _echo_json(found)
    else:
        for stage, difference in found.items():
            typer.echo(f"{stage}: {difference or 'identical'}")
    if any(found.values()):
        raise typer.Exit(1)


def _show_without_dvae(options: Any) -> None:
    """The settings of a prior whose dVAE is not trained yet: its codes are those of the preset's dVAE."""
    from dataclasses import replace

    from dalle.console import say
    from dalle.runs import machine_preset, resolve_run
    from stage1_dvae.config import PRESETS as DVAE_PRESETS
    from stage2_prior.config import PRESETS, over_codes

    shown = resolve_run(options, "prior", PRESETS, default_preset=machine_preset())
    if not shown.resumed:
        dvae, _ = DVAE_PRESETS[shown.preset]
        model = over_codes(shown.model, shown.training, dvae.grid, dvae.vocab_size)
        shown = replace(shown, model=model)
        say(f"{options.run} holds no trained dvae: grid and image_vocab are those of the preset's")
    shown.show()


def _echo_json(found: Any) -> None:
    typer.echo(dumps(found, indent=2))


def _echo_path(path: Path) -> None:
    typer.echo(os.fsencode(path))  # whatever bytes its name is of: other programs can open what they read


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
    run: opt.TrainedRunArgument,
    out: opt.NewFolder,
) -> None:
    """Copy what drawing needs of a run, to hand on: weights in 16 bits, no training states."""
    from dalle.console import say
    from dalle.export import export as write

    size = write(run, out)
    say(f"{size / 1e6:.1f} MB in {out}; draw with it: dalle sample PROMPT --run {quote(str(out))}")


@app.command()
def sample(
    prompts: opt.Prompts,
    run: opt.DrawingRun = None,
    n: opt.PerPrompt = 1,
    seed: opt.Seed = 0,
    temperature: opt.Temperature = 1.0,
    top_k: opt.TopK = None,
    top_p: opt.TopP = None,
    guidance: opt.Guidance = None,
    out: opt.SampleFolder = None,
    at_once: opt.AtOnce = 16,
    weights: opt.DrawingWeights = "auto",
    preview: opt.Preview = False,
) -> None:
    """Draw pictures for prompts; prints the path of each PNG and, for several, of a sheet that shows all.

    A .json beside each says how it was made.
    """
    from dalle.builtin import ABOUT, FOLDER, NAME, find_run
    from dalle.checkpoint import fingerprint, refuse_unwritable
    from dalle.console import Bar, say
    from dalle.drawings import previewing, readable, save_drawings
    from dalle.pipeline import TextToImage
    from dalle.process import suit_computing
    from stage2_prior.sample import Sampling

    wanted = [p for given in prompts for p in (_standard_input() if given == "-" else [given])]
    wanted = [p.strip().encode("utf-8", "replace").decode("utf-8") for p in wanted if p.strip()]
    wanted = list(dict.fromkeys(wanted))  # a prompt given twice would be the same pictures twice
    if not wanted:
        raise DalleError('no prompt was given; say what to draw, such as: dalle sample "a red circle"')
    sampling = Sampling(temperature, top_k, top_p, guidance)
    if run is None and not DEFAULT_RUN.exists():
        say(f"drawing with the built-in model, which knows {ABOUT}; dalle train-dvae begins one of your own")
        run = FOLDER
    run = find_run(run or DEFAULT_RUN)
    builtin = run == FOLDER
    out = out or (Path("samples") if builtin else run / "samples")
    refuse_unwritable(out)
    suit_computing()
    model = TextToImage.load(run, weights=weights, at_once=at_once)
    captions = [prompt for prompt in wanted for _ in range(n)]
    total = len(captions) * model.prior.config.cells
    how = model.resolve(sampling)
    made = {
        "run": NAME if builtin else readable(run),
        "prior": fingerprint(run / "prior" / "weights.safetensors"),
        "weights": weights,
        "seed": seed,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": how.top_p,
        "guidance": how.guidance,
    }
    with Bar("drawing", total, unit="tokens") as bar, previewing(out, captions, preview) as shown:
        pictures = model.stream(wanted, n, seed=seed, sampling=sampling, on_token=bar.advance, preview=shown)
        paths = save_drawings(out, pictures, captions, n, made)
    say(f"drew {len(captions)} picture{'s' if len(captions) > 1 else ''} in {bar.clock.seconds:.1f} s")
    for path in paths:
        _echo_path(path)


def _standard_input() -> list[str]:
    """Its lines, none where it is closed; what is not UTF-8 becomes a replacement character."""
    from dalle.data.captions import lines

    return [] if sys.stdin is None else lines(sys.stdin.buffer.read().decode("utf-8-sig", "replace"))


@app.command()
def reconstruct(
    images: opt.Images,
    run: opt.TrainedRun = DEFAULT_RUN,
    out: opt.ReconstructionFolder = None,
) -> None:
    """Pass pictures through the dVAE and back; prints the path of each pair, before and after."""
    from dalle.builtin import FOLDER, find_run
    from dalle.checkpoint import refuse_unwritable
    from dalle.drawings import readable, save_reconstructions
    from dalle.pipeline import fingerprint_of
    from dalle.precision import best_device
    from stage1_dvae.model import DVAE

    found = find_run(run)
    model = DVAE.load(found / "dvae", best_device())
    folder = out or (Path() if found == FOLDER else run) / "reconstructions"
    refuse_unwritable(folder)
    made = {"run": readable(run), "dvae": fingerprint_of(found)}
    for path in save_reconstructions(folder, model, images, made):
        _echo_path(path)


@app.command("import-dvae")
def import_dvae(
    encoder: opt.EncoderFile,
    decoder: opt.DecoderFile,
    run: opt.Run,
) -> None:
    """Put OpenAI's released dVAE into a run, in place of train-dvae.

    Nothing in the two files is executed: only tensors are read.
    """
    from dalle.console import say
    from stage1_dvae.released import import_released

    config = import_released(encoder, decoder, run / "dvae")
    shape = f"{config.image_size}×{config.image_size} pixels ↔ {config.grid}×{config.grid} codes"
    say(
        f"imported into {run / 'dvae'}: {shape} of {config.vocab_size:,}; next: "
        f"dalle train-prior --run {quote(str(run))}"
    )


@app.command()
def info(
    run: opt.TrainedRunArgument = DEFAULT_RUN,
    json: opt.Json = False,
) -> None:
    """What a run folder holds: shapes, parameters, steps, data, the last metrics."""
    from dalle.builtin import find_run
    from dalle.info import describe_run, facts_of_run

    facts = facts_of_run(find_run(run))
    if json:
        _echo_json(facts)
    else:
        typer.echo(describe_run(facts))


@app.command()
def bench(
    json: opt.Json = False,
    out: opt.BenchFolder = None,
) -> None:
    """Measure how fast this machine trains, draws, encodes and reads, beside its limits: 2 minutes."""
    from rich.console import Console

    from dalle.bench import bench as measure
    from dalle.bench import save, table
    from dalle.checkpoint import refuse_unwritable

    if out is not None:
        refuse_unwritable(out)
    result = measure()
    if json:
        _echo_json(result)
    else:
        Console().print(table(result))
    if out is not None:
        typer.echo(f"written to {save(result, out)}", err=True)


@app.command()
def plan(
    preset: opt.PlannedPreset = None,
    gpus: opt.Gpus = 1,
    gpus_per_machine: opt.GpusPerMachine = 8,
    memory: opt.GpuMemory = "16GB",
    zero: opt.PlannedZero = None,
    rank: opt.Rank = None,
    rate: opt.Rate = None,
    within: opt.Within = 100.0,
    between: opt.Between = 12.5,
    data: opt.PlannedData = None,
    hours: opt.Hours = None,
    settings: opt.Settings = None,
    json: opt.Json = False,
) -> None:
    """What training the prior will take, before it is begun: memory of each GPU, traffic, time; what fits."""
    from dalle.ceiling import gemm_rate
    from dalle.cluster import Cluster, size_in_bytes
    from dalle.data.open import open_source
    from dalle.plan import make_plan, propose
    from dalle.plan_report import facts, show
    from dalle.precision import best_device, choose

    if (data is None) != (hours is None):
        raise DalleError("--data and --hours go together: both are needed to propose a run")
    if hours is not None and (preset or settings or zero is not None or rank is not None):
        raise DalleError(
            "--data and --hours propose what to train and how: leave out --preset, --set, --zero and --rank, "
            "or plan with these alone"
        )
    device = best_device()
    speed = rate * 1e12 if rate is not None else gemm_rate(device, choose("auto", device))
    cluster = Cluster(gpus, gpus_per_machine, size_in_bytes(memory), within * 1e9, between * 1e9, speed)
    made = None
    if data is not None and hours is not None:
        made = propose(cluster, len(open_source(data, "train", 256)), hours)
        preset, settings = made.preset, [f"batch_size={made.batch_size}", f"steps={made.steps}"]
    worked_out = make_plan(preset or "paper", cluster, zero=zero, rank=rank, settings=tuple(settings or ()))
    if json:
        _echo_json(facts(worked_out, made))
    else:
        show(worked_out, made)


@app.command("audit-precision")
def audit_precision(
    run: opt.TrainedRunArgument = DEFAULT_RUN,
    batches: opt.Batches = 4,
    data: opt.AuditedData = None,
    json: opt.Json = False,
) -> None:
    """Count gradients of the prior that fp16 would lose: under one scale, and under one for each resblock."""
    from dalle.audit import describe
    from dalle.builtin import find_run
    from dalle.pipeline import codec_of
    from stage2_prior.audit import audit

    found = find_run(run)
    facts = {"run": str(run), **audit(found / "prior", codec_of(found), batches, data)}
    if json:
        _echo_json(facts)
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
    """The console script."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # Threads that spin while they wait lose most of a busy machine, and those that sleep at once wake too
        # late for the next small product, so they spin for some 0.2 ms. Read when torch is first imported.
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `dalle … | head` is no error
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a console may lack some of our letters
    with ending():
        app()


if __name__ == "__main__":
    main()
