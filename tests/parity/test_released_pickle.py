"""OpenAI's own modules, pickled as the released files are, and files that only look like them."""

import io
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import dall_e
import pytest
import torch
from torch import nn

from dalle.errors import CheckpointError
from stage1_dvae.released import ENCODER, read_pickle, read_released

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
SIZES = {"n_hid": 16, "n_blk_per_group": 1, "vocab_size": 67}


def save(thing: object, path: Path, zipped: bool = True) -> Path:
    with warnings.catch_warnings():
        # the legacy format adds each class's source, and cannot find that of classes made by attrs
        warnings.filterwarnings("ignore", message="Couldn't retrieve source code")
        torch.save(thing, path, _use_new_zipfile_serialization=zipped)
    return path


def nets() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    nets = {"encoder": dall_e.Encoder(**SIZES), "decoder": dall_e.Decoder(n_init=8, **SIZES)}
    for net in nets.values():
        for parameter in net.parameters():
            nn.init.normal_(parameter)  # the biases, too
    return nets


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def files(request, tmp_path) -> tuple[Path, Path]:
    return tuple(save(net, tmp_path / f"{name}.pkl", request.param) for name, net in nets().items())


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_pickle(path, ENCODER)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert "weights_only" not in message
    return message


def test_every_tensor(files):
    for tensors, net in zip(read_released(*files), nets().values(), strict=True):
        expected = net.state_dict()
        assert list(tensors) == list(expected)
        for name, tensor in tensors.items():
            assert type(tensor) is torch.Tensor
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


@FORMATS
def test_tensors_that_share_a_storage_or_are_not_contiguous(tmp_path, zipped):
    net = dall_e.Encoder(**SIZES)
    net.to(memory_format=torch.channels_last)
    net.blocks.input.b.data = torch.arange(40.0)[7:39:2]
    tensors = read_pickle(save(net, tmp_path / "encoder.pkl", zipped), ENCODER)
    assert tensors["blocks.input.b"].tolist() == list(range(7, 39, 2))
    for name, expected in net.state_dict().items():
        assert tensors[name].is_contiguous()
        torch.testing.assert_close(tensors[name], expected, rtol=0, atol=0)


def test_tensors_can_be_written(files):
    tensors = read_pickle(files[0], ENCODER)
    tensors["blocks.input.b"].zero_()  # not a view of read-only bytes


def test_full_size_names(tmp_path):
    """74 and 76 tensors, as in the released files (paper's depth, small width)."""
    sizes = SIZES | {"n_blk_per_group": 2}
    encoder = save(dall_e.Encoder(**sizes), tmp_path / "encoder.pkl")
    decoder = save(dall_e.Decoder(n_init=8, **sizes), tmp_path / "decoder.pkl")
    assert [len(tensors) for tensors in read_released(encoder, decoder)] == [74, 76]


def test_swapped(files):
    encoder, decoder = files
    expected = f"{decoder}: holds dall_e.decoder.Decoder, expected dall_e.encoder.Encoder"
    with pytest.raises(CheckpointError, match=f"^{re.escape(expected)}$"):
        read_released(decoder, encoder)


def test_missing(tmp_path):
    assert "No such file" in refused(tmp_path / "encoder.pkl")
    assert "cannot be read" in refused(tmp_path)


class Touch:
    """A pickle that would make a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@FORMATS
@pytest.mark.parametrize("inside", [False, True])
def test_nothing_is_run(tmp_path, zipped, inside):
    made = tmp_path / "made"
    thing = Touch(made)
    if inside:
        thing = dall_e.Encoder(**SIZES)
        thing.blocks.extra = Touch(made)
    path = save(thing, tmp_path / "encoder.pkl", zipped)
    message = refused(path)
    assert f"{os.mkdir.__module__}.mkdir" in message
    assert "expected a pickled dall_e.encoder.Encoder" in message
    assert not made.exists()
    torch.load(path, weights_only=False)  # the file is as bad as it should be
    assert made.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_is_run_in_a_bare_pickle(tmp_path, protocol):
    path = tmp_path / "encoder.pkl"
    path.write_bytes(pickle.dumps(Touch(tmp_path / "made"), protocol))
    assert "mkdir" in refused(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "name",
    ["builtins eval", "torch load", "dall_e load_model", "torch._utils _rebuild_tensor_v2.__globals__"],
)
def test_names_that_are_nearly_known(tmp_path, name):
    path = tmp_path / "encoder.pkl"
    path.write_bytes(b"c" + name.replace(" ", "\n").encode() + b"\n.")
    assert repr(name.replace(" ", ".")) in refused(path)


@FORMATS
@pytest.mark.parametrize(
    ("thing", "named"),
    [
        (nn.Linear(2, 3), "torch.nn.modules.linear.Linear"),
        (dall_e.Encoder(**SIZES).half(), "torch.HalfStorage"),
        (nn.Sequential(nn.ReLU()), "torch.nn.modules.container.Sequential"),
        (dall_e.Encoder(**SIZES).state_dict(), "OrderedDict"),
        ({"a": 1}, "dict"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_things_of_torch(tmp_path, zipped, thing, named):
    message = refused(save(thing, tmp_path / "encoder.pkl", zipped))
    assert named in message
    assert "expected" in message


def test_an_encoder_with_other_parameters(tmp_path):
    encoder = dall_e.Encoder(**SIZES)
    encoder.blocks.group_4.extra = dall_e.utils.Conv2d(1, 1, 1)
    assert "'blocks.group_4.extra.w'" in refused(save(encoder, tmp_path / "encoder.pkl"))
    encoder = dall_e.Encoder(**SIZES)
    del encoder.blocks.input
    assert "has no 'blocks.input.w'" in refused(save(encoder, tmp_path / "encoder.pkl"))


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>", b"PK\3\4", b"\x80\x02.", b"\x80\x02K\x01."])
def test_no_pickle(tmp_path, content):
    path = tmp_path / "encoder.pkl"
    path.write_bytes(content)
    assert "not a file that torch saved, or a damaged one" in refused(path)


def test_damaged(files):
    whole = files[0].read_bytes()
    for kept in (100, len(whole) // 2, len(whole) - 3000):
        files[0].write_bytes(whole[:kept])
        assert "damaged" in refused(files[0])


def test_a_zip_without_a_pickle(tmp_path):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a/b.txt", "c")
    path = tmp_path / "encoder.pkl"
    path.write_bytes(archive.getvalue())
    assert "not a file that torch saved" in refused(path)
