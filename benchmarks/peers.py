"""This project beside DALLE-pytorch 1.6.6 and Hugging Face's GPT-2 and Llama.

    python benchmarks/peers.py setup peers          # an environment of its own for the others, from pip
    python benchmarks/peers.py run peers            # training steps, in turn in one process; a table and JSON
    python benchmarks/peers.py draw peers           # drawing beside DALLE-pytorch, with and without its cache

All models have the same depth, width and heads, see as many tokens of as many kinds, start from random
weights and make whole updates: forward, backward, AdamW. Each is measured as its users run it, and with what
makes it faster without changing it: a fused optimizer, in `bf16` autocast where the machine is fast in it.
All of them profit from this project's settings of the process (memory kept, threads that do not spin).
"""

import argparse
import json
import os
import subprocess
import sys
import time
import types
import venv
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

HUGGING_FACE = ("transformers==5.23.0",)
# Without what they require besides: it would bring another torch, and much that training does not touch.
DALLE_PYTORCH = (
    "dalle-pytorch==1.6.6", "axial-positional-embedding==0.3.12", "rotary-embedding-torch==0.8.9", "requests",
    "urllib3", "certifi", "charset-normalizer",
)  # fmt: skip
# What DALLE-pytorch imports for data, for other image models and for its version, and never calls here.
STUBS = (
    "torchvision", "torchvision.transforms", "omegaconf", "taming", "taming.models", "taming.models.vqgan",
    "pkg_resources", "youtokentome", "ftfy",
)  # fmt: skip
TURN = 0.5  # seconds, at least, that a candidate trains before it is the next one's turn
SHAPES = {  # name: text slots, text tokens, image tokens, cells a side, depth, width, heads, batch
    "small": (34, 403, 2048, 8, 4, 128, 4, 16),
    "paper": (256, 16_384, 8192, 32, 8, 512, 8, 2),
}


def setup(folder: Path) -> None:
    """An environment for the others, without their own torch."""
    venv.create(folder, with_pip=True)
    install = [folder / "bin" / "pip", "install", "--quiet"]
    subprocess.run([*install, *HUGGING_FACE], check=True)
    subprocess.run([*install, "--no-deps", *DALLE_PYTORCH], check=True)


def borrow(folder: Path) -> None:
    """Make the others importable here; what this environment has comes first."""
    found = next(folder.glob("lib/python*/site-packages"), None)
    if found is None:
        sys.exit(f"error: no environment in {folder}; make one: python benchmarks/peers.py setup {folder}")
    sys.path.append(str(found))
    for name in STUBS:
        stub = types.ModuleType(name)
        stub.__path__ = []  # a package
        stub.__getattr__ = _nothing  # type: ignore[method-assign]
        sys.modules[name] = stub
    sys.modules["pkg_resources"].get_distribution = lambda _: types.SimpleNamespace(version="1.6.6")  # type: ignore[attr-defined]
    import dalle_pytorch  # noqa: F401

    for name in STUBS:
        del sys.modules[name]  # transformers looks for some of them


def _nothing(name: str) -> type:
    """What a stub holds under any name but those of Python's own."""
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


def _config(shape: tuple[int, ...]) -> Any:
    from stage2_prior.config import PriorConfig

    text, words, codes, grid, depth, width, heads, _ = shape
    return PriorConfig(
        text_length=text, text_vocab=words, image_vocab=codes, grid=grid, depth=depth, width=width,
        heads=heads,
    )  # fmt: skip


