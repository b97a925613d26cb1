"""How fast this machine trains, draws, encodes and reads, beside what it reaches at best."""

import datetime
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dalle.builtin import find_run
from dalle.ceiling import gemm_rate
from dalle.checkpoint import replacing, write_json
from dalle.console import say
from dalle.data.augment import stage2_crop
from dalle.data.loader import Loader
from dalle.data.open import open_source
from dalle.noise import noise_of
from dalle.pipeline import TextToImage
from dalle.precision import DTYPES, Arithmetic, arithmetic, best_device, choose
from dalle.process import suit_computing
from dalle.threads import Threads, cores
from dalle.wiring import make_engine
from stage1_dvae.config import PRESETS as DVAE_PRESETS
from stage1_dvae.config import DVAEConfig
from stage1_dvae.loss import elbo
from stage1_dvae.model import DVAE
from stage1_dvae.model import matrix_flops as dvae_flops
from stage2_prior import backends
from stage2_prior.config import PRESETS as PRIOR_PRESETS
from stage2_prior.config import PriorConfig, PriorTraining
from stage2_prior.decode import Decoder
from stage2_prior.flops import matrix_flops as prior_flops
from stage2_prior.loss import losses, weighted
from stage2_prior.model import Prior
from stage2_prior.sample import Sampling, draw, noise, read

LEAST = 5  # runs of everything; the median counts


# What the preset `tiny` trains on the scenes, and the paper's geometry at a size for CPUs.
SMALL = replace(PRIOR_PRESETS["tiny"][0], text_vocab=441, image_vocab=4096, grid=9)
PAPER = PriorConfig(depth=8, width=512, heads=8)


@dataclass(frozen=True)
class Cases:
    """What is measured."""

    small: PriorConfig = SMALL
    small_batch: int = PRIOR_PRESETS["tiny"][1].batch_size
    paper: PriorConfig = PAPER
    paper_batch: int = 2
    drawn: int = 64  # image tokens of the paper's 1,024, at the beginning
    dvae: DVAEConfig = DVAE_PRESETS["tiny"][0]
    dvae_batch: int = DVAE_PRESETS["tiny"][1].batch_size
    copied: int = 64  # MiB, of the copy that measures memory


@dataclass(frozen=True)
class Row:
    """One number, with what stands beside it."""

    what: str
    value: float
    unit: str
    share: float | None = None  # of the ceiling
    ceiling: str = ""


def bench(cases: Cases | None = None) -> dict[str, Any]:
    """Measure everything; some minutes at most. The result goes to JSON as it is."""
    suit_computing()
    cases, device = cases or Cases(), best_device()
    precision, began = choose("auto", device), time.monotonic()
    rows = _ceilings(device, precision, cases)
    for config, batch, preset in (
        (cases.small, cases.small_batch, "tiny"),
        (cases.paper, cases.paper_batch, "paper"),
    ):
        training = replace(PRIOR_PRESETS[preset][1], batch_size=batch)
        rows += _prior_step(config, training, device, precision)
    rows += _drawing(cases, device, precision, rate=next(row.value for row in rows if row.unit == "GB/s"))
    rows += _dvae(cases, device, precision)
    rows += _data(cases)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": _machine(device, precision),
        "seconds": round(time.monotonic() - began, 1),
        "rows": [asdict(row) for row in rows],
    }


def table(result: dict[str, Any]) -> Table:
    """The rows as people read them."""
    rows = Table("what", "value", "unit", "of the ceiling", "ceiling", title=_title(result["machine"]))
    for row in result["rows"]:
        share = "" if row["share"] is None else f"{row['share']:.0%}"
        rows.add_row(row["what"], f"{row['value']:,.4g}", row["unit"], share, row["ceiling"])
    return rows


def save(result: dict[str, Any], folder: Path) -> Path:
    """Write JSON and the table to files named after the date. Returns the path of the JSON."""
    path = folder / f"bench-{result['date'][:16].replace(':', '-')}.json"
    write_json(path, result)
    with replacing(path.with_suffix(".txt")) as partial, partial.open("w", encoding="utf-8") as file:
        Console(file=file, width=110).print(table(result))
    return path


def _title(machine: dict[str, Any]) -> str:
    m = machine
    return f"{m['device']} · {m['threads']} threads · torch {m['torch']} · {m['precision']}"


def _machine(device: torch.device, precision: Arithmetic) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": name, "cpus": os.cpu_count(), "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__,
        "python": platform.python_version(), "precision": precision,
    }  # fmt: skip


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def seconds(work: Callable[[], object]) -> float:
    """Median of `LEAST` runs, after one that warms up."""
    times: list[float] = []
    for _ in range(1 + LEAST):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times[1:])


def _ceilings(device: torch.device, precision: Arithmetic, cases: Cases) -> list[Row]:
    say("bench: what this machine reaches")
    rates = {name: gemm_rate(device, name) for name in dict.fromkeys(("fp32", precision))}
    numbers = torch.ones(cases.copied * 2**18, device=device)
    target = torch.empty_like(numbers)
    reading = numbers.nbytes / seconds(numbers.sum)  # a product with one vector is far slower on some CPUs
    copied = 2 * numbers.nbytes / seconds(lambda: target.copy_(numbers))
    return [
        Row("memory read", reading / 1e9, "GB/s"),
        Row("copy", copied / 1e9, "GB/s"),
        *(Row(f"matrix products in {name}", rate / 1e9, "GFLOP/s") for name, rate in rates.items()),
    ]


