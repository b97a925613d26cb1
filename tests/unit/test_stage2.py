"""What the loop is told while the prior trains: its data, schedules, losses, measures, and a warning."""

import copy
import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dalle.data.source import BadSample, Sample
from dalle.errors import ConfigError
from dalle.metrics import read_metrics
from dalle.pipeline import codec_of
from dalle.runs import Options, StageRun
from dalle.text import NO_TOKEN, cut_or_pad, normalise
from dalle.training import fit as train
from stage2_prior.codec import Codec
from stage2_prior.config import PRESETS, PriorTraining
from stage2_prior.loss import losses, weighted
from stage2_prior.sample import Sampling, noise
from stage2_prior.train import Stage2, _captions, _prepare, _some_captions, prepare, prepare_plainly, resolve
from tests import tiny

MODEL, PAPER = PRESETS["paper"]


def test_the_papers_numbers():
    m, t = MODEL, PAPER
    assert (m.text_length, m.text_vocab, m.image_vocab, m.grid) == (256, 16_384, 8192, 32)
    assert (m.depth, m.width, m.heads, m.width // m.heads, m.kernel) == (64, 3968, 62, 64, 11)
    assert (t.batch_size, t.steps) == (1024, 430_000)
    assert (t.lr, t.warmup, t.lr_schedule, t.lr_end) == (4.5e-4, 5_000, "plateau", 4.5e-4 / 32)
    assert (t.optimizer, t.beta1, t.beta2, t.weight_decay) == ("adamw", 0.9, 0.96, 4.5e-2)
    assert (t.clip, t.variance_limit) == (4, 5)
    assert (t.ema_decay, t.ema_every) == (0.99, 25)
    assert (t.text_weight, t.bpe_vocab, t.bpe_spaces, t.bpe_dropout) == (1 / 8, 16_384, "alone", 0.1)
    assert (t.caption_dropout, t.code_dropout, t.guidance, t.top_p) == (0, 0, 1, 1)
    assert (t.compression_rank, t.compression_format, t.recompute) == (896, "16bit", True)


def pictures_of(codes: torch.Tensor) -> torch.Tensor:
    """Bytes that the stand-in dVAE encodes as these codes."""
    pixels = torch.zeros(len(codes), 3, 16, 16, dtype=torch.uint8)
    pixels[:, 0, :4, :4] = (codes.view(-1, 4, 4) / 12 * 255).round().byte()
    return pixels


def stage(folder, training: PriorTraining = PAPER, codes: torch.Tensor | None = None) -> Stage2:
    words, model = tiny.tokenizer(), tiny.prior(text_vocab=280)
    plan = StageRun(folder / "prior", "paper", "scenes", model.config, training, resumed=False)
    dvae = Codec(
        16, 4, 13, lambda p: (p[:, 0, :4, :4] * 12).round().long(),
        lambda c: (c / 12)[:, None].expand(-1, 3, -1, -1), torch.eye(13), "0",
    )  # fmt: skip
    pixels = pictures_of(torch.zeros(2, 16) if codes is None else codes)
    tokens = torch.from_numpy(cut_or_pad(words.encode("red"), 6)[0]).repeat(len(pixels), 1)
    return Stage2(model, plan, dvae, words, (pixels, tokens), ["red"], "fp32")


def test_the_papers_step_size_rises_stays_and_is_halved_on_a_plateau_five_times(tmp_path):
    task = stage(tmp_path, dataclasses.replace(PAPER, patience=20))
    steps = (0, 2_499, 4_999, 5_000, 100_000)
    assert [task.lr(step) for step in steps] == pytest.approx([9e-8, 2.25e-4, 4.5e-4, 4.5e-4, 4.5e-4])
    found = []
    for _ in range(140):
        task.after(3.0)
        if not found or task.lr(100_000) != found[-1]:
            found.append(task.lr(100_000))
    assert found == pytest.approx([4.5e-4 / 2**n for n in range(6)])  # 1.406e-5 at last
    assert task.lr(0) == pytest.approx(9e-8 / 32)


def test_a_falling_loss_keeps_the_step_size(tmp_path):
    task = stage(tmp_path, dataclasses.replace(PAPER, patience=20))
    for step in range(200):
        task.after(5 * 0.99**step)
    assert task.lr(10**6) == 4.5e-4


def test_the_other_schedule_is_a_cosine_after_the_same_warm_up(tmp_path):
    asked = {"lr_schedule": "cosine", "lr": 1e-3, "lr_end": 1e-5, "steps": 100, "warmup": 10, "patience": 9}
    task = stage(tmp_path, dataclasses.replace(PAPER, **asked))
    for _ in range(60):
        task.after(3.0)  # a plateau, which does not count
    by_hand = {0: 1e-4, 50: 5.05e-4, 100: 1e-5, 101: 1e-5, 25: 1e-5 + 9.9e-4 * (2 + math.sqrt(2)) / 4}
    assert [task.lr(step) for step in by_hand] == pytest.approx(list(by_hand.values()))


def test_what_is_saved_of_the_plateau_is_that_of_its_update(tmp_path):
    """It is written while training goes on."""
    task = stage(tmp_path)
    saved = task.state()
    as_saved = copy.deepcopy(saved)
    task.after(3.0)
    assert saved == as_saved != task.state()


def test_the_loss_of_a_batch_is_the_mean_of_those_of_its_micro_batches(tmp_path):
    """Also where their captions are of different lengths."""
    task, found = stage(tmp_path), []
    tokens, codes = tiny.batch(task.model, 4)
    tokens[-1, 0] = 0  # a token like all others
    columns = (
        pictures_of(codes),
        tokens,
        torch.zeros(4, dtype=torch.bool),
        torch.zeros(4, 16, dtype=torch.bool),
    )
    for size in (1, 2, 4):
        parts = list(zip(*(column.split(size) for column in columns), strict=True))
        task.begin(parts, lambda function, *arguments: function(*arguments))
        with torch.no_grad():
            found.append(torch.stack([task.loss(part, 0, range(size))[0] for part in parts]).mean().item())
    expected = weighted(*losses(task.model, tokens, codes)).item()
    assert found == pytest.approx([expected] * 3, rel=1e-5)


def test_the_entropy_of_codes_alone_is_that_of_their_frequencies(tmp_path):
    codes = torch.tensor([3] * 16 + [5] * 8 + [7] * 8).view(2, 16)
    task = stage(tmp_path, codes=codes)
    assert torch.equal(task.heldout_codes, codes)
    with torch.no_grad():
        measured = task.evaluate(3)
    assert measured["heldout_unigram_entropy"] == pytest.approx(1.5 * math.log(2))
    assert stage(tmp_path).unigram_entropy == 0


def test_held_out_losses_do_not_depend_on_how_many_pictures_are_taken_at_once(tmp_path):
    """Parts with longer captions count for more text."""
    one, found = stage(tmp_path), []
    one.heldout_codes = torch.randint(13, (6, 16), generator=torch.Generator().manual_seed(0))
    tokens = torch.full((6, one.heldout_tokens.shape[1]), NO_TOKEN)
    for picture, words in enumerate((1, 5, 2, 0, 3, 4)):
        tokens[picture, :words] = torch.arange(words)
    one.heldout_tokens = tokens
    one.drawings = lambda: Image.new("RGB", (8, 8))
    with torch.no_grad():
        for one.at_once in (1, 4, 6):
            found.append(one.evaluate(1))
    for part in found[:2]:
        assert part == pytest.approx(found[2], rel=1e-5)


@pytest.mark.parametrize(("guidance", "top_p"), [(1.0, 1.0), (5.0, 1.0), (1.0, 0.1), (5.0, 0.1)])
def test_drawings_of_an_evaluation_follow_the_runs_guidance_and_top_p(tmp_path, guidance, top_p):
    training = dataclasses.replace(PAPER, caption_dropout=0.1, guidance=guidance, top_p=top_p, seed=4)
    task, decoded = stage(tmp_path, training), []
    decode = task.codec.decode
    task.codec.decode = lambda codes: (decoded.append(codes), decode(codes))[1]
    task.drawings()
    uniform, drawn = noise(4, range(1), 16), {}
    for how in (Sampling(), Sampling(top_p=top_p, guidance=guidance)):
        drawn[how] = tiny.drawn(task.model, task.prompt_tokens, uniform, how).view(1, 4, 4)
    assert torch.equal(decoded[0], drawn[Sampling(top_p=top_p, guidance=guidance)])
    assert torch.equal(decoded[0], drawn[Sampling()]) == (guidance == top_p)


def test_captions_that_were_cut_are_counted_and_told(tmp_path, capsys):
    task = stage(tmp_path)
    tokens, codes = tiny.batch(task.model, 3)
    hidden = torch.zeros(3, 16, dtype=torch.bool)

    def told(*cut: bool) -> str:
        batch = (pictures_of(codes), tokens, torch.tensor(cut), hidden)
        task.begin([batch], lambda function, *arguments: function(*arguments))
        task.loss(batch, 0, range(3))
        capsys.readouterr()
        task.warn_of_cuts()
        return capsys.readouterr().err

    assert told(False, False, False) == ""
    assert told(True, False, True) == "warning: 2 of 6 captions were cut to 6 tokens: raise text_length\n"
    assert told(False, True, False).startswith("warning: 3 of 9 captions")


CAPTIONS = ("A Red circle", "the BLUE star, left", "a café\u0301 of the square")
SAMPLE = Sample(Image.new("RGB", (20, 24)), CAPTIONS, "0")
HOW = {"size": 16, "words": 60, "cells": 16, "caption_dropout": 0.0, "code_dropout": 0.0}


def test_what_is_trained_on_are_the_words_of_each_of_the_captions():
    words, read = tiny.tokenizer(), []
    for seed in range(40):
        _, tokens, cut, _ = _prepare(SAMPLE, np.random.default_rng(seed), words, **HOW, bpe_dropout=0.0)
        read.append(words.decode(tokens.tolist()))
        assert [token for token in tokens.tolist() if token != NO_TOKEN] == words.encode(read[-1])
        assert not cut
    assert set(read) == {normalise(caption) for caption in CAPTIONS}
    assert min(map(read.count, read)) >= 5  # of 13, were all equally often


def test_pictures_are_cropped_at_random_in_training_and_in_the_middle_when_held_out():
    ramp = Image.fromarray(np.repeat(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], 20, 0).repeat(3, 2))
    words, sample = tiny.tokenizer(), Sample(ramp, CAPTIONS, "0")
    trained, held = set(), set()
    for seed in range(20):
        pixels, *_ = _prepare(sample, np.random.default_rng(seed), words, **HOW, bpe_dropout=0.0)
        trained.add(pixels.float().mean().item())
        held.add(prepare_plainly(sample, np.random.default_rng(seed), words, 16, 60)[0].float().mean().item())
    assert len(trained) > 5
    assert len(held) == 1


