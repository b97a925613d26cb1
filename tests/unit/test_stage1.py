"""What the loop is told while the dVAE trains: schedules, losses, measures, and a warning."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dalle.metrics import read_metrics
from dalle.noise import noise_of
from dalle.precision import fp32_products
from dalle.runs import Options, StageRun
from dalle.training import fit
from stage1_dvae.config import PRESETS, DVAETraining
from stage1_dvae.loss import elbo
from stage1_dvae.model import ResBlock
from stage1_dvae.train import EVALUATION, Stage1, prepare, psnr
from tests import tiny

PAPER = PRESETS["paper"][1]


def stage(folder, training: DVAETraining = PAPER, pictures: int = 1) -> Stage1:
    model = tiny.dvae()
    heldout = torch.randint(
        256, (pictures, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    plan = StageRun(folder / "dvae", "paper", "scenes", model.config, training, resumed=False)
    return Stage1(model, plan, heldout)


@pytest.mark.parametrize(
    ("step", "tau", "beta", "lr"),
    # Worked out from the paper's App. A.2: half a cosine each, over 150,000, 5,000 and 1,200,000 updates.
    [
        (0, 1.0, 0.0, 1e-4),
        (2_500, 0.99935759442, 3.3, 9.99989424697e-5),
        (5_000, 0.99743213845, 6.6, 9.99957699240e-5),
        (75_000, 17 / 32, 6.6, 9.90512732199e-5),
        (150_000, 1 / 16, 6.6, 9.62415519177e-5),
        (600_000, 1 / 16, 6.6, 5.0625e-5),
        (1_200_000, 1 / 16, 6.6, 1.25e-6),
        (3_000_000, 1 / 16, 6.6, 1.25e-6),
    ],
)
def test_the_papers_schedules_are_followed(tmp_path, step, tau, beta, lr):
    task = stage(tmp_path)
    assert task.tau(step) == pytest.approx(tau, rel=1e-8)
    assert task.beta(step) == pytest.approx(beta, rel=1e-8)
    assert task.lr(step) == pytest.approx(lr, rel=1e-8)


def test_a_step_size_may_rise_first(tmp_path):
    task = stage(tmp_path, dataclasses.replace(PAPER, warmup=4))
    assert [task.lr(step) for step in range(5)] == pytest.approx(
        [0.25e-4, 0.5e-4, 0.75e-4, 1e-4, 1e-4], rel=1e-6
    )


def test_the_loss_is_that_of_the_steps_temperature_and_weight(tmp_path):
    training = dataclasses.replace(PAPER, tau_steps=300, seed=5)
    task, step, positions = stage(tmp_path, training), 100, range(40, 43)
    pixels = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    task.begin([(pixels,)], lambda function, *arguments: function(*arguments))
    loss, metrics = task.loss((pixels,), step, positions)
    tau, beta = 1 / 16 + 15 / 16 * 0.75, 6.6 * (1 - math.cos(math.pi / 50)) / 2
    noise = [noise_of(torch.device("cpu"), 5, position) for position in positions]
    terms, *_ = elbo(task.model, pixels / 255, tau=tau, generators=noise)
    expected = terms.nll + beta * terms.kl / 48  # 16 · 16 · 3 subpixels for 4 · 4 codes
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (metrics["tau"].item(), metrics["beta"].item()) == pytest.approx((tau, beta), rel=1e-6)
    assert metrics["kl_nats"].item() == pytest.approx(terms.kl.item() * 16, rel=1e-5)


def test_codes_used_unevenly_cost_as_much_as_usage_weight_says(tmp_path):
    pixels = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    losses = []
    for weight in (0.0, 2.0):
        task = stage(tmp_path, dataclasses.replace(PAPER, usage_weight=weight))
        task.begin([(pixels,)], lambda function, *arguments: function(*arguments))
        losses.append(task.loss((pixels,), 100, range(3))[0].item())
    shares = task.model.logits(pixels / 255).double().softmax(1).mean((0, 2, 3))
    to_uniform = (shares * shares.log()).sum().item() + math.log(13)
    assert to_uniform > 0.1
    assert losses[1] - losses[0] == pytest.approx(2 * to_uniform / 48, rel=1e-4)


def test_the_gradient_of_a_batch_is_the_mean_of_those_of_its_micro_batches(tmp_path):
    """Also where the use of the codes counts, which is a matter of the whole batch."""
    task = stage(tmp_path, dataclasses.replace(PAPER, usage_weight=1e5))  # or the pictures outweigh it
    parameters = list(task.model.requires_grad_(True).parameters())
    pixels = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))

    def gradient(size):
        parts = [(part,) for part in pixels.split(size)]
        task.begin(parts, lambda function, *arguments: function(*arguments))
        task.model.zero_grad()
        for number, part in enumerate(parts):
            positions = range(40 + number * size, 40 + (number + 1) * size)
            (task.loss(part, 100, positions)[0] / len(parts)).backward()
        return [parameter.grad.clone() for parameter in parameters]

    assert tiny.apart(gradient(2), gradient(4)) < 1e-5


def test_the_loss_of_a_batch_is_the_mean_of_those_of_its_micro_batches(tmp_path):
    """Not its gradient alone: that of the codes' use is the same for any multiple of their shares."""
    task, found = stage(tmp_path, dataclasses.replace(PAPER, usage_weight=2.0)), []
    pixels = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for size in (2, 4):
        parts = [(part,) for part in pixels.split(size)]
        task.begin(parts, lambda function, *arguments: function(*arguments))
        positions = [range(at, at + size) for at in range(0, 4, size)]
        losses = [task.loss(part, 100, places)[0] for part, places in zip(parts, positions, strict=True)]
        found.append(torch.stack(losses).mean().item())
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def log_laplace(pixels, decoded):
    """ln f of the paper's App. A.3."""
    x, (mu, ln_b) = (0.8 * pixels + 0.1).double(), decoded.double().chunk(2, 1)
    return -((x / (1 - x)).log() - mu).abs() / ln_b.exp() - (2 * ln_b.exp() * x * (1 - x)).log()