def _prior_step(
    config: PriorConfig, training: PriorTraining, device: torch.device, precision: Arithmetic
) -> list[Row]:
    label, batch = _cells(config), training.batch_size
    say(f"bench: training the prior, {label}")
    threads = Threads(cores(device))
    chosen = backends.choose("auto", config, max(1, batch // threads.count), DTYPES[precision], device)
    model = Prior(config).to(device)
    model.attend_by(chosen)
    tokens, codes, words = _captions_and_codes(config, batch)
    tokens, codes = tokens.to(device), codes.to(device)
    engine = make_engine(
        model, training, precision, variance_limit=training.variance_limit, matrices=model.matrices()
    )

    def step() -> None:
        with engine.arithmetic():
            loss = weighted(*losses(model, tokens, codes, threads=threads))
        engine.backward(loss, 1)
        engine.update(1e-4, 1)

    took = seconds(step)
    rate = batch * 3 * prior_flops(config, words) / took
    what = f"training, prior, {label}, depth {config.depth}, width {config.width}, batch {batch} ({chosen})"
    share = rate / gemm_rate(device, precision)
    return [Row(what, batch * config.length / took, "tokens/s", share, f"products in {precision}")]


def _cells(config: PriorConfig) -> str:
    return f"{config.grid}×{config.grid} cells"


def _captions_and_codes(config: PriorConfig, batch: int) -> tuple[Tensor, Tensor, int]:
    """A third of the text slots hold words, as of short captions; and how many they are."""
    words = config.text_length // 3
    tokens = torch.randint(config.text_vocab, (batch, config.text_length - 1))
    tokens[:, words:] = -1
    return tokens, torch.randint(config.image_vocab, (batch, config.cells)), words


def _drawing(cases: Cases, device: torch.device, precision: Arithmetic, rate: float) -> list[Row]:
    say("bench: drawing")
    rows = []
    scenes = TextToImage.load(find_run(Path("scenes")), device)
    for n in (1, 16):
        took = seconds(lambda n=n: scenes("a red circle", n))  # type: ignore[misc]
        what = f"drawing, built-in model, {n} at once, pictures and all"
        rows.append(Row(what, n * scenes.prior.config.cells / took, "image tokens/s"))
    model = Prior(cases.paper).to(device).eval()
    tokens, _, _ = _captions_and_codes(cases.paper, 1)
    uniform = noise(0, range(1), cases.paper.cells)
    times: list[float] = []
    decoder, how = Decoder(model, precision=precision), Sampling()
    with torch.inference_mode(), arithmetic(precision, device):
        text = read(decoder, tokens.to(device), how)
        for _ in range(2):  # the first one warms up
            stream, before = draw(decoder, text, uniform, how), time.perf_counter()
            times.clear()
            for _ in range(min(cases.drawn, cases.paper.cells)):
                next(stream)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                now = time.perf_counter()
                times.append(now - before)
                before = now
    took = median(times[1:])
    inside = sum(p.numel() for p in model.layers.parameters()) + model.image_head.weight.numel()
    share = 4 * inside / (rate * 1e9) / took
    what = f"drawing, {_cells(cases.paper)}, width {cases.paper.width}, one picture ({decoder.weights})"
    return [*rows, Row(what, 1 / took, "image tokens/s", share, "all weights read once in fp32")]


def _dvae(cases: Cases, device: torch.device, precision: Arithmetic) -> list[Row]:
    say("bench: the dVAE")
    config, batch = cases.dvae, cases.dvae_batch
    model = DVAE(config).to(device).for_speed()
    engine = make_engine(model, DVAE_PRESETS["tiny"][1], precision)
    pixels = torch.rand(batch, 3, config.image_size, config.image_size, device=device)
    generators = [noise_of(device, i) for i in range(batch)]

    def step() -> None:
        with engine.arithmetic():
            terms, _, _ = elbo(model, pixels, tau=1.0, generators=generators)
        engine.backward(terms.loss(1.0, 0.1), 1)
        engine.update(1e-4, 1)

    took, ceiling = seconds(step), gemm_rate(device, precision)
    share = batch * 3 * dvae_flops(model) / took / ceiling
    name, against = f"{config.image_size} pixels, {config.vocab_size} codes", f"products in {precision}"
    rows = [Row(f"training, dVAE, {name}, batch {batch}", batch / took, "pictures/s", share, against)]
    with torch.inference_mode(), arithmetic(precision, device):
        codes = model.encode(pixels)
        rows.append(Row(f"encoding, {name}", batch / seconds(lambda: model.encode(pixels)), "pictures/s"))
        rows.append(Row(f"decoding, {name}", batch / seconds(lambda: model.decode(codes)), "pictures/s"))
    return rows


def _data(cases: Cases) -> list[Row]:
    say("bench: reading data")
    size = cases.dvae.image_size
    source = open_source("scenes", "train", size, 0.02)
    loader = Loader(
        source, lambda sample, rng: (torch.from_numpy(stage2_crop(sample.image, size, rng)),),
        batch_size=64, seed=0, min_side=size,
    )  # fmt: skip
    batches = loader.batches()
    took = seconds(lambda: next(batches))
    batches.close()
    return [Row(f"data, scenes of {size} pixels, one process", 64 / took, "pictures/s")]