def ours(shape: tuple[int, ...], precision: str) -> Callable[[], None]:
    """The step of `dalle train-prior`, the dVAE's encoding left out."""
    import torch

    from dalle.engine import Engine
    from dalle.optim import AdamW, Average
    from dalle.threads import Threads, cores
    from stage2_prior import backends
    from stage2_prior.loss import losses, weighted
    from stage2_prior.model import Prior

    text, words, codes, grid, *_, batch = shape
    config = _config(shape)
    model, device = Prior(config), torch.device("cpu")
    threads = Threads(cores(device))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model.attend_by(backends.choose("auto", config, max(1, batch // threads.count), dtype, device))
    optimizer = AdamW(model, betas=(0.9, 0.96), weight_decay=0.045)
    engine = Engine(model, optimizer, Average(model.parameters(), 0.99, 25), clip=4.0, precision=precision)  # type: ignore[arg-type]
    tokens = torch.randint(1, words, (batch, text - 1))  # no slot is empty: the others know no other case
    picture = torch.randint(codes, (batch, grid**2))

    def step() -> None:
        with engine.arithmetic():
            loss = weighted(*losses(model, tokens, picture, threads=threads))
        engine.backward(loss, 1)
        engine.update(1e-4, 1)

    return step


def dalle_pytorch(shape: tuple[int, ...], precision: str, *, fused: bool) -> Callable[[], None]:
    """Its training step."""
    import torch

    text, words, codes, grid, *_, batch = shape
    model = _dalle_pytorch_model(shape)
    tokens, picture = torch.randint(1, words, (batch, text)), torch.randint(codes, (batch, grid**2))
    return _step(model, lambda: model(tokens, picture, return_loss=True), precision, fused)


def _dalle_pytorch_model(shape: tuple[int, ...], *, cached: bool = False) -> Any:
    """Rows, columns and convolution, as in its README; its dVAE is never run.

    With `cached` for drawing with a cache: a row for the convolution, which knows none, and masks instead of
    its own sparse attention.
    """
    from dalle_pytorch import DALLE, DiscreteVAE

    text, words, codes, grid, depth, width, heads, _ = shape
    vae = DiscreteVAE(image_size=8 * grid, num_layers=3, num_tokens=codes, codebook_dim=8, hidden_dim=8)
    kinds = [("axial_row", "axial_col", "axial_row", "axial_row")[i % 4] for i in range(depth - 1)]
    return DALLE(
        dim=width, vae=vae, num_text_tokens=words, text_seq_len=text, depth=depth, heads=heads,
        dim_head=width // heads, attn_types=(*kinds, "axial_row" if cached else "conv_like"),
        optimize_for_inference=cached,
    )  # fmt: skip


def hugging_face(kind: str, shape: tuple[int, ...], precision: str, *, fused: bool) -> Callable[[], None]:
    """A causal model over one joint vocabulary, all positions seen."""
    import torch
    import transformers

    text, words, codes, grid, depth, width, heads, batch = shape
    length = text + grid**2
    if kind == "GPT-2":
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=words + codes, n_positions=length, n_embd=width, n_layer=depth, n_head=heads,
                bos_token_id=None, eos_token_id=None,
                attn_implementation="sdpa", resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
            )
        )  # fmt: skip
    else:
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=words + codes, max_position_embeddings=length, hidden_size=width,
                intermediate_size=8 * width // 3, num_hidden_layers=depth, num_attention_heads=heads,
                attn_implementation="sdpa",
            )
        )  # fmt: skip
    tokens = torch.randint(words + codes, (batch, length))
    return _step(model, lambda: model(input_ids=tokens, labels=tokens).loss, precision, fused)


def _step(model: Any, loss: Callable[[], Any], precision: str, fused: bool) -> Callable[[], None]:
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=fused or None)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 4.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def run(folder: Path, names: list[str], others: list[str], rounds: int, out: Path | None) -> None:
    """Alternate us and all candidates named so, `rounds` times each, and say how they compare."""
    borrow(folder)
    import torch

    from dalle.ceiling import gemm_rate
    from dalle.precision import choose
    from dalle.process import suit_computing
    from stage2_prior.flops import matrix_flops

    suit_computing()
    device = torch.device("cpu")
    precision = choose("auto", device)
    results = []
    for name in names:
        shape = SHAPES[name]
        text, _, _, grid, depth, width, _, batch = shape
        fast = {"precision": precision, "fused": True}
        plain = {"precision": "fp32", "fused": False}
        candidates = {
            f"dalle, {precision}": ours(shape, precision),
            "DALLE-pytorch 1.6.6, fp32, as its users run it": dalle_pytorch(shape, **plain),
            f"DALLE-pytorch 1.6.6, {precision}, fused AdamW": dalle_pytorch(shape, **fast),
            "GPT-2 (Hugging Face), fp32": hugging_face("GPT-2", shape, **plain),
            f"GPT-2 (Hugging Face), {precision}, fused AdamW": hugging_face(
                "GPT-2", shape, precision, fused=True
            ),
            f"Llama (Hugging Face), {precision}, fused AdamW": hugging_face(
                "Llama", shape, precision, fused=True
            ),
        }
        candidates = {
            candidate: step
            for candidate, step in candidates.items()
            if not others or candidate.startswith(("dalle, ", *others))
        }
        times: dict[str, list[float]] = {candidate: [] for candidate in candidates}
        for turn in range(1 + rounds):  # the first one warms up
            for candidate, step in candidates.items():
                step()  # finds the caches full of another model
                taken: list[float] = []
                while sum(taken) < TURN:
                    start = time.perf_counter()
                    step()
                    taken.append(time.perf_counter() - start)
                if turn:
                    times[candidate].append(median(taken))
        flops, ceiling = batch * 3 * matrix_flops(_config(shape), text - 1), gemm_rate(device, precision)
        took = {candidate: median(samples) for candidate, samples in times.items()}
        best = took[f"dalle, {precision}"]
        print(f"\n{name}: {text} text + {grid**2} image tokens, depth {depth}, width {width}, batch {batch}")
        share = flops / best / ceiling
        print(f"products in {precision}: {ceiling / 1e9:.0f} GFLOP/s; dalle reaches {share:.0%}")
        for candidate, seconds in took.items():
            rate = batch * (text + grid**2) / seconds
            print(
                f"{candidate:50} {rate:10,.0f} tokens/s   dalle is {seconds / best:5.2f} × as fast",
                flush=True,
            )
        results.append({
            "shape": name, "gemm_flops_per_second": ceiling, "share": share,
            "seconds": took, "samples": times,
        })  # fmt: skip
    if out is not None:
        out.write_text(json.dumps({"torch": torch.__version__, "precision": precision, "results": results}))


