"""Pictures to look at."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

import dalle.pictures
from dalle.errors import CheckpointError
from dalle.pictures import GAP, contact_sheet, grid, save_png, to_images, to_pixels


def flat(colour: str, size: tuple[int, int] = (7, 5)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_pixels_become_bytes_by_rounding_and_are_never_stretched():
    values = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 0.5, 254.4 / 255, 1.0, -0.3, 1.7])
    (picture,) = to_images(values.reshape(1, 1, 2, 4).repeat(1, 3, 1, 1))
    assert picture.mode == "RGB"
    assert picture.size == (4, 2)
    assert np.asarray(picture)[..., 1].flatten().tolist() == [0, 0, 1, 128, 254, 255, 0, 255]


def test_bytes_become_pixels_and_the_same_bytes_again():
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, 3, 1, 1)
    pixels = to_pixels(every)
    assert pixels.dtype == torch.float32
    assert (pixels.min(), pixels.max()) == (0, 1)
    for picture in to_images(pixels):
        assert np.array_equal(np.asarray(picture).transpose(2, 0, 1), every[0])


def test_channels_are_red_green_blue():
    pixels = torch.zeros(1, 3, 2, 5)
    pixels[:, 0] = 1
    assert to_images(pixels)[0].getpixel((4, 1)) == (255, 0, 0)


def test_half_precision_pixels_can_be_shown():
    (picture,) = to_images(torch.full((1, 3, 2, 2), 0.5, dtype=torch.bfloat16))
    assert picture.getpixel((0, 0)) == (128, 128, 128)


def test_a_grid_puts_each_picture_at_its_row_and_column():
    colours = [["red", "lime", "blue"], ["black", "yellow"]]
    sheet = grid([[flat(colour) for colour in row] for row in colours])
    assert sheet.size == (3 * 7 + 2 * GAP, 2 * 5 + GAP)
    for r, row in enumerate(colours):
        for c, colour in enumerate(row):
            box = (c * (7 + GAP), r * (5 + GAP), c * (7 + GAP) + 7, r * (5 + GAP) + 5)
            assert sheet.crop(box).tobytes() == flat(colour).tobytes()
    assert sheet.getpixel((sheet.width - 1, sheet.height - 1)) == (255, 255, 255)
    assert sheet.getpixel((7, 0)) == (255, 255, 255)


@pytest.mark.parametrize(("n", "columns", "rows"), [(1, 1, 1), (3, 3, 1), (4, 4, 1), (5, 4, 2), (9, 4, 3)])
def test_a_contact_sheet_has_four_pictures_a_row(n, columns, rows):
    one = contact_sheet([flat("red", (16, 16))], ["x"])
    sheet = contact_sheet([flat("red", (16, 16))] * n, ["x"] * n)
    across, down = one.width - 8, one.height - 8
    assert sheet.size == (columns * across + 8, rows * down + 8)
    reds = int((np.asarray(sheet) == (255, 0, 0)).all(-1).sum())
    assert reds == n * 128**2


def test_captions_stand_below_their_pictures():
    pictures = [flat("red", (16, 16)), flat("blue", (16, 16))]
    blank, left = (np.asarray(contact_sheet(pictures, [words, " "])) for words in (" ", "words"))
    different = (blank != left).any(-1)
    ys, xs = different.nonzero()
    assert ys.min() > 8 + 128
    assert xs.max() < 8 + 128


@pytest.mark.parametrize("caption", ["", "a" * 500, "빨간 원 😀", "two\nlines", " ".join(["word"] * 90)])
def test_any_caption_can_stand_there(caption):
    sheet = contact_sheet([flat("red", (200, 200))] * 2, [caption, "x"])
    assert sheet.width == 2 * 208 + 8
    assert sheet.height < 400


def test_a_machine_without_a_font_of_many_alphabets_leaves_out_accents(monkeypatch):
    own = ImageFont.truetype

    def only_own(font, *arguments, **more):
        if isinstance(font, str):
            raise OSError("cannot open resource")
        return own(font, *arguments, **more)

    monkeypatch.setattr(ImageFont, "truetype", only_own)
    monkeypatch.setattr(dalle.pictures, "_font", dalle.pictures._font.__wrapped__)
    with_accents, without = (
        contact_sheet([flat("red")], [words]) for words in ("Éléphant à côté", "Elephant a cote")
    )
    assert with_accents == without


def test_a_png_says_how_it_was_made(tmp_path):
    facts = {"prompt": "빨간 원", "seed": 7, "top_k": None, "list": ["a", 1.5]}
    save_png(tmp_path / "new" / "one.png", flat("red"), facts)
    with Image.open(tmp_path / "new" / "one.png") as picture:
        assert picture.format == "PNG"
        assert picture.convert("RGB").tobytes() == flat("red").tobytes()
        texts = dict(picture.text)
    assert texts.pop("prompt") == "빨간 원"
    assert {key: json.loads(text) for key, text in texts.items()} == {
        "seed": 7,
        "top_k": None,
        "list": ["a", 1.5],
    }


def test_the_same_picture_and_facts_give_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        save_png(tmp_path / name, flat("red"), {"seed": 7})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_png_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "one.png"
    save_png(path, flat("red"))
    before = path.read_bytes()

    def full(self, file, **_):
        file.write_bytes(b"half a pic")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_png(path, flat("blue"))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["one.png"]
