"""The dVAE's shapes, refusals, size and files."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from dalle.checkpoint import FORMAT, save_weights, write_json
from dalle.config import to_json
from dalle.errors import CheckpointError, DalleError
from dalle.precision import fp32_products
from stage1_dvae import model as model_module
from stage1_dvae.config import PRESETS, DVAEConfig
from stage1_dvae.likelihood import map_pixels, reconstruction
from stage1_dvae.model import DVAE, Conv2d, ResBlock, matrix_flops, most_probable

CONFIG = DVAEConfig(image_size=20, vocab_size=11, hidden=8, codebook_width=5, groups=3, blocks_per_group=1)


def dvae(**changes) -> DVAE:
    torch.manual_seed(0)
    return DVAE(dataclasses.replace(CONFIG, **changes))


def pixels(n: int = 2, size: int = 20) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def codes(n: int = 2, grid: int = 5, vocab: int = 11) -> torch.Tensor:
    return torch.randint(vocab, (n, grid, grid), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("groups", "grid"), [(1, 20), (2, 10), (3, 5)])
@pytest.mark.parametrize("blocks_per_group", [1, 2])
def test_shapes(groups, grid, blocks_per_group):
    model = dvae(groups=groups, blocks_per_group=blocks_per_group)
    assert model.config.grid == grid
    assert model.logits(pixels()).shape == (2, 11, grid, grid)
    found = model.encode(pixels())
    assert found.shape == (2, grid, grid)
    assert found.dtype == torch.int64
    shown = model.decode(found)
    assert shown.shape == (2, 3, 20, 20)
    assert shown.min() >= 0
    assert shown.max() <= 1
    assert model.decoder(torch.rand(2, 11, grid, grid)).shape == (2, 6, 20, 20)


@pytest.mark.parametrize("codes", [1, 7, 64, 96, 130, 256])
def test_the_most_probable_code_is_the_argmax(codes):
    """Also of equal logits, of which the first one counts, of none, and in any order of memory."""
    noise = torch.Generator().manual_seed(codes)
    for shape in ((3, 2, 5, codes), (0, 2, 2, codes)):
        fine, coarse = torch.randn(shape, generator=noise), torch.randint(4, shape, generator=noise).float()
        for logits in (fine, coarse, torch.zeros(shape), fine.transpose(1, -1).contiguous().transpose(1, -1)):
            assert torch.equal(most_probable(logits), logits.argmax(-1))


def test_encoding_takes_the_most_probable_code():
    model = dvae()
    assert torch.equal(model.encode(pixels()), model.logits(pixels()).argmax(1))


def test_encoding_has_no_noise_and_does_not_depend_on_the_batch():
    model = dvae()
    torch.manual_seed(1)
    first = model.encode(pixels(3))
    assert torch.equal(model.encode(pixels(3)), first)
    assert torch.equal(model.encode(pixels(3)[1:2]), first[1:2])


def test_encoding_rounds_nothing_where_training_does():
    """What oneDNN is told is looked at as well: without AMX it rounds nothing either way."""
    model, seen = dvae(vocab_size=500), []
    plain = model.encode(pixels(50))
    logits, (matmul, conv) = model.logits, (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)

    def spied(some):
        seen.append((matmul.fp32_precision, conv.fp32_precision))
        return logits(some)

    model.logits = spied
    with fp32_products("rounded"):
        assert torch.equal(model.encode(pixels(50)), plain)
        assert (matmul.fp32_precision, conv.fp32_precision) == ("bf16", "bf16")
    assert seen == [("ieee", "ieee")]


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (torch.rand(1, 3, 24, 20), r"\(1, 3, 24, 20\)"),
        (torch.rand(1, 3, 40, 40), r"\(1, 3, 40, 40\)"),
        (torch.rand(1, 3, 20, 20).double(), "float64"),
    ],
)
def test_pixels_of_another_shape_or_type_are_refused(wrong, got):
    with pytest.raises(
        ValueError, match=rf"expected float32 pixels of shape \(batch, 3, 20, 20\), got .*{got}"
    ):
        dvae().encode(wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(1, 4, 4, dtype=torch.int64), r"shape \(batch, 5, 5\), got \(1, 4, 4\)"),
        (torch.full((1, 5, 5), 11), "from 0 to 10, got 11 to 11"),
        (torch.full((1, 5, 5), -1), "from 0 to 10, got -1 to -1"),
    ],
)
def test_codes_of_another_shape_or_vocabulary_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dvae().decode(wrong)


def test_an_empty_batch_is_no_error():
    model = dvae()
    assert model.encode(pixels(0)).shape == (0, 5, 5)
    assert model.decode(codes(0)).shape == (0, 3, 20, 20)


@pytest.mark.parametrize("patch", [1, 2])
def test_looking_up_is_the_product_with_one_hot_codes_bit_for_bit(patch):
    model = dvae(patch=patch, image_size=20 * patch)
    torch.nn.init.normal_(model.decoder.blocks.input.b)
    one_hot = F.one_hot(codes(), 11).permute(0, 3, 1, 2).float()
    parameters = model.decoder(one_hot)
    torch.testing.assert_close(model.decoder.look_up(codes()), parameters, rtol=0, atol=0)
    torch.testing.assert_close(model.decode(codes()), reconstruction(parameters), rtol=0, atol=0)


def test_patches_are_folded_into_channels_and_out_again():
    """A model of patches is one of single pixels between two rearrangements."""
    model = dvae(patch=2, image_size=40)
    assert model.config.grid == dvae().config.grid == 5
    x = pixels(2, 40)
    folded = F.pixel_unshuffle(map_pixels(x), 2)
    y = model.encoder.blocks.input(folded)
    assert y.shape == (2, model.config.hidden, 20, 20)
    assert torch.equal(model.logits(x), model.encoder.blocks(folded))
    assert model.decode(model.encode(x)).shape == x.shape


def test_a_resblock_is_the_identity_plus_its_gain_times_four_convolutions():
    torch.manual_seed(0)
    block = ResBlock(4, 8, (3, 3, 3, 1), gain=0.3)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 4, 5, 7)
    y = x
    for n in range(1, 5):
        conv = block.res_path[f"conv_{n}"]
        y = F.conv2d(y.clamp(min=0), conv.w, conv.b, padding=conv.w.shape[-1] // 2)
    expected = F.conv2d(x, block.id_path.w, block.id_path.b) + 0.3 * y
    torch.testing.assert_close(block(x), expected)
    assert isinstance(ResBlock(8, 8, (1, 3, 3, 3), gain=1.0).id_path, torch.nn.Identity)


def test_the_gain_is_one_over_the_square_of_the_depth_unless_set():
    gains = {m.gain for m in dvae(blocks_per_group=2).modules() if isinstance(m, ResBlock)}
    assert gains == {1 / 36}
    assert {m.gain for m in dvae(gain=0.5).modules() if isinstance(m, ResBlock)} == {0.5}


def test_the_codebook_has_a_vector_for_every_code():
    model = dvae()
    one_hot = F.one_hot(torch.arange(11).reshape(1, 1, 11)).permute(0, 3, 1, 2).float()
    expected = (model.decoder.blocks.input(one_hot) - model.decoder.blocks.input.b[:, None, None])[
        0, :, 0
    ].t()
    torch.testing.assert_close(model.codebook(), expected)


def test_the_layers_beside_the_codes_stay_in_fp32_under_autocast():
    model = dvae()
    inside = {n: m.fp32 for n, m in model.named_modules() if isinstance(m, Conv2d)}
    assert {n for n, fp32 in inside.items() if fp32} == {"encoder.blocks.output.conv", "decoder.blocks.input"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.logits(pixels()).dtype == torch.float32
        assert model.decoder.blocks.input(torch.rand(1, 11, 5, 5)).dtype == torch.float32
        assert model.decode(codes()).dtype == torch.float32
        assert model.encoder.blocks.input(pixels()).dtype == torch.bfloat16


def test_the_papers_model_has_the_released_size():
    with torch.device("meta"):
        model = DVAE(PRESETS["paper"][0])
    for half, numel, tensors in ((model.encoder, 53_786_240, 74), (model.decoder, 43_829_766, 76)):
        assert sum(p.numel() for p in half.parameters()) == numel
        assert len(half.state_dict()) == tensors


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_fits_its_own_grid(name):
    config = dataclasses.replace(PRESETS[name][0], hidden=4, codebook_width=3, vocab_size=5)
    found = DVAE(config).encode(pixels(1, config.image_size))
    assert found.shape == (1, config.grid, config.grid)


def save(folder, model: DVAE) -> None:
    save_weights(folder, model.state_dict())
    write_json(folder / "config.json", {"format": FORMAT, "model": to_json(model.config)})


def test_a_saved_model_comes_back_ready_to_use(tmp_path):
    model = dvae(gain=0.5)
    save(tmp_path, model)
    loaded = DVAE.load(str(tmp_path))
    assert loaded.config == model.config
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    for (name, a), (other, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    assert torch.equal(model.logits(pixels()), loaded.logits(pixels()))
    assert torch.equal(model.decode(codes()), loaded.decode(codes()))


def test_a_folder_without_a_whole_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        DVAE.load(tmp_path)
    save(tmp_path, dvae())
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"weights\.safetensors does not exist"):
        DVAE.load(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"hidden": 16}, r"its config\.json asks for"),
        ({"groups": 4, "image_size": 24}, "of another model: it lacks"),
        ({"depth": 3}, r"config\.json does not describe a DVAEConfig: unknown \['depth'\]"),
        ({"hidden": 7}, "hidden=7 must be a multiple of 4"),
        (None, r"config\.json does not describe a DVAEConfig"),
    ],
)
def test_weights_and_configurations_that_do_not_fit_are_refused(tmp_path, model, message):
    save(tmp_path, dvae())
    changed = None if model is None else to_json(CONFIG) | model
    write_json(tmp_path / "config.json", {"format": FORMAT, "model": changed})
    with pytest.raises(DalleError, match=message):
        DVAE.load(tmp_path)


@pytest.mark.parametrize("groups", [1, 3])
def test_matrix_flops_are_two_for_every_weight_at_every_place(groups):
    model, counted = dvae(groups=groups), 0

    def count(conv, _, output):
        nonlocal counted
        counted += 2 * conv.w.numel() * output[0, 0].numel()

    for module in model.modules():
        if isinstance(module, Conv2d):
            module.register_forward_hook(count)
    model.decoder(model.logits(pixels(1)))
    expected = counted
    assert matrix_flops(model) == expected


@pytest.mark.parametrize("way", ["fast", "recompute", "both"])
def test_other_ways_to_compute_change_neither_values_nor_gradients(way, monkeypatch):
    plain, other, x = dvae(), dvae(), pixels(3)
    monkeypatch.setattr(model_module, "cores", lambda _: 2)
    if way != "recompute":
        other.for_speed()
    if way != "fast":
        other.recompute()

    def passed(model):
        decoded = model.decoder(torch.softmax(model.logits(x), 1))
        return decoded, *torch.autograd.grad(decoded.square().sum(), [*model.parameters()])

    torch.testing.assert_close(passed(other), passed(plain), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(other.decode(codes(3)), plain.decode(codes(3)))


def test_recomputing_does_run_the_resblocks_twice():
    model, runs = dvae(), []
    for module in model.modules():
        if isinstance(module, ResBlock):
            module.res_path["conv_1"].register_forward_hook(lambda *_: runs.append(1))
    model.logits(pixels()).sum().backward()
    once = len(runs)
    model.recompute()
    model.logits(pixels()).sum().backward()
    assert len(runs) == once + 2 * once