def draw(folder: Path, rounds: int) -> None:
    """Time a token of one picture at the paper's geometry, ours and DALLE-pytorch's.

    As its users draw, it passes the whole sequence through the model for every token. It has a cache, which
    its own function for drawing never hands on, so that is called without it, in a model of layers that know
    it. Both are timed at the first, the middle and the last image token, between which their cost grows
    steadily.
    """
    borrow(folder)
    import torch

    from dalle.precision import choose
    from stage2_prior.decode import Decoder
    from stage2_prior.model import Prior
    from stage2_prior.sample import Sampling, noise, read
    from stage2_prior.sample import draw as draw_codes

    shape = SHAPES["paper"]
    text, words, codes, grid, *_ = shape
    cells, precision = grid**2, choose("auto", torch.device("cpu"))
    default, mended = (_dalle_pytorch_model(shape, cached=cached).eval() for cached in (False, True))
    tokens, picture = torch.randint(1, words, (1, text)), torch.randint(codes, (1, cells))
    places = (0, cells // 2, cells - 2)
    theirs: dict[str, dict[int, Callable[[], object]]] = {
        "as its users draw": {place: partial(default, tokens, picture[:, :place]) for place in places},
        "with its cache mended": {},
    }
    ours: dict[str, list[float]] = {}
    with torch.inference_mode():
        for place in places:
            cache: dict[str, Any] = {}
            mended(tokens, picture[:, :place], cache=cache)
            theirs["with its cache mended"][place] = lambda place=place, cache=cache: mended(
                tokens, picture[:, : place + 1], cache=cache.copy()
            )
        prior = Prior(_config(shape)).eval()
        streams = {}
        for weights in ("auto", "fp16", "int8", "int4"):
            decoder = Decoder(prior, 1, weights, precision)  # type: ignore[arg-type]
            seen, uniform = read(decoder, tokens[:, 1:], Sampling()), noise(0, range(1), cells)
            name = f"dalle, {decoder.weights}"
            streams[name], ours[name] = draw_codes(decoder, seen, uniform, Sampling()), []
        taken: dict[str, dict[int, list[float]]] = {form: {place: [] for place in places} for form in theirs}
        for turn in range(1 + rounds):  # the first one warms up
            for form, at in theirs.items():
                for place, token in at.items():
                    for _ in range(1 if form == "as its users draw" else 16):
                        start = time.perf_counter()
                        token()
                        if turn:
                            taken[form][place].append(time.perf_counter() - start)
            for name, stream in streams.items():
                for _ in range(16):
                    start = time.perf_counter()
                    next(stream)
                    if turn:
                        ours[name].append(time.perf_counter() - start)
    each = {}
    for form, at_places in taken.items():
        first, middle, last = (median(at_places[place]) for place in places)
        each[form] = (first + 2 * middle + last) / 4
        print(f"DALLE-pytorch 1.6.6, fp32, {form}: {1e3 * first:,.1f} to {1e3 * last:,.1f} ms per token")
    for name, samples in ours.items():
        took = median(samples)
        faster = " and ".join(f"{token / took:.1f}" for token in each.values())
        print(f"{name}: {1e3 * took:.1f} ms per token, {faster} × as fast")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("setup", "run", "draw"))
    parser.add_argument("folder", type=Path, help="the environment of the others")
    parser.add_argument("--shape", choices=tuple(SHAPES), action="append", help="by default both")
    parser.add_argument("--beside", action="append", help="only those whose names begin so; by default all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a JSON file for all samples")
    given = parser.parse_args()
    if given.what == "setup":
        setup(given.folder)
    elif given.what == "draw":
        draw(given.folder, given.rounds)
    else:
        run(given.folder, given.shape or list(SHAPES), given.beside or [], given.rounds, given.out)
