"""Drawing codes: the noise, and the choice of a code."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dalle.errors import ConfigError
from dalle.threads import using
from stage2_prior.decode import TRIES, Decoder
from stage2_prior.sample import Sampling, choose_codes, draw, noise, read
from tests import oracles, tiny


@pytest.mark.parametrize(
    "how",
    [Sampling(), Sampling(0.7, top_k=4), Sampling(0.0), Sampling(guidance=2.5), Sampling(0.9, 5, None, 0.0)],
)
def test_drawing_yields_the_codes_of_the_oracle_without_a_cache(how):
    model = tiny.prior(grid=3)
    tokens, _ = tiny.batch(model, 2)
    uniform = noise(5, range(2), 9).repeat(2, 1)
    drawn = tiny.drawn(model, tokens, uniform, how)
    oracle = oracles.Prior(model)
    for row, u, caption in zip(drawn, uniform, tokens.repeat_interleave(2, 0), strict=True):
        guidance = 1.0 if how.guidance is None else how.guidance
        expected = oracle.draw(oracles.numbers(caption), u.tolist(), how.temperature, how.top_k, guidance)
        assert oracles.numbers(row) == expected


def test_guidance_counts_what_the_caption_adds():
    """At 1 it changes nothing; at 0 the caption has no say."""
    model = tiny.prior(grid=3)
    tokens, _ = tiny.batch(model, 2)
    uniform = noise(5, range(2), 9)

    def codes(how, text=tokens):
        return tiny.drawn(model, text, uniform, how)

    assert torch.equal(codes(Sampling(guidance=1.0)), codes(Sampling()))
    assert torch.equal(codes(Sampling(guidance=0.0)), codes(Sampling(), torch.full_like(tokens, -1)))
    assert not torch.equal(codes(Sampling(guidance=4.0)), codes(Sampling()))


def test_drawing_leaves_prompts_and_noise_as_they_were():
    model = tiny.prior(grid=3)
    tokens, _ = tiny.batch(model, 2)
    uniform = noise(5, range(2), 9).repeat(2, 1)
    before = tokens.clone(), uniform.clone()
    tiny.drawn(model, tokens, uniform, Sampling(0.5, 3, 0.9))
    assert torch.equal(tokens, before[0])
    assert torch.equal(uniform, before[1])


def test_codes_come_one_cell_at_a_time():
    model = tiny.prior(grid=3)
    tokens, _ = tiny.batch(model, 1)
    decoder = Decoder(model, 2)
    stream = draw(decoder, decoder.read(tokens), noise(0, range(2), 9), Sampling())
    first = next(stream)
    assert first.shape == (2,)
    assert first.dtype == torch.int64
    assert sum(1 for _ in stream) == 8


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_broken_weights_are_told_before_a_code_is_drawn_from_them(poison):
    model = tiny.prior(grid=3)
    with torch.no_grad():
        model.rows.weight[1] = poison
    tokens, _ = tiny.batch(model, 1)
    decoder = Decoder(model)
    stream = draw(decoder, decoder.read(tokens), noise(0, range(1), 9), Sampling())
    for _ in range(3):
        next(stream)
    with pytest.raises(ConfigError, match="not finite at cell 3"):
        next(stream)


def test_noise_is_a_function_of_seed_picture_and_cell_alone():
    whole = noise(3, range(16), 50)
    assert whole.shape == (16, 50)
    assert whole.dtype == torch.float32
    assert ((whole >= 0) & (whole < 1)).all()
    for part in (range(4), range(7, 9), range(15, 16)):
        assert torch.equal(noise(3, part, 50), whole[list(part)])
    assert torch.equal(noise(3, range(16), 20), whole[:, :20])
    assert len({tuple(row.tolist()) for row in [*whole, *noise(4, range(16), 50)]}) == 32
    assert whole[0, :2].tolist() == np.random.default_rng((3, 0)).random(2, dtype=np.float32).tolist()


LN = torch.tensor([[0.1, 0.4, 0.0, 0.3, 0.2]]).log()  # code 2 is impossible


def chosen(u: float, **how) -> int:
    return choose_codes(LN, torch.tensor([u]), Sampling(**how)).item()


def test_each_code_has_its_share_of_the_interval():
    edges = {0.0: 0, 0.0999: 0, 0.1001: 1, 0.4999: 1, 0.5001: 3, 0.7999: 3, 0.8001: 4, 1 - 2**-24: 4}
    assert {u: chosen(u) for u in edges} == edges


def test_a_code_without_probability_is_never_drawn():
    for values in (
        [-torch.inf, 0.0, -torch.inf],
        [0.0, -torch.inf, -torch.inf],
        [-torch.inf, -200.0, -400.0],
    ):
        logits = torch.tensor([values])
        possible = torch.softmax(logits, -1)[0] > 0
        for u in (0.0, 2**-24, 0.5, 1 - 2**-24, 1.0):
            assert possible[choose_codes(logits, torch.tensor([u]), Sampling())]
    assert {chosen(u) for u in np.linspace(0, 1, 1001)} == {0, 1, 3, 4}


def test_a_number_that_rounds_up_to_the_end_stays_within_the_codes():
    logits = torch.randn(1, 8192, generator=torch.Generator().manual_seed(0))
    for u in (1 - 2**-24, 1.0):
        assert 0 <= choose_codes(logits, torch.tensor([u]), Sampling()).item() < 8192
        assert choose_codes(logits, torch.tensor([u]), Sampling(top_k=1)).item() == logits.argmax()


def test_frequencies_follow_the_softmax():
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1])
    grid = (torch.arange(10_000) + 0.5) / 10_000
    for temperature in (1.0, 0.5, 3.0):
        drawn = choose_codes(logits.expand(10_000, -1), grid, Sampling(temperature))
        shares = torch.bincount(drawn, minlength=5) / 10_000
        torch.testing.assert_close(shares, torch.softmax(logits / temperature, -1), rtol=0, atol=2e-4)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_of_equal_logits_no_more_than_k_are_kept(k):
    logits = torch.tensor([[1.0, 3, 3, 3, 3, 3, 0, 2]]).expand(1000, -1)
    drawn = choose_codes(logits, (torch.arange(1000) + 0.5) / 1000, Sampling(top_k=k))
    assert len(set(drawn.tolist())) == k
    assert set(drawn.tolist()) <= {1, 2, 3, 4, 5}


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-38, 1e-9, 2e-6])
def test_temperatures_near_zero_take_the_likeliest_whatever_the_noise(temperature):
    assert {chosen(u, temperature=temperature) for u in np.linspace(0, 1, 101)} == {1}


@pytest.mark.parametrize(
    ("how", "support"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 3}, {1, 3, 4}),
        ({"top_k": 5}, {0, 1, 3, 4}),
        ({"top_k": 99}, {0, 1, 3, 4}),
        ({"top_p": 1e-9}, {1}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.41}, {1, 3}),
        ({"top_p": 0.71}, {1, 3, 4}),
        ({"top_p": 1.0}, {0, 1, 3, 4}),
        ({"top_k": 3, "top_p": 0.5}, {1, 3}),  # of the three, which share 0.9: 0.44, 0.33, 0.22
        ({"top_k": 2, "top_p": 0.5}, {1}),
    ],
)
def test_cuts_keep_the_likeliest_codes_in_their_proportions(how, support):
    grid = (torch.arange(3000) + 0.5) / 3000
    drawn = choose_codes(LN.expand(3000, -1), grid, Sampling(**how))
    shares = torch.bincount(drawn, minlength=5) / 3000
    assert set(shares.nonzero()[:, 0].tolist()) == support
    kept = torch.tensor([code in support for code in range(5)])
    expected = torch.where(kept, LN[0].exp(), 0)
    torch.testing.assert_close(shares, expected / expected.sum(), rtol=0, atol=2e-3)


def test_rows_are_cut_and_drawn_each_by_itself():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 0.0, 4.9]])
    drawn = choose_codes(logits, torch.tensor([0.999, 0.999]), Sampling(top_k=2))
    assert drawn.tolist() == [2, 2]
    assert choose_codes(logits, torch.tensor([0.999, 0.001]), Sampling(top_k=1)).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5 must be above 0 and at most 1"),
        ({"top_p": math.nan}, "top_p=nan"),
    ],
)
def test_settings_that_cannot_be_are_refused(how, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**how)


class Clock:
    """Of the decoder: it goes when it is told to."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("stage2_prior.decode.time", SimpleNamespace(perf_counter=lambda: self.now))


