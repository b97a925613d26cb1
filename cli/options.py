"""Options and arguments of the commands, with what `--help` says of them."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from dalle.errors import DalleError


def _home(path: Path | None) -> Path | None:
    """With ~ for the home directory, which no shell replaces in --run=~/mine."""
    return None if path is None else Path(os.path.expanduser(path))


# a run, and what it is trained with
Run = Annotated[
    Path,
    typer.Option("--run", callback=_home, help="Run folder, which holds everything of one model."),
]
RunArgument = Annotated[Path, typer.Argument(help="Run folder.")]
TRAINED = "Run folder, or scenes: the built-in model."
TrainedRun = Annotated[Path, typer.Option("--run", callback=_home, help=TRAINED)]
TrainedRunArgument = Annotated[Path, typer.Argument(help=TRAINED)]
KINDS = (
    "Pictures with captions: scenes (built in), a folder of images with .txt captions, a .jsonl, .csv or "
    ".tsv manifest, or WebDataset .tar shards."
)
Data = Annotated[
    str | None,
    typer.Option(
        "--data", help=f"{KINDS} By default scenes, or what the run began with.", show_default=False
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="tiny (two CPU cores, minutes), small (one GPU, hours), base (one machine of GPUs) or paper. "
        "By default what the run began with, or the one that suits this machine; for the prior that of its "
        "dVAE.",
        show_default=False,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        "--steps",
        min=0,
        help="Updates in all, with those already made; a new run's schedules scale with it.",
        show_default=False,
    ),
]
TrainingMinutes = Annotated[
    float | None,
    typer.Option(
        "--minutes",
        help="In place of --steps: train for so many minutes, once the data are read. The number of updates "
        "and a new run's schedules are fitted to them on the way.",
        show_default=False,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a setting, such as --set lr=1e-3; --show-config of a training lists all. Repeatable.",
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
        help="What several processes divide among them in place of each holding all of it (DeepSpeed ZeRO): "
        "0 nothing, 1 the optimizer's moments, 2 gradients too, 3 weights too. By default what the run has, "
        "or 1; 3 for the prior of the preset paper.",
        show_default=False,
    ),
]
GrowFrom = Annotated[
    Path | None,
    typer.Option(
        "--grow-from",
        callback=_home,
        help="Run folder of another model: the new prior begins with what that one's has learned, and has "
        "its tokenizer. Size of pictures, text_length, depth, width and heads must be the same, the codes of "
        "that one a whole number of times coarser. scenes: the built-in model.",
        show_default=False,
    ),
]
ShowConfig = Annotated[
    bool,
    typer.Option(
        "--show-config", help="Print every setting, its meaning and the paper's value; train nothing."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")]

# demo
Minutes = Annotated[float, typer.Option(help="About how many minutes it may take.")]
DemoRun = Annotated[Path, typer.Option("--run", callback=_home, help="Run folder of the demo.")]

# drawing: sample and evaluate
Temperature = Annotated[
    float,
    typer.Option(
        help="1: as learned; below: likelier and less varied pictures; 0: always the likeliest code."
    ),
]
TopK = Annotated[int | None, typer.Option(help="Draw only from the K likeliest codes.", show_default=False)]
TopP = Annotated[
    float | None,
    typer.Option(
        help="Draw only from the likeliest codes that together have probability P: less varied pictures; 1: "
        "from all. By default the run's own.",
        show_default=False,
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        help="Above 1: pictures nearer to the caption and less varied; by default the run's own.",
        show_default=False,
    ),
]
Seed = Annotated[
    int,
    typer.Option(min=0, max=2**63 - 1, help="Decides the noise: the same seed draws the same pictures."),
]
Prompts = Annotated[
    list[str],
    typer.Argument(metavar="PROMPT…", help="What to draw; - reads prompts from standard input, one a line."),
]
DrawingRun = Annotated[
    Path | None,
    typer.Option(
        "--run",
        callback=_home,
        help="Run folder, or scenes: the built-in model, which is the default without runs/default.",
        show_default=False,
    ),
]
PerPrompt = Annotated[int, typer.Option("-n", min=1, help="Pictures per prompt.")]
AtOnce = Annotated[
    int, typer.Option(min=1, help="Pictures drawn side by side: more are faster, and need more memory.")
]
DrawingWeights = Annotated[
    Literal["auto", "fp32", "fp16", "bf16", "int8", "int4"],
    typer.Option(
        help="Number format of the prior's weights. auto: as saved on a CPU, bf16 on a GPU. On CPUs int8 and "
        "int4 are faster, and bf16 helps only large models drawing many pictures; GPUs have bf16 and fp32."
    ),
]
Preview = Annotated[
    bool,
    typer.Option(
        "--preview",
        help="Every few rows, show what is drawn so far in preview.png, beside where the pictures will be.",
    ),
]
PromptsOfAKind = Annotated[int, typer.Option(min=1, help="Prompts to draw of each of the six kinds.")]


# where results go
def _folder(path: Path | None) -> Path | None:
    path = _home(path)
    if path is not None and path.suffix.lower() in (".png", ".jpg", ".html", ".json") and not path.is_dir():
        raise DalleError(f"--out {path} is a name for a file; give a folder, whose files are named for you")
    return path


SampleFolder = Annotated[
    Path | None,
    typer.Option(
        callback=_folder,
        help="Folder for the pictures; by default samples in the run folder; samples in the working "
        "directory for the built-in model.",
        show_default=False,
    ),
]
ReconstructionFolder = Annotated[
    Path | None,
    typer.Option(
        callback=_folder,
        help="Folder for the pairs; by default reconstructions in the run folder; reconstructions in the "
        "working directory for the built-in model.",
        show_default=False,
    ),
]
ReportFolder = Annotated[
    Path | None,
    typer.Option(
        callback=_folder,
        help="Folder for report.html and report.json; by default the run folder; evaluation in the working "
        "directory for the built-in model.",
        show_default=False,
    ),
]
BenchFolder = Annotated[
    Path | None,
    typer.Option(
        "--out",
        callback=_folder,
        help="Also write the table and a JSON file, named after the date, to this folder.",
        show_default=False,
    ),
]
NewFolder = Annotated[Path, typer.Argument(help="A new or an empty folder.")]

# what is read: reconstruct, import-dvae and audit-precision
Images = Annotated[
    list[Path], typer.Argument(metavar="IMAGE…", help="Pictures to pass through the dVAE and back.")
]
EncoderFile = Annotated[Path, typer.Option(help="OpenAI's encoder.pkl.")]
DecoderFile = Annotated[Path, typer.Option(help="OpenAI's decoder.pkl.")]
Batches = Annotated[int, typer.Option(min=1, help="Batches to look at.")]
AuditedData = Annotated[
    str | None, typer.Option("--data", help=f"{KINDS} By default the run's own.", show_default=False)
]

# plan
PlannedPreset = Annotated[
    str | None,
    typer.Option(help="Of the prior: tiny, small, base or paper, which is the default.", show_default=False),
]
Gpus = Annotated[int, typer.Option(min=1, help="GPUs in all.")]
GpusPerMachine = Annotated[int, typer.Option(min=1, help="GPUs of one machine.")]
GpuMemory = Annotated[str, typer.Option(help="Memory of one GPU, such as 16GB.")]
PlannedZero = Annotated[
    int | None,
    typer.Option(min=0, max=3, help="ZeRO stage; by default the lowest that fits.", show_default=False),
]
Rank = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Total rank that gradients are compressed to between machines; 0: sent in full. By default the "
        "setting compression_rank.",
        show_default=False,
    ),
]  # fmt: skip
Rate = Annotated[
    float | None,
    typer.Option(
        help="TFLOP/s of one GPU's matrix products; by default this machine's, measured.", show_default=False
    ),
]
Within = Annotated[float, typer.Option(help="GB/s that a GPU sends within its machine.")]
Between = Annotated[float, typer.Option(help="GB/s that a machine sends to others.")]
PlannedData = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="With --hours: propose a preset, a batch and a number of steps for these pictures, named as for "
        "train-dvae.",
        show_default=False,
    ),
]
Hours = Annotated[
    float | None,
    typer.Option(help="With --data: propose what to train on it in so many hours.", show_default=False),
]
