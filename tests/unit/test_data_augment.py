"""The paper's two augmentations, and the area average they shrink with."""

from functools import partial
from math import ceil, floor

import numpy as np
import pytest
from PIL import Image

from dalle.data.augment import area_resize, centre_crop, stage1_crop, stage2_crop
from dalle.errors import DataError


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def place_map(width, height):
    """A picture whose pixel at (x, y) is the colour (x, y, 0)."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 0], picture[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(picture)


def slow_area(row, size):
    """TensorFlow's kernel in one dimension, pixel by pixel, in double precision."""
    scale = (len(row) - 1) / (size - 1) if size > 1 else len(row)
    averages = []
    for x in range(size):
        low, high = x * scale, (x + 1) * scale
        total = 0.0
        for i in range(floor(low), ceil(high)):
            total += row[min(i, len(row) - 1)] * (min(i + 1, high) - max(i, low))
        averages.append(total / scale)
    return np.array(averages)


@pytest.mark.parametrize(
    ("width", "height", "size"), [(13, 17, 5), (11, 11, 10), (9, 9, 3), (8, 5, 1), (7, 6, 9)]
)
def test_area_resize_is_the_slow_average(width, height, size):
    picture = noise(width, height)
    rows = np.apply_along_axis(slow_area, 0, picture.astype(float), size)
    expected = np.apply_along_axis(slow_area, 1, rows, size)
    resized = area_resize(picture, size)
    assert resized.dtype == np.uint8
    assert np.abs(resized - expected).max() <= 0.5 + 1e-4  # rounding, and float32


def test_area_resize_has_aligned_corners():
    # 5 → 3: scale 2, so the intervals are [0, 2), [2, 4) and [4, 6), the last of the last pixel alone.
    row = np.array([10, 20, 30, 40, 200], np.uint8)
    picture = np.repeat(np.tile(row, (5, 1))[..., None], 3, axis=2)
    np.testing.assert_array_equal(area_resize(picture, 3)[0, :, 0], [15, 35, 200])


def test_area_resize_rounds_half_to_even():
    row = np.array([0, 1, 1, 2, 7], np.uint8)  # averages 0.5, 1.5, 7
    picture = np.repeat(np.tile(row, (5, 1))[..., None], 3, axis=2)
    np.testing.assert_array_equal(area_resize(picture, 3)[0, :, 0], [0, 2, 7])


def test_area_resize_to_the_same_size_changes_nothing():
    np.testing.assert_array_equal(area_resize(noise(7, 7), 7), noise(7, 7))


@pytest.mark.parametrize("crop", [stage1_crop, stage2_crop])
def test_crops_are_functions_of_the_generator(crop):
    image = Image.fromarray(noise(61, 47))
    first, again, other = (crop(image, 16, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (3, 16, 16)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


UNFLIPPED = partial(stage1_crop, flip=False)


@pytest.mark.parametrize("crop", [stage1_crop, UNFLIPPED, stage2_crop])
def test_a_picture_of_the_target_size_is_unchanged_but_for_a_flip(crop):
    picture = noise(16, 16)
    upright = picture.transpose(2, 0, 1)
    flips = 0
    for seed in range(60):
        cropped = crop(Image.fromarray(picture), 16, np.random.default_rng(seed))
        flipped = (cropped == upright[:, :, ::-1]).all()
        assert flipped or (cropped == upright).all()
        flips += flipped
    assert 15 < flips < 45 if crop is stage1_crop else flips == 0


@pytest.mark.parametrize("crop", [centre_crop, lambda i, t: stage1_crop(i, t, np.random.default_rng(0))])
def test_a_picture_smaller_than_the_target_is_refused(crop):
    with pytest.raises(DataError, match="40×15 pixels, expected at least 16×16"):
        crop(Image.fromarray(noise(40, 15)), 16)


class Recorder(np.random.Generator):
    """Notes the range, both ends included, of every integer drawn, and draws its least or greatest."""

    def __init__(self, greatest=False):
        super().__init__(np.random.PCG64())
        self.ranges = []
        self.greatest = greatest

    def integers(self, low, high=None, endpoint=False):
        low, high = (0, low) if high is None else (low, high)
        self.ranges.append((low, high if endpoint else high - 1))
        return self.ranges[-1][self.greatest]

    def random(self):
        return 0.9  # no flip


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [(500, 400, (288, 384)), (300, 400, (288, 300)), (270, 999, (270, 270)), (256, 256, (256, 256))],
)
def test_listing_1_draws_from_the_papers_ranges(width, height, size):
    recorder = Recorder()
    stage1_crop(Image.new("RGB", (width, height)), 256, recorder)
    side, slack = min(width, height), size[0] - 256
    assert recorder.ranges == [(0, width - side), (0, height - side), size, (0, slack), (0, slack)]


@pytest.mark.parametrize(
    ("width", "height", "left", "top", "size"),
    [
        (500, 400, (37, 61), (0, 0), (256, 288)),  # slack 100: ⌊37.5⌋ to ⌊62.5⌋, the end left out
        (270, 271, (0, 0), (0, 0), (256, 270)),
        (256, 356, (0, 0), (37, 61), (256, 256)),
    ],
)
def test_listing_2_draws_from_the_papers_ranges(width, height, left, top, size):
    recorder = Recorder(greatest=True)
    stage2_crop(Image.new("RGB", (width, height)), 256, recorder)
    slack = size[1] - 256
    assert recorder.ranges == [left, top, size, (0, slack), (0, slack)]


@pytest.mark.parametrize(("greatest", "left"), [(False, 0), (True, 84)])
def test_listing_1_reaches_both_ends_of_the_long_side(greatest, left):
    cropped = stage1_crop(place_map(100, 16), 16, Recorder(greatest))
    np.testing.assert_array_equal(cropped[0, 0], np.arange(left, left + 16))
    np.testing.assert_array_equal(cropped[1, :, 0], np.arange(16))


def test_the_last_crop_is_taken_from_the_shrunk_square():
    # 40 → 24 by averages of [x · 39/23, (x + 1) · 39/23), then the last 16 of 24 both ways.
    cropped = stage1_crop(place_map(40, 40), 16, Recorder(greatest=True))
    expected = np.rint(slow_area(np.arange(40), 24))[8:]
    np.testing.assert_array_equal(cropped[0, 5], expected)
    np.testing.assert_array_equal(cropped[1, :, 5], expected)


@pytest.mark.parametrize("crop", [stage1_crop, stage2_crop])
def test_the_last_crop_reaches_every_place(crop):
    corners = set()
    for seed in range(200):
        cropped = crop(place_map(18, 18), 16, np.random.default_rng(seed))
        if (cropped[0, 0, 0] < cropped[0, 0, 15]) and cropped[1, 15, 0] - cropped[1, 0, 0] == 15:
            corners.add((int(cropped[0, 0, 0]), int(cropped[1, 0, 0])))
    assert corners >= {(x, y) for x in range(3) for y in range(3)}


def test_centre_crop_takes_the_middle():
    cropped = centre_crop(place_map(36, 16), 16)
    np.testing.assert_array_equal(cropped[0, 0], np.arange(10, 26))
    np.testing.assert_array_equal(cropped[1, :, 0], np.arange(16))


def test_centre_crop_shrinks_the_short_side():
    assert centre_crop(Image.new("RGB", (33, 90), (1, 2, 3)), 16).shape == (3, 16, 16)
    assert centre_crop(Image.new("RGB", (33, 90), (1, 2, 3)), 16)[:, 3, 5].tolist() == [1, 2, 3]