def shown(decoded):
    return ((decoded[:, :3].double().sigmoid() - 0.1) / 0.8).clamp(0, 1)


def decibel(pixels, other):
    errors = (pixels.double() - other).square().flatten(1).mean(1)
    return sum(10 * math.log10(1 / error) for error in errors.tolist()) / len(errors)


def test_what_is_measured_on_held_out_pictures(tmp_path):
    """In parts of 2, 2 and 1 pictures: means over pictures."""
    training = dataclasses.replace(PAPER, batch_size=2, tau_steps=300, beta_steps=300)
    task = stage(tmp_path, training, pictures=5)
    found = task.evaluate(100)
    pixels, model = task.heldout / 255, task.model
    codes = model.logits(pixels).argmax(1)
    hard = model.decoder(F.one_hot(codes, 13).permute(0, 3, 1, 2).float())
    noise = [noise_of(torch.device("cpu"), 0, EVALUATION, place) for place in range(5)]
    terms, _, relaxed = elbo(model, pixels, tau=1 / 16 + 15 / 16 * 0.75, generators=noise)
    assert -log_laplace(pixels, relaxed).mean().item() == pytest.approx(terms.nll.item(), rel=1e-5)
    assert found["heldout_loss"] == pytest.approx((terms.nll + 1.65 * terms.kl / 48).item(), rel=1e-5)
    gap = log_laplace(pixels, relaxed).mean() - log_laplace(pixels, hard).mean()
    assert abs(gap) > 1e-3
    assert found["heldout_relaxation_gap"] == pytest.approx(gap.item(), rel=1e-4)
    assert found["heldout_psnr"] == pytest.approx(decibel(pixels, shown(hard)), rel=1e-5)
    assert found["heldout_relaxed_psnr"] == pytest.approx(decibel(pixels, shown(relaxed)), rel=1e-5)
    assert found["heldout_psnr"] != pytest.approx(found["heldout_relaxed_psnr"], rel=1e-3)
    assert found["heldout_codebook_usage"] == len(codes.unique()) / 13
    assert [path.name for path in (tmp_path / "dvae" / "pictures").iterdir()] == ["step-00000100.png"]


