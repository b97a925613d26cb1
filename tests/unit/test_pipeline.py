"""From prompts to pictures."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from dalle.checkpoint import fingerprint, read_json, write_json
from dalle.errors import CheckpointError, ConfigError, DataError
from dalle.pipeline import AT_ONCE, TextToImage, fingerprint_of
from stage2_prior.sample import Sampling
from tests import tiny

PROMPTS = ["a red circle", "a blue star", "a green square"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny.write_run(tmp_path_factory.mktemp("pipeline") / "run")


@pytest.fixture(scope="module")
def model(run) -> TextToImage:
    return TextToImage.load(run, device="cpu", precision="fp32")


def bytes_of(pictures) -> list[bytes]:
    return [picture.tobytes() for picture in pictures]


def codes_of(model: TextToImage, n: int, seed: int = 0) -> torch.Tensor:
    """The codes of n pictures of the first prompt."""
    decoder = model._decoder(n)
    text = decoder.read(model._tokens(PROMPTS[:1]))
    return model._codes(decoder, text, [seed], range(n), Sampling())


def test_a_loaded_run_draws_pictures_of_its_size(model):
    (picture,) = model("a red circle")
    assert picture.size == (16, 16)
    assert picture.mode == "RGB"


def test_the_first_pictures_are_the_same_however_many_are_drawn(model):
    assert AT_ONCE == 16
    many = bytes_of(model(PROMPTS[0], n=19, seed=3))
    assert bytes_of(model(PROMPTS[0], n=4, seed=3)) == many[:4]
    assert bytes_of(model(PROMPTS[0], n=17, seed=3)) == many[:17]
    assert len(set(many)) == 19


def test_prompts_can_have_seeds_of_their_own(model):
    together = bytes_of(model(PROMPTS, n=2, seed=[5, 6, 5]))
    apart = [
        one for prompt, seed in zip(PROMPTS, (5, 6, 5), strict=True)
        for one in bytes_of(model(prompt, n=2, seed=seed))
    ]  # fmt: skip
    assert together == apart
    with pytest.raises(DataError, match="2 seeds for 3 prompts"):
        model(PROMPTS, seed=[1, 2])


def test_a_run_draws_in_its_own_way_unless_asked_otherwise(run, model, tmp_path):
    guided = tmp_path / "guided"
    shutil.copytree(run, guided)
    config, way = read_json(guided / "prior" / "config.json"), {"guidance": 3.0, "top_p": 0.5}
    write_json(guided / "prior" / "config.json", config | {"training": {"caption_dropout": 0.1, **way}})
    own = TextToImage.load(guided, device="cpu", precision="fp32")
    assert own.resolve(None) == Sampling(top_p=0.5, guidance=3.0)
    assert own.resolve(Sampling(0.5)) == Sampling(0.5, None, 0.5, 3.0)
    assert own.resolve(Sampling(guidance=1.5)) == Sampling(top_p=0.5, guidance=1.5)
    asked = bytes_of(own(PROMPTS[0], sampling=Sampling(top_p=1.0, guidance=1.0)))
    assert asked == bytes_of(model(PROMPTS[0]))
    assert bytes_of(own(PROMPTS[0])) == bytes_of(own(PROMPTS[0], sampling=Sampling(**way))) != asked


def test_guidance_is_refused_where_every_picture_had_its_caption(model):
    assert model.resolve(None).guidance == 1.0
    assert bytes_of(model(PROMPTS[0], sampling=Sampling(guidance=1.0))) == bytes_of(model(PROMPTS[0]))
    with pytest.raises(ConfigError, match=r"guidance=2\.0 needs .*caption_dropout=0\.1"):
        model(PROMPTS[0], sampling=Sampling(guidance=2.0))


def test_a_cpu_that_computes_in_bf16_draws_the_same(run, model):
    rounding = TextToImage.load(run, device="cpu", precision="bf16")
    assert bytes_of(rounding(PROMPTS[0], n=3, seed=3)) == bytes_of(model(PROMPTS[0], n=3, seed=3))


@pytest.mark.parametrize("n", [1, 3, 7, 17])
def test_prompts_drawn_together_are_those_drawn_alone_in_their_order(model, n):
    together = bytes_of(model(PROMPTS, n=n, seed=1))
    alone = [one for prompt in PROMPTS for one in bytes_of(model(prompt, n=n, seed=1))]
    assert together == alone
    assert len(together) == 3 * n


def test_the_seed_and_the_prompt_decide(model):
    one = bytes_of(model(PROMPTS[0], n=2, seed=1))
    assert bytes_of(model(PROMPTS[0], n=2, seed=1)) == one
    assert bytes_of(model(PROMPTS[0], n=2, seed=2)) != one
    assert bytes_of(model(PROMPTS[1], n=2, seed=1)) != one


def test_other_random_numbers_have_no_influence(model):
    torch.manual_seed(1)
    np.random.seed(1)
    one = bytes_of(model(PROMPTS[0], seed=5))
    torch.manual_seed(2)
    np.random.seed(2)
    assert bytes_of(model(PROMPTS[0], seed=5)) == one


def test_settings_reach_the_choice_of_codes(model):
    greedy = bytes_of(model(PROMPTS[0], n=3, sampling=Sampling(0.0)))
    assert len(set(greedy)) == 1
    assert bytes_of(model(PROMPTS[0], n=3, seed=9, sampling=Sampling(top_k=1))) == greedy
    assert len(set(bytes_of(model(PROMPTS[0], n=3)))) == 3


def test_progress_is_told_token_by_token(model):
    told = []
    model(PROMPTS, n=7, on_token=told.append)
    assert sum(told) == 3 * 7 * 16
    assert set(told) == {14, 7}  # two prompts beside each other, then the third


def test_blanks_around_a_prompt_do_not_count(model):
    assert bytes_of(model("  a red circle\n")) == bytes_of(model("a red circle"))
    assert bytes_of(model("A Red CIRCLE")) == bytes_of(model("a red circle"))


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t"])
def test_an_empty_prompt_is_refused(model, prompt):
    with pytest.raises(DataError, match="an empty prompt cannot be drawn"):
        model([PROMPTS[0], prompt])


def test_no_prompts_make_no_pictures(model):
    assert model([]) == []


def test_a_prompt_too_long_is_refused_with_the_limit(model):
    assert len(model("zzzzzzzz")) == 1  # 8 tokens, as many as there are slots
    with pytest.raises(DataError, match=r"the prompt 'zzzzzzzzz'… has over 8 tokens.* shorten it"):
        model("zzzzzzzzz")


@pytest.mark.parametrize("n", [0, -3])
def test_fewer_than_one_picture_is_refused(model, n):
    with pytest.raises(DataError, match=f"n={n} pictures cannot be drawn"):
        model(PROMPTS[0], n=n)


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def test_loading_needs_neither_states_nor_metrics(run, model):
    assert {path.name for path in run.rglob("*") if path.is_file()} == {
        "config.json", "weights.safetensors", "tokenizer.json",
    }  # fmt: skip


def test_what_is_loaded_is_frozen(model):
    parameters = [*model.prior.parameters(), *model.dvae.parameters()]
    assert not any(p.requires_grad or p.is_meta for p in parameters)
    assert not model.prior.training
    assert not model.dvae.training


@pytest.mark.parametrize(("stage", "command"), [("dvae", "train-dvae"), ("prior", "train-prior")])
def test_a_missing_stage_is_told_with_the_command_that_makes_it(copy, stage, command):
    (copy / stage / "weights.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"holds no trained {stage}: `dalle {command} --run"):
        TextToImage.load(copy)
    shutil.rmtree(copy / stage)
    with pytest.raises(CheckpointError, match=f"holds no trained {stage}"):
        TextToImage.load(str(copy))


def test_a_replaced_dvae_is_refused_with_both_fingerprints(copy):
    trained_on = fingerprint_of(copy)
    tiny.write_dvae(copy, seed=1)
    present = fingerprint(copy / "dvae" / "weights.safetensors")
    assert trained_on != present
    with pytest.raises(CheckpointError, match=f"trained on the dVAE {trained_on}, but .* is {present}"):
        TextToImage.load(copy)


def test_a_replaced_tokenizer_is_refused(copy):
    from dalle.text import Tokenizer

    other = Tokenizer.train(["some quite different captions"] * 9, 280)
    other.save(copy / "prior" / "tokenizer.json")
    with pytest.raises(CheckpointError, match=f"the tokenizer .* is {other.fingerprint()}"):
        TextToImage.load(copy)


@pytest.mark.parametrize(
    ("part", "change", "what"),
    [
        ("dvae", lambda: tiny.dvae(vocab_size=17), "codes is 13 in the prior, 17"),
        ("dvae", lambda: tiny.dvae(groups=2), "grid is 4 in the prior, 8"),
        ("prior", lambda: tiny.prior(text_vocab=99), "text tokens is 99 in the prior"),
    ],
)
def test_parts_that_do_not_fit_are_refused(model, part, change, what):
    with pytest.raises(CheckpointError, match=what):
        dataclasses.replace(model, **{part: change()})


def test_broken_weights_are_told(copy):
    from safetensors.torch import load_file, save_file

    path = copy / "prior" / "weights.safetensors"
    weights = load_file(path)
    weights["image_head.bias"][3] = torch.nan
    save_file(weights, path)
    with pytest.raises(ConfigError, match="not finite"):
        TextToImage.load(copy, precision="fp32")(PROMPTS[0])


def test_half_precision_draws_too(run):
    model = TextToImage.load(run, precision="bf16")
    assert len(set(bytes_of(model(PROMPTS[0], n=2)))) == 2


def test_the_pictures_are_the_decoded_codes(model):
    codes = codes_of(model, 2)
    decoded = (model.dvae.decode(codes) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for picture, expected in zip(model(PROMPTS[0], n=2), decoded, strict=True):
        assert np.array_equal(np.asarray(picture), expected)


@pytest.mark.parametrize("at_once", [1, 3, 5, 64])
def test_however_few_are_drawn_at_once_the_pictures_are_the_same(model, at_once):
    few, told = dataclasses.replace(model, at_once=at_once), []
    assert bytes_of(few(PROMPTS, n=7, seed=2, on_token=told.append)) == bytes_of(model(PROMPTS, n=7, seed=2))
    assert max(told) <= max(at_once, 1)
    assert sum(told) == 3 * 7 * 16


def test_nothing_can_be_drawn_none_at_once(model):
    with pytest.raises(ConfigError, match="at_once=0 must be at least 1"):
        dataclasses.replace(model, at_once=0)


def test_the_text_is_read_once_for_all_pictures_of_a_prompt(model, monkeypatch):
    read = []
    embed = type(model.prior).embed_text
    monkeypatch.setattr(
        type(model.prior),
        "embed_text",
        lambda self, tokens: (read.append(len(tokens)), embed(self, tokens))[1],
    )
    model(PROMPTS[0], n=40)
    assert read == [1]


@pytest.mark.parametrize("weights", ["fp16", "bf16", "int8", "int4"])
def test_other_weights_draw_too(run, weights):
    model = TextToImage.load(run, precision="fp32", weights=weights)
    assert len(set(bytes_of(model(PROMPTS[0], n=3)))) == 3


def test_previews_show_what_is_drawn_so_far(model):
    seen = []
    drawn = dataclasses.replace(model, at_once=4)(
        PROMPTS[:2], n=3, preview=lambda first, pictures: seen.append((first, pictures))
    )
    # 4 rows of codes: three previews of each of the two times three pictures
    assert [(first, len(pictures)) for first, pictures in seen] == 3 * [(0, 3)] + 3 * [(3, 3)]
    for i, (_, pictures) in enumerate(seen):
        rows = 4 * (i % 3 + 1)  # pixels
        for picture in pictures:
            assert (np.asarray(picture)[rows:] == 128).all()
            assert not (np.asarray(picture)[:rows] == 128).all()
    assert bytes_of(drawn) == bytes_of(model(PROMPTS[:2], n=3))


def test_without_a_preview_nothing_is_decoded_on_the_way(model, monkeypatch):
    decoded = []
    decode = type(model.dvae).decode
    monkeypatch.setattr(
        type(model.dvae), "decode", lambda self, codes: (decoded.append(len(codes)), decode(self, codes))[1]
    )
    model(PROMPTS[0], n=5)
    assert decoded == [5]
