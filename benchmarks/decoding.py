"""How fast the prior draws, and what that is of what the machine could do.

    python -m benchmarks.decoding --json decoding.json

draws pictures of 1,024 tokens after 256 of text at depth 8 and width 512 with each form of the weights (bf16
where the machine computes in it), a few tokens of each in turn, and between them reads the weights once from
memory. Where `transformers` is installed, GPT-2 and Llama of the same size draw in the same turns. It is no
dependency of the project; an environment that has both:

    python -m venv --system-site-packages peers && peers/bin/pip install transformers
    peers/bin/python -m benchmarks.decoding

The quality of the rounded forms is measured on the built-in model: the divergence of the next code's
distribution from that of fp32 weights.
"""

import argparse
import datetime
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import hugging_face
from dalle.builtin import FOLDER
from dalle.pipeline import TextToImage
from dalle.precision import choose
from dalle.process import suit_computing
from stage2_prior.config import PriorConfig
from stage2_prior.decode import Decoder, Text
from stage2_prior.linear import Weights
from stage2_prior.masks import Kind, kinds
from stage2_prior.model import Prior
from stage2_prior.sample import Sampling, draw, noise

CONFIG = PriorConfig(text_vocab=16_384, image_vocab=8_192, grid=32, depth=8, width=512, heads=8)
TURN = 16  # tokens of one candidate before it is the next one's turn
ENDS = 128  # tokens at either end of a picture whose times are compared


def weights_of(model: Prior) -> list[Tensor]:
    """The matrices that every token passes through."""
    found = [m.weight for m in model.layers.modules() if isinstance(m, nn.Linear)]
    return [*found, model.image_head.weight]


def streaming(weights: list[Tensor]) -> float:
    """Seconds to read every weight once, by adding them up."""
    began = time.perf_counter()
    for weight in weights:
        weight.sum()
    return time.perf_counter() - began


def cache_bytes(config: PriorConfig, pictures: int, size: int = 4) -> int:
    """Memory of the caches for one prompt, by counting what the masks can see."""
    ring = {
        "row": config.grid + 1,
        "column": config.grid * (config.grid - 1) + 1,
        "conv": config.kernel // 2 * (config.grid + 1) + 1,
    }
    read: dict[Kind, int] = {
        "row": 0,  # read where it lies
        "column": config.grid,
        "conv": config.kernel // 2 * config.kernel + config.kernel // 2 + 1,
    }
    slots = sum(config.text_length + pictures * (ring[kind] + read[kind]) for kind in kinds(config.depth))
    return 2 * slots * config.width * size


def growth(decoder: Decoder, text: Text, uniform: Tensor) -> float:
    """What one of a picture's last tokens takes over one of its first, which take turns."""
    first, last = (draw(decoder, text, uniform, Sampling()) for _ in range(2))
    for _ in range(decoder.config.cells - ENDS):
        next(last)
    next(first)  # what is allocated at first
    taken: dict[str, list[float]] = {"first": [], "last": []}
    for _ in range(ENDS - 1):
        for name, stream in (("first", first), ("last", last)):
            began = time.perf_counter()
            next(stream)
            taken[name].append(time.perf_counter() - began)
    return statistics.median(taken["last"]) / statistics.median(taken["first"])


def speed(model: Prior, pictures: int, tokens: int, peers: bool) -> dict[str, Any]:
    """All candidates in turns; seconds of every step."""
    config, text = model.config, torch.randint(model.config.text_vocab, (1, model.config.text_length - 1))
    uniform = noise(0, range(pictures), config.cells)
    streams: dict[str, Iterator[Tensor]] = {}
    facts: dict[str, Any] = {}
    precision = choose("auto", torch.device("cpu"))
    in_bf16 = precision == "bf16"
    forms: list[Weights] = ["fp32", "fp16", *(["bf16"] if in_bf16 else []), "int8", "int4"]
    for form in forms:
        began = time.perf_counter()
        decoder = Decoder(model, pictures, form, precision)
        built = time.perf_counter() - began
        began = time.perf_counter()
        read = decoder.read(text)
        facts[f"dalle {form}"] = {
            "packing_s": built,
            "text_s": time.perf_counter() - began,
            "cache_bytes": decoder.state(read, pictures).bytes,
            "last_over_first": growth(decoder, read, uniform),
        }
        streams[f"dalle {form}"] = draw(decoder, read, uniform, Sampling())
    if peers:
        full = torch.randint(config.text_vocab, (1, config.text_length))
        for dtype in (torch.float32, *([torch.bfloat16] if in_bf16 else [])):
            for name, build in (("GPT-2", hugging_face.gpt2), ("Llama", hugging_face.llama)):
                other = build(config).to(dtype)
                label = f"Hugging Face {name}, static cache, {str(dtype).removeprefix('torch.')}"
                streams[label] = hugging_face.draw(other, config, full, pictures)
    weights = weights_of(model)
    taken: dict[str, list[float]] = {name: [] for name in streams}
    reading: list[float] = []
    for stream in streams.values():
        next(stream)  # the text, and what is allocated at first
    while len(next(iter(taken.values()))) < tokens - 1:
        reading += [streaming(weights) for _ in range(2)]
        for name, stream in streams.items():
            for _ in range(min(TURN, tokens - 1 - len(taken[name]))):
                began = time.perf_counter()
                next(stream)
                taken[name].append(time.perf_counter() - began)
    found = {"weights_once": {"ms": 1e3 * statistics.median(reading)}}
    for name, seconds in taken.items():
        ms = 1e3 * statistics.median(seconds)
        found[name] = {"ms": ms, "tokens_per_second": pictures * 1e3 / ms, **facts.get(name, {})}
    size = sum(weight.numel() for weight in weights) * 4
    found["weights_once"]["GB_per_second"] = size / found["weights_once"]["ms"] / 1e6
    return found