def test_merges_are_left_out_in_training_and_the_words_are_the_same():
    words, tokens_of = tiny.tokenizer(), {}
    for seed in range(60):
        _, tokens, _, _ = _prepare(SAMPLE, np.random.default_rng(seed), words, **HOW, bpe_dropout=0.3)
        kept = tuple(token for token in tokens.tolist() if token != NO_TOKEN)
        tokens_of.setdefault(words.decode(kept), set()).add(kept)
    assert set(tokens_of) == {normalise(caption) for caption in CAPTIONS}
    assert all(len(ways) > 3 for ways in tokens_of.values())


def test_a_caption_too_long_keeps_its_beginning_and_says_so():
    words = tiny.tokenizer()
    sample = Sample(SAMPLE.image, ("a red circle " * 9,), "0")
    _, tokens, cut, _ = _prepare(
        sample, np.random.default_rng(0), words, **HOW | {"words": 5}, bpe_dropout=0.0
    )
    assert tokens.tolist() == words.encode("a red circle " * 9)[:5]
    assert cut


def test_held_out_are_the_words_of_the_first_caption():
    words = tiny.tokenizer()
    for captions in (CAPTIONS, CAPTIONS[::-1]):
        sample = Sample(SAMPLE.image, captions, "0")
        for seed in range(3):
            _, tokens = prepare_plainly(sample, np.random.default_rng(seed), words, size=16, words=60)
            assert words.decode(tokens.tolist()) == normalise(captions[0])