def test_threads_that_are_faster_only_at_their_best_are_not_taken(monkeypatch):
    """As on a machine whose cores others use: now and then nobody disturbs a step of two threads."""
    model, step, turns, clock = tiny.prior(), Decoder.step, iter(range(10**6)), Clock(monkeypatch)

    def disturbed(*arguments):
        alone = torch.get_num_threads() == 1
        clock.now += 0.02 if alone else 0.1 * (next(turns) % 3 > 0)
        return step(*arguments)

    monkeypatch.setattr(Decoder, "step", disturbed)
    with using(2):
        assert Decoder(model, 1).threads == 1


@pytest.mark.parametrize("faster", [1, 2])
def test_cells_are_drawn_with_as_many_threads_as_are_fastest(monkeypatch, faster):
    """Waking a second one takes longer than a small model's products. The caller keeps its own number."""
    model, seen, step, clock = tiny.prior(), [], Decoder.step, Clock(monkeypatch)

    def slow_otherwise(*arguments):
        seen.append(torch.get_num_threads())
        clock.now += 0.0 if seen[-1] == faster else 0.1
        return step(*arguments)

    monkeypatch.setattr(Decoder, "step", slow_otherwise)
    tokens, _ = tiny.batch(model, 1)
    with using(2):
        decoder = Decoder(model, 1)
        assert decoder.threads == faster
        assert set(seen) == {1, 2}
        seen.clear()
        for _ in draw(
            decoder, read(decoder, tokens, Sampling()), noise(0, range(1), model.config.cells), Sampling()
        ):
            assert torch.get_num_threads() == 2
    assert seen == [faster] * model.config.cells


def test_the_first_tries_only_warm_up_and_at_a_tie_the_callers_number_of_threads_stays(monkeypatch):
    model, step, rows, clock = tiny.prior(), Decoder.step, [], Clock(monkeypatch)

    def first_slow(decoder, codes, *more):
        clock.now += 1.0 if rows else 9.0
        rows.append(len(codes))
        return step(decoder, codes, *more)

    monkeypatch.setattr(Decoder, "step", first_slow)
    with using(2):
        assert Decoder(model, 3).threads == 2
    assert rows == [3] * 2 * (1 + TRIES)