def test_evaluating_rounds_nothing_where_training_does(tmp_path):
    """The layers beside the codes see their operands as they are, as where pictures are read later."""
    task, seen = stage(tmp_path), []
    logits, (matmul, conv) = task.model.logits, (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)

    def spied(pixels):
        seen.append((matmul.fp32_precision, conv.fp32_precision))
        return logits(pixels)

    task.model.logits = spied
    with fp32_products("rounded"):
        task.evaluate(0)
        assert (matmul.fp32_precision, conv.fp32_precision) == ("bf16", "bf16")
    assert seen == [("ieee", "ieee")]


def test_psnr_is_in_decibels_of_the_mean_squared_error_of_each_picture():
    pixels = torch.full((3, 3, 2, 2), 0.5)
    other = pixels.clone()
    other[1] += 0.1
    other[2, 0] += 0.3  # one channel of three: a mean of 0.03
    assert psnr(pixels, other).tolist() == pytest.approx([100, 20, 15.2288], rel=1e-5)


def test_a_dying_codebook_is_told_at_the_second_evaluation_in_a_row(tmp_path, capsys):
    task = stage(tmp_path)

    def warned() -> bool:
        capsys.readouterr()
        task.evaluate(0)
        return "warning: only 7.7% of the codes were in use lately" in capsys.readouterr().err

    task.window.add(torch.zeros(129, dtype=torch.long))
    assert [warned() for _ in range(3)] == [False] * 3  # too few codes to judge by
    task.window.add(torch.zeros(1, dtype=torch.long))
    assert [warned() for _ in range(3)] == [False, True, True]
    task.window.add(torch.ones(1, dtype=torch.long))
    assert not warned()
    assert task.alarms == 0


def test_runs_of_other_seeds_are_measured_on_the_same_pictures(tmp_path):
    settings = ("image_size=16", "hidden=12", "codebook_width=12", "patch=4", "start=random")
    seen = []
    for seed in (0, 1, 2):
        options = Options(
            tmp_path / str(seed), preset="tiny", settings=(*settings, "eval_pictures=3", f"seed={seed}")
        )
        seen.append(prepare(options).task.heldout)
    assert seen[0].shape == (3, 3, 16, 16)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