class Captioned:
    """Two captions a sample; those in `broken` cannot be read."""

    name = "captioned"

    def __init__(self, length, broken=()):
        self.length, self.broken = length, set(broken)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return Sample(SAMPLE.image, self.captions(index), str(index))

    def captions(self, index):
        if index in self.broken:
            raise BadSample(str(index), "torn")
        return (f"{index}", f"{index} again")


def test_the_prompts_of_evaluations_are_first_captions_from_all_over_the_data():
    assert _captions(Captioned(100), 4) == ["0", "25", "50", "75"]
    assert _captions(Captioned(100, broken=range(50)), 4) == ["50", "75", "51", "76"]
    assert _captions(Captioned(3, broken=[1]), 8) == ["0", "2"]


def test_merges_are_learned_from_all_captions_of_samples_from_all_over_the_data():
    found = list(_some_captions(Captioned(10, broken=[4]), 5))
    assert found == [caption for n in (0, 2, 6, 8) for caption in (f"{n}", f"{n} again")]


COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture
def coloured(tmp_path):
    """Pictures of one colour, whose captions name it, and a dVAE."""
    (tmp_path / "data").mkdir()
    for i in range(12):
        name = list(COLOURS)[i % 3]
        Image.new("RGB", (20, 24), COLOURS[name]).save(tmp_path / "data" / f"{i}.png")
        (tmp_path / "data" / f"{i}.txt").write_text(f"The {name} square\nall {name}\n")
    tiny.write_dvae(tmp_path / "run")
    return tmp_path


