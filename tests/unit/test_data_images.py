"""Every kind of picture file comes out as upright RGB on white, or as a bad sample with a reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from dalle.data.images import decode
from dalle.data.source import BadSample

RAMP = np.arange(35, dtype=np.uint8).reshape(5, 7) * 7  # 7 wide, 5 high


def packed(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data):
    image = decode(data, "key")
    assert image.mode == "RGB"
    return np.asarray(image)


def rgb():
    return Image.fromarray(np.stack([RAMP, 255 - RAMP, RAMP // 2], axis=-1))


def test_rgb_is_unchanged_from_bytes_and_from_a_path(tmp_path):
    (tmp_path / "a.png").write_bytes(packed(rgb()))
    np.testing.assert_array_equal(pixels(packed(rgb())), np.asarray(rgb()))
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), np.asarray(rgb()))


@pytest.mark.parametrize(("orientation", "turns", "mirrored"), [(3, 2, False), (6, 3, False), (2, 0, True)])
def test_exif_orientation_is_applied(orientation, turns, mirrored):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = np.rot90(np.asarray(rgb()), turns)
    upright = upright[:, ::-1] if mirrored else upright
    np.testing.assert_array_equal(pixels(packed(rgb(), exif=exif)), upright)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_as_pillow_does(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = packed(rgb().resize((24, 16)), kind, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert upright.shape == ((16, 24, 3) if orientation < 5 else (24, 16, 3))
    np.testing.assert_array_equal(pixels(data), upright)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_damaged_metadata_cost_no_picture(kind):
    data = packed(rgb(), kind, exif=b"Exif\0\0nothing", lossless=True)
    with Image.open(io.BytesIO(data)) as image, pytest.raises(SyntaxError):
        ImageOps.exif_transpose(image)
    np.testing.assert_array_equal(pixels(data), np.asarray(rgb()))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(mode):
    image = Image.new("RGBA", (4, 3), (0, 0, 0, 255))
    image.putpixel((1, 2), (0, 0, 0, 0))
    if mode == "P":
        image = Image.new("P", (4, 3), 0)
        image.putpalette([0, 0, 0, 0, 255, 0])
        image.putpixel((1, 2), 1)
        data = packed(image, transparency=1)
    else:
        data = packed(image.convert(mode))
    expected = np.zeros((3, 4, 3), np.uint8)
    expected[2, 1] = 255
    np.testing.assert_array_equal(pixels(data), expected)


def test_a_transparent_grey_of_16_bits_becomes_white():
    deep = RAMP.astype(np.uint16) * 257
    expected = RAMP.copy()
    expected[2, 3] = 255  # no other is as grey
    data = packed(Image.fromarray(deep), transparency=int(deep[2, 3]))
    np.testing.assert_array_equal(pixels(data)[..., 0], expected)


def test_half_transparent_black_becomes_grey():
    np.testing.assert_allclose(pixels(packed(Image.new("RGBA", (3, 3), (0, 0, 0, 128)))), 127, atol=1)


def test_greyscale_has_three_equal_channels():
    np.testing.assert_array_equal(pixels(packed(Image.fromarray(RAMP))), np.stack([RAMP] * 3, axis=-1))


def test_cmyk_keeps_its_colour():
    red = pixels(packed(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    assert red[..., 0].min() > 240
    assert red[..., 1:].max() < 15


@pytest.mark.parametrize(
    ("kind", "deep"),
    [
        ("PNG", RAMP.astype(np.uint16) * 257),
        ("TIFF", RAMP.astype(np.uint16) * 257),
        ("TIFF", RAMP.astype(np.int32) * 257),
        ("TIFF", RAMP.astype(np.float32)),
        ("TIFF", RAMP.astype(np.float32) / 255),
    ],
)
def test_deep_pictures_are_scaled_not_clipped(kind, deep):
    np.testing.assert_array_equal(pixels(packed(Image.fromarray(deep), kind))[..., 0], RAMP)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (6, 5), colour) for colour in ("red", "blue")]
    assert pixels(packed(frames[0], "GIF", save_all=True, append_images=frames[1:]))[0, 0].tolist() == [
        255,
        0,
        0,
    ]


def bomb():
    """A PNG of a few bytes that says it is 40,000 pixels wide and high."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>404</html>", "not a picture"),
        (packed(rgb())[:-40], "cannot be decoded"),
        (packed(rgb().resize((300, 300)), "JPEG")[:2000], "truncated"),
        (bomb(), "exceeds limit"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not a picture"),
    ],
)
def test_unusable_data_is_a_bad_sample_with_a_reason(data, reason):
    with pytest.raises(BadSample, match=reason) as caught:
        decode(data, "shard.tar/7.png")
    assert caught.value.key == "shard.tar/7.png"


def test_a_missing_file_is_a_bad_sample(tmp_path):
    with pytest.raises(BadSample, match=r"^a\.png: no such file"):
        decode(tmp_path / "a.png", "a.png")


def test_a_large_photograph_gives_no_warning(monkeypatch):
    monkeypatch.setattr(
        Image, "MAX_IMAGE_PIXELS", 20
    )  # Pillow warns above this, and refuses above twice this
    assert pixels(packed(rgb())).shape == (5, 7, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_damage_never_raises_anything_else(kind):
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = packed(
        rgb().resize((40, 30)), kind, **({"exif": exif} if kind in {"PNG", "JPEG", "WEBP"} else {})
    )
    for _ in range(150):
        damaged = bytearray(whole)
        for place in rng.integers(len(damaged), size=3):
            damaged[place] = rng.integers(256)
        try:
            assert decode(bytes(damaged), "key").mode == "RGB"
        except BadSample as bad:
            assert bad.reason  # noqa: PT017
