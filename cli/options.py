"""Options and arguments of the commands, with what `--help` says of them."""

from pathlib import Path
from typing import Annotated, Literal

import typer

# a run, and what it is trained with
Run = Annotated[Path, typer.Option("--run", help="Run folder: everything of one model.")]
RunArgument = Annotated[Path, typer.Argument(help="Run folder.")]
TrainedRun = Annotated[Path, typer.Argument(help="Run folder of a trained model.")]
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
TrainingMinutes = Annotated[
    float | None,
    typer.Option(
        "--minutes",
        help="In place of --steps: train for so long, from now on; the number of updates and a new run's "
        "schedules are fitted to it on the way.",
        show_default=False,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, such as --set lr=1e-3. Repeatable."),
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
GrowFrom = Annotated[
    Path | None,
    typer.Option(
        "--grow-from",
        help="Begin with what the prior of this run has learned: same pictures, depth and width, but codes "
        "a whole number of times coarser. scenes names the built-in model.",
        show_default=False,
    ),
]
ShowConfig = Annotated[
    bool, typer.Option("--show-config", help="Print every setting with the paper's value, and stop.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]

# demo
Minutes = Annotated[float, typer.Option(help="How long it may take, about.")]
DemoRun = Annotated[Path, typer.Option("--run", help="Run folder of the demo.")]

# drawing: sample and evaluate
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
Guidance = Annotated[
    float | None,
    typer.Option(
        help="Above 1: nearer to the caption and less varied; by default the run's own.",
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
        help="The prior's weights while it draws. auto: as they are; bf16 on a GPU. On a CPU int8 and int4 "
        "(8 and 4 bits) are faster, and where it computes in bf16, that for many pictures at once."
    ),
]
Preview = Annotated[
    bool, typer.Option("--preview", help="Show what is drawn so far in preview.png, every few rows.")
]
PromptsOfAKind = Annotated[int, typer.Option(min=1, help="Of every kind.")]

# where results go
SampleFolder = Annotated[
    Path | None,
    typer.Option(
        help="Folder for the pictures; by default R/samples, or samples for the built-in model.",
        show_default=False,
    ),
]
ReconstructionFolder = Annotated[
    Path | None,
    typer.Option(help="Folder for the results; by default R/reconstructions.", show_default=False),
]
ReportFolder = Annotated[
    Path | None,
    typer.Option(help="Folder for report.html and report.json; by default the run's.", show_default=False),
]
BenchFolder = Annotated[
    Path | None,
    typer.Option("--out", help="Folder for a dated JSON file and the table.", show_default=False),
]
NewFolder = Annotated[Path, typer.Argument(help="A new folder.")]

# what is read: reconstruct, import-dvae and audit-precision
Images = Annotated[
    list[Path], typer.Argument(metavar="IMAGE…", help="Pictures to pass through the dVAE and back.")
]
EncoderFile = Annotated[Path, typer.Option(help="OpenAI's encoder.pkl.")]
DecoderFile = Annotated[Path, typer.Option(help="OpenAI's decoder.pkl.")]
Batches = Annotated[int, typer.Option(min=1, help="Batches to look at.")]

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
        "setting compression_rank, or else the paper's rule.",
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