@torch.inference_mode()
def divergence(prompts: int = 16) -> dict[str, dict[str, float]]:
    """KL divergence in nats of the next code from fp32 weights, on pictures that the built-in model draws.

    Its weights are fp16 as saved; noise of half a unit in their last place makes them fp32 ones again.
    """
    built = TextToImage.load(FOLDER, device="cpu", precision="fp32")
    prior, random = built.prior, torch.Generator().manual_seed(0)
    for weight in weights_of(prior):
        weight.mul_(1 + 2.0**-11 * (2 * torch.rand(weight.shape, generator=random) - 1))
    shapes = ("circle", "star", "heart", "ring")
    asked = [f"a {colour} {shape}" for colour in ("red", "blue", "green", "pink") for shape in shapes]
    tokens = built._tokens(asked[:prompts])
    uniform = torch.cat([noise(i, range(1), prior.config.cells) for i in range(len(tokens))])
    exact = Decoder(prior, len(tokens), "fp32")
    codes = torch.stack(list(draw(exact, exact.read(tokens), uniform, Sampling())), 1)

    precision = choose("auto", torch.device("cpu"))

    def next_codes(form: Weights) -> Tensor:
        decoder = Decoder(prior, len(tokens), form, precision)
        state = decoder.state(decoder.read(tokens), 1)
        before = torch.cat([torch.full_like(codes[:, :1], decoder.start), codes[:, :-1]], 1)
        steps = [decoder.step(c, state, torch.tensor([i])) for i, c in enumerate(before.unbind(1))]
        return torch.log_softmax(torch.stack(steps, 1).double(), -1)

    p = next_codes("fp32")
    found = {}
    rounded: list[Weights] = ["fp16", "bf16", "int8", "int4"]
    for form in rounded:
        kl = (p.exp() * (p - next_codes(form))).sum(-1)
        found[form] = {"mean": kl.mean().item(), "largest": kl.max().item()}
    return found


def table(found: dict[str, Any]) -> str:
    """The figures of `speed` as a Markdown table."""
    once = found["weights_once"]["ms"]
    peers = [row["ms"] for name, row in found.items() if name.startswith("Hugging Face")]
    lines = [
        f"reading the fp32 weights once: {once:.2f} ms, {found['weights_once']['GB_per_second']:.1f} GB/s",
        "",
        "| | ms per step | last ÷ first | tokens/s | × reading | × best of Hugging Face |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        if name != "weights_once":
            gain = f"{min(peers) / row['ms']:.2f}" if peers else "–"
            grown = f"{row['last_over_first']:.2f}" if "last_over_first" in row else "–"
            lines.append(
                f"| {name} | {row['ms']:.2f} | {grown} | {row['tokens_per_second']:.0f} | "
                f"{row['ms'] / once:.2f} | {gain} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write the JSON that was asked for."""
    parser = argparse.ArgumentParser(description="How fast the prior draws.")
    parser.add_argument("--pictures", type=int, default=1, help="drawn side by side, of one prompt")
    parser.add_argument("--tokens", type=int, default=CONFIG.cells, help="of each picture")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    suit_computing()
    model = Prior(CONFIG).eval()
    with torch.inference_mode():
        nn.init.normal_(model.image_head.weight, std=0.02)  # all codes alike would be an easy draw
    peers = importlib.util.find_spec("transformers") is not None
    found = speed(model, args.pictures, args.tokens, peers)
    quality = divergence()
    print(table(found))
    print(f"\ncaches: {cache_bytes(CONFIG, args.pictures):,} bytes computed, ", end="")
    print(f"{found['dalle fp32']['cache_bytes']:,} measured")
    for form, kl in quality.items():
        print(f"KL of the next code, fp32 ‖ {form}: mean {kl['mean']:.2e}, largest {kl['largest']:.2e} nats")
    if args.json:
        facts = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": args.threads,
            "pictures": args.pictures,
            "speed": found,
            "divergence": quality,
        }
        args.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
