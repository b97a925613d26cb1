"""OpenAI's pickles, imported: the same codes and pictures to the last bit, and nothing executed."""

import os
import warnings
from pathlib import Path

import dall_e
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dalle.checkpoint import read_json
from dalle.errors import CheckpointError
from stage1_dvae.model import DVAE
from stage1_dvae.released import import_released

SIZES = {"n_hid": 4, "n_blk_per_group": 2, "vocab_size": 67}


def save(net: object, path: Path, zipped: bool) -> Path:
    with warnings.catch_warnings():
        # the legacy format adds each class's source, and cannot find that of classes made by attrs
        warnings.filterwarnings("ignore", message="Couldn't retrieve source code")
        torch.save(net, path, _use_new_zipfile_serialization=zipped)
    return path


def blocks() -> torch.Tensor:
    """A picture of 32×32 squares, each of a colour of its own."""
    colours = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return colours.repeat_interleave(8, 2).repeat_interleave(8, 3)


@pytest.fixture(scope="module")
def nets() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    encoder, decoder = dall_e.Encoder(**SIZES), dall_e.Decoder(n_init=6, **SIZES)
    with torch.no_grad():
        for net in (encoder, decoder):
            for p in net.parameters():
                p.normal_(std=0.3)
        # else a few codes win everywhere
        encoder.blocks.output.conv.b -= encoder(dall_e.map_pixels(blocks())).mean((0, 2, 3))
    return encoder, decoder


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def files(request, nets, tmp_path) -> tuple[Path, Path]:
    names = ("encoder.pkl", "decoder.pkl")
    return tuple(save(net, tmp_path / name, request.param) for net, name in zip(nets, names, strict=True))


@torch.no_grad()
def test_the_imported_model_gives_their_codes_and_pictures_bit_for_bit(nets, files, tmp_path):
    encoder, decoder = nets
    config = import_released(*files, tmp_path / "run" / "dvae")
    ours = DVAE.load(tmp_path / "run" / "dvae")
    assert ours.config == config
    assert (config.image_size, config.grid, config.vocab_size, config.hidden) == (256, 32, 67, 4)
    assert (config.codebook_width, config.blocks_per_group, config.resblock_gain) == (6, 2, 1 / 64)

    pixels = blocks()
    codes = encoder(dall_e.map_pixels(pixels)).argmax(1)
    assert len(codes.unique()) > 9
    assert torch.equal(ours.encode(pixels), codes)

    one_hot = F.one_hot(codes, num_classes=67).permute(0, 3, 1, 2).float()
    theirs = dall_e.unmap_pixels(torch.sigmoid(decoder(one_hot).float()[:, :3]))
    torch.testing.assert_close(ours.decode(codes), theirs, rtol=0, atol=0)
    same_road = dall_e.unmap_pixels(torch.sigmoid(ours.decoder(one_hot).float()[:, :3]))
    torch.testing.assert_close(same_road, theirs, rtol=0, atol=0)


def test_the_folder_says_that_it_was_imported(files, tmp_path):
    import_released(*files, tmp_path / "run" / "dvae")
    saved = read_json(tmp_path / "run" / "dvae" / "config.json")
    assert (saved["preset"], saved["data"]) == ("imported", None)
    assert "training" not in saved


def test_a_model_that_is_there_already_is_kept(files, tmp_path):
    folder = tmp_path / "run" / "dvae"
    import_released(*files, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match="holds a model already"):
        import_released(*files, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_swapped_files_are_told_apart(files, tmp_path):
    encoder, decoder = files
    with pytest.raises(
        CheckpointError, match=r"holds dall_e\.decoder\.Decoder, expected dall_e\.encoder\.Encoder"
    ):
        import_released(decoder, encoder, tmp_path / "run" / "dvae")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("other", [{"vocab_size": 71}, {"n_hid": 8}, {"n_blk_per_group": 1}])
def test_halves_of_two_models_are_refused(files, tmp_path, other):
    decoder = save(dall_e.Decoder(n_init=6, **SIZES | other), tmp_path / "other.pkl", zipped=True)
    with pytest.raises(CheckpointError, match="do not hold the two halves of one released dVAE"):
        import_released(files[0], decoder, tmp_path / "run" / "dvae")
    assert not (tmp_path / "run").exists()


class Touch:
    """A pickle that would make a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("half", [0, 1])
def test_a_foreign_class_is_refused_and_nothing_executed(files, tmp_path, zipped, half):
    pair = list(files)
    pair[half] = save(Touch(tmp_path / "made"), tmp_path / "evil.pkl", zipped)
    with pytest.raises(CheckpointError, match=r"evil\.pkl: names '\w+\.mkdir'.*nothing of it was run"):
        import_released(*pair, tmp_path / "run" / "dvae")
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "run").exists()