def begun(folder, *settings: str):
    """A session on these pictures."""
    small = (
        "width=12", "heads=3", "depth=2", "text_length=30", "bpe_vocab=300", "workers=0", "batch_size=4",
        "precision=fp32", "attention=dense", "eval_pictures=1", "log_every=1", "heldout=0.1",
    )  # fmt: skip
    options = Options(folder / "run", str(folder / "data"), "tiny", 60, small + settings)
    return prepare(options, codec_of(folder / "run"), preset="tiny", data="scenes")


def tokenizer_of(folder):
    from dalle.text import Tokenizer

    return Tokenizer.load(folder / "run" / "prior" / "tokenizer.json")


@pytest.mark.parametrize("dropout", [0, 1])
def test_every_picture_of_a_batch_comes_with_its_own_words(coloured, dropout):
    session = begun(coloured, "caption_dropout=0", "guidance=1", f"bpe_dropout={dropout}")
    words, batches, seen = tokenizer_of(coloured), session.loader.batches(0, 1), set()
    for _ in range(12):
        pixels, tokens, *_ = next(batches)
        for picture, row in zip(pixels, tokens.tolist(), strict=True):
            text = words.decode(row)
            (name,) = (name for name in COLOURS if name in text)
            assert tuple(picture[:, 8, 8].tolist()) == COLOURS[name]
            assert text in (f"the {name} square", f"all {name}")
            whole = words.encode(text)
            kept = [token for token in row if token != NO_TOKEN]
            assert kept == whole if not dropout else len(kept) == len(text) > len(whole)
            seen.add(text)
    assert len(seen) == 6


def test_settings_leave_out_captions_and_codes(coloured):
    session = begun(coloured, "caption_dropout=1", "code_dropout=1", "guidance=1")
    _, tokens, cut, hidden = next(session.loader.batches(0, 1))
    assert (tokens == NO_TOKEN).all()
    assert hidden.all()
    assert not cut.any()


def test_merges_are_learned_from_as_many_captions_as_asked(coloured, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "stage2_prior.train._some_captions", lambda source, most: asked.append(most) or ["a red circle"]
    )
    begun(coloured, "bpe_captions=7")
    assert asked == [7]


