"""Step → value, at numbers that can be checked by hand."""

import dataclasses
import math

import pytest

from dalle.schedules import Plateau, cosine, warmup


def test_the_cosine_starts_ends_and_stays():
    assert cosine(0, 10, 3.0, 1.0) == 3.0
    assert cosine(5, 10, 3.0, 1.0) == pytest.approx(2.0)
    assert cosine(10, 10, 3.0, 1.0) == 1.0
    assert cosine(11, 10, 3.0, 1.0) == cosine(10**9, 10, 3.0, 1.0) == 1.0
    assert cosine(0, 0, 3.0, 1.0) == 1.0


def test_a_quarter_of_the_cosine():
    assert cosine(25, 100, 1.0, 0.0) == pytest.approx((2 + math.sqrt(2)) / 4)  # 0.854; a line has 0.75


def test_the_warm_up_is_linear_and_its_first_update_moves():
    assert [warmup(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warmup(0, 0) == 1.0
    assert 4.5e-4 * warmup(2_499, 5_000) == pytest.approx(2.25e-4)


def observe(plateau: Plateau, losses) -> Plateau:
    for loss in losses:
        plateau.observe(loss)
    return plateau


def test_a_falling_loss_never_halves():
    assert observe(Plateau(patience=20), (5 * 0.998**t for t in range(2000))).factor == 1.0


def test_a_plateau_halves_once_per_patience_and_five_times_at_most():
    plateau = observe(Plateau(patience=20), [3.0])
    halvings = [observe(plateau, [3.0] * 20).halvings for _ in range(8)]
    assert halvings == [1, 2, 3, 4, 5, 5, 5, 5]
    assert 4.5e-4 * plateau.factor == pytest.approx(1.40625e-5)  # the paper's last step size


def test_noise_around_a_falling_mean_does_not_halve_and_around_a_level_mean_does():
    noise = [0.3 * math.sin(1.7 * t) for t in range(1000)]
    assert observe(Plateau(patience=100), (5 * 0.998**t + n for t, n in enumerate(noise))).halvings == 0
    assert observe(Plateau(patience=100), (3 + n for n in noise)).halvings == 5


def test_a_loss_that_falls_again_after_a_halving_is_left_alone():
    plateau = observe(Plateau(patience=20), [3.0] * 21)
    assert observe(plateau, (3 * 0.995**t for t in range(200))).halvings == 1


def test_a_negative_loss_has_plateaus_too():
    assert observe(Plateau(patience=20), (-1 - 0.01 * t for t in range(300))).halvings == 0
    assert observe(Plateau(patience=20), [-2.0] * 41).halvings == 2


def test_losses_that_are_not_finite_are_ignored():
    plateau = observe(Plateau(patience=3), [2.0])
    before = dataclasses.asdict(plateau)
    assert dataclasses.asdict(observe(plateau, [math.nan, math.inf] * 9)) == before