class Same:
    """A loader of four pictures, each of one colour, over and over."""

    def __init__(self) -> None:
        colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], dtype=torch.uint8)
        self.pixels, self.skipped = colours[:, :, None, None].repeat(1, 1, 16, 16), {}

    def batches(self, _start, _stride):
        while True:
            yield (self.pixels,)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_four_colours_are_learned(tmp_path, precision):
    """By the loop, with all that it is told: grey gives 6.0 dB, as the weights at the start do."""
    settings = (
        "image_size=16", "hidden=12", "codebook_width=12", "blocks_per_group=1", "patch=4", "vocab_size=16",
        "batch_size=4", "eval_pictures=1", "start=random", "pixel_std=0.3", "tau_start=1", "beta_start=0",
        "beta=0", "warmup=5", "lr=0.01", "ema_decay=0.9", "log_every=1", f"precision={precision}",
    )  # fmt: skip
    session = prepare(Options(tmp_path, preset="tiny", steps=60, settings=settings))
    assert session.engine.precision == precision
    four, model = Same(), session.task.model
    pixels = four.pixels / 255
    assert decibel(pixels, model.decode(model.encode(pixels))) < 6.5
    assert fit(session._replace(loader=four))
    lines = [line for line in read_metrics(tmp_path / "dvae") if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    assert [lines[i]["lr"] for i in (0, 4)] == pytest.approx([0.002, 0.01], rel=0.02)
    assert decibel(pixels, model.decode(model.encode(pixels))) > 9


def begun(folder, *settings: str, data: str | None = None):
    """A session of the smallest dVAE."""
    small = ("image_size=16", "hidden=12", "codebook_width=12", "patch=4", "start=random", "eval_pictures=3")
    return prepare(Options(folder / "run", data, preset="tiny", settings=small + settings))


@pytest.mark.parametrize("asked", ["false", "true"])
def test_activations_are_recomputed_where_that_is_asked_for(tmp_path, asked):
    blocks = [
        m for m in begun(tmp_path, f"recompute={asked}").task.model.modules() if isinstance(m, ResBlock)
    ]
    assert blocks
    assert {block.recompute for block in blocks} == {asked == "true"}


def pictures(folder, n: int, small: int) -> str:
    """The path of so many, one of which is too small to be used."""
    folder.mkdir()
    for i in range(n):
        (folder / f"{i}.png").write_bytes(tiny.png(i, (20, 15 if i == small else 16)))
        (folder / f"{i}.txt").write_text("noise")
    return str(folder)


def test_held_out_pictures_that_cannot_be_used_are_told_too(tmp_path):
    data = pictures(tmp_path / "data", 13, small=12)
    session = begun(tmp_path, "heldout=0.5", "eval_pictures=99", data=data)
    assert list(session.loader.skipped) == ["12.png"]


def test_pictures_that_could_not_be_clustered_are_told_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("stage1_dvae.train.start_from_patches", lambda *_: None)
    data = pictures(tmp_path / "data", 9, small=4)
    session = begun(tmp_path, "start=patches", "heldout=0", data=data)
    assert list(session.loader.skipped) == ["4.png"]
    assert "pictures to cluster 7/7" in capsys.readouterr().err


def test_patches_are_clustered_by_the_runs_seed_and_only_where_it_begins(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(
        "stage1_dvae.train.start_from_patches", lambda _, pixels, seed: told.append((len(pixels), seed))
    )
    begun(tmp_path, "start=patches", "vocab_size=13", "seed=5").write_config()
    (tmp_path / "run" / "dvae" / "state" / "step-00000001").mkdir(parents=True)
    prepare(Options(tmp_path / "run"))
    assert told == [(104, 5)]  # four times 32 patches a code, 16 of them in a picture


@pytest.mark.parametrize("flip", ["true", "false"])
def test_pictures_are_flipped_where_they_may_be(tmp_path, flip):
    (tmp_path / "data").mkdir()
    for i in range(3):
        (tmp_path / "data" / f"{i}.png").write_bytes(tiny.png(i, (16, 16)))
        (tmp_path / "data" / f"{i}.txt").write_text("noise")
    session = begun(tmp_path, f"flip={flip}", "batch_size=16", "workers=0", data=str(tmp_path / "data"))
    (seen,) = next(session.loader.batches())
    plain = [torch.from_numpy(np.array(tiny.picture(i, (16, 16)))).permute(2, 0, 1) for i in range(3)]
    upright = sum(any(torch.equal(pixels, each) for each in plain) for pixels in seen)
    assert 0 < upright < 16 if flip == "true" else upright == 16


def test_no_more_held_out_pictures_are_seen_at_once_than_in_training(tmp_path):
    task, seen = stage(tmp_path, dataclasses.replace(PAPER, batch_size=8, micro_batch=2), pictures=5), []
    logits = task.model.logits
    task.model.logits = lambda pixels: seen.append(len(pixels)) or logits(pixels)
    task.evaluate(0)
    assert max(seen) <= 2
    assert sum(seen) == 5