def test_the_model_knows_the_tokens_that_there_are(coloured):
    session = begun(coloured, "bpe_vocab=16384")
    assert session.task.run.model.text_vocab == tokenizer_of(coloured).vocab_size < 300


def test_before_they_are_learned_there_may_be_as_many_tokens_as_are_asked_for(coloured):
    options = Options(coloured / "run", settings=("bpe_vocab=300",))
    run = resolve(options, codec_of(coloured / "run"), preset="paper", data="scenes")
    assert run.model.text_vocab == 300


def test_a_training_that_saved_nothing_leaves_nothing_measured_behind_nor_of_another_dvae(coloured):
    begun(coloured).write_config()
    how = {"preset": "paper", "data": "scenes"}
    again = resolve(Options(coloured / "run"), codec_of(coloured / "run"), **how)
    assert (again.preset, again.training.attention) == ("tiny", "auto")
    asked = Options(coloured / "run", settings=("attention=dense",))
    assert resolve(asked, codec_of(coloured / "run"), **how).training.attention == "dense"
    another = dataclasses.replace(codec_of(coloured / "run"), fingerprint="another")
    assert resolve(Options(coloured / "run"), another, **how).preset == "paper"


def test_a_run_is_not_continued_with_another_tokenizer(coloured):
    begun(coloured).write_config()
    (coloured / "run" / "prior" / "state" / "step-00000001").mkdir(parents=True)
    how = {"preset": "tiny", "data": "scenes"}
    prepare(Options(coloured / "run"), codec_of(coloured / "run"), **how)
    tiny.tokenizer().save(coloured / "run" / "prior" / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"was begun with the tokenizer \w{16}, .* put that one back"):
        prepare(Options(coloured / "run"), codec_of(coloured / "run"), **how)


@pytest.mark.parametrize(("setting", "limit"), [("none", None), ("3", 3.0)])
def test_the_variance_is_limited_as_asked(coloured, setting, limit):
    assert begun(coloured, f"variance_limit={setting}").engine.optimizer.variance_limit == limit


@pytest.mark.parametrize("asked", ["false", "true"])
def test_activations_are_recomputed_where_that_is_asked_for(coloured, asked):
    assert begun(coloured, f"recompute={asked}").task.model.recompute == (asked == "true")


def test_held_out_pictures_that_cannot_be_used_are_told_too(coloured):
    Image.new("RGB", (20, 15)).save(coloured / "data" / "12.png")
    (coloured / "data" / "12.txt").write_text("small")
    assert list(begun(coloured, "heldout=0.5", "eval_pictures=99").loader.skipped) == ["12.png"]


def test_runs_of_other_seeds_are_measured_on_the_same_pictures(coloured):
    found = []
    for seed in range(4):
        shutil.rmtree(coloured / "run" / "prior", ignore_errors=True)
        found.append(begun(coloured, "heldout=0.5", f"seed={seed}").task.heldout_tokens)
    assert all(torch.equal(tokens, found[0]) for tokens in found)


class Same:
    """A loader of one batch, over and over."""

    def __init__(self, batch) -> None:
        self.batch, self.skipped = batch, {}

    def batches(self, _start, _stride):
        while True:
            yield self.batch


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_one_batch_is_learned_by_heart(coloured, precision):
    """By the loop, with all that it is told: codes that nothing but memory can foretell."""
    settings = ("lr=0.02", "lr_end=0.001", "warmup=5", "caption_dropout=0", "guidance=1")
    session = begun(coloured, *settings, f"precision={precision}")
    assert session.engine.precision == precision
    codes = torch.randint(13, (4, 4, 4), generator=torch.Generator().manual_seed(0))
    session.task.codec.encode = lambda _pixels: codes
    assert train(session._replace(loader=Same(next(session.loader.batches(0, 1)))))
    lines = [line for line in read_metrics(coloured / "run" / "prior") if "loss" in line]
    assert lines[0]["image_loss"] > 2  # ln 13 is 2.56
    assert lines[-1]["image_loss"] < 0.5
    assert lines[-1]["text_loss"] < 1
    assert [lines[i]["lr"] for i in (0, 4)] == pytest.approx([0.004, 0.02], rel=0.02)
