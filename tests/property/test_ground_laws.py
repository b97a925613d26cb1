"""Laws of settings, schedules, the relaxation and the likelihood, for any values."""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle.config import describe, from_json, override, setting, to_json
from dalle.schedules import Plateau, cosine
from stage1_dvae.codebook import CodebookWindow
from stage1_dvae.likelihood import log_density, map_pixels, unmap_pixels
from stage1_dvae.posterior import kl_to_uniform, relax

numbers = st.floats(-1e30, 1e30)


@dataclass(frozen=True, kw_only=True)
class Section:
    whole: int = setting(0, "a whole number")
    number: float = setting(0.0, "a number")
    either: float | None = setting(None, "a number or none")
    switch: bool = setting(False, "on or off")
    choice: Literal["plateau", "cosine"] = setting("plateau", "one of two")


sections = st.builds(
    Section,
    whole=st.integers(-(10**12), 10**12),
    number=numbers,
    either=st.none() | numbers,
    switch=st.booleans(),
    choice=st.sampled_from(["plateau", "cosine"]),
)


@given(config=sections)
def test_what_show_config_prints_can_be_set(config):
    printed = [f"{name}={value}" for name, value, *_ in describe({"only": config})]
    assert override({"only": Section()}, printed)["only"] == config


@given(config=sections)
def test_a_config_survives_json(config):
    assert from_json(Section, json.loads(json.dumps(to_json(config))), "config.json") == config


@given(
    step=st.integers(0, 10**7), horizon=st.integers(0, 10**7), start=st.floats(-9, 9), end=st.floats(-9, 9)
)
def test_the_cosine_goes_from_start_to_end_and_never_turns_back(step, horizon, start, end):
    here, later = (cosine(s, horizon, start, end) for s in (step, step + 1))
    assert min(start, end) - 1e-9 <= here <= max(start, end) + 1e-9
    assert abs(later - end) <= abs(here - end) + 1e-9
    assert cosine(horizon + step, horizon, start, end) == end


@given(losses=st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), max_size=200), cut=st.integers(0, 200))
def test_a_plateau_is_a_function_of_its_state_and_halves_at_most_five_times(losses, cut):
    def observe(plateau, some):
        for loss in some:
            before = plateau.factor
            plateau.observe(loss)
            assert plateau.factor in (before, before / 2)
        return plateau

    whole = observe(Plateau(patience=7), losses)
    assert whole.factor >= 2**-5
    state = json.loads(json.dumps(dataclasses.asdict(observe(Plateau(patience=7), losses[:cut]))))
    resumed = observe(Plateau(**state), losses[cut:])
    # through JSON, for NaN is unequal to itself
    assert json.dumps(dataclasses.asdict(resumed)) == json.dumps(dataclasses.asdict(whole))


@given(logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=17), shift=st.floats(-100, 100))
def test_kl_lies_between_0_and_ln_v_and_ignores_a_shift_of_the_logits(logits, shift):
    values = torch.tensor(logits, dtype=torch.float64)
    log_qs = (torch.log_softmax(v, -1) for v in (values, values + shift))
    kl, shifted = (kl_to_uniform(log_q, log_q.exp()).item() for log_q in log_qs)
    assert -1e-9 <= kl <= math.log(len(logits)) + 1e-9
    assert kl == pytest.approx(shifted, abs=1e-6)


@settings(max_examples=50)
@given(seed=st.integers(0, 10**6), tau=st.floats(1e-3, 10), v=st.integers(2, 13), sharpness=st.floats(0, 100))
def test_relaxed_codes_lie_on_the_simplex_whatever_tau(seed, tau, v, sharpness):
    noise = torch.Generator().manual_seed(seed)
    log_q = torch.log_softmax(sharpness * torch.randn(2, 9, v, generator=noise), -1)
    relaxed = relax(log_q, tau, [noise] * 2)
    assert (relaxed >= 0).all()
    torch.testing.assert_close(relaxed.sum(-1), torch.ones(2, 9))


@given(mu=st.floats(-9, 9), ln_b=st.floats(-5, 5), pixel=st.floats(0, 1))
def test_the_likelihood_is_greatest_where_mu_is_the_pixel(mu, ln_b, pixel):
    mapped = map_pixels(torch.tensor([[[[pixel]]]], dtype=torch.float64))
    at = [
        log_density(mapped, torch.full_like(mapped, m), torch.full_like(mapped, ln_b)).item()
        for m in (mu, mapped.logit().item())
    ]
    assert at[0] <= at[1] + 1e-9
    assert unmap_pixels(mapped).item() == pytest.approx(pixel, abs=1e-12)


@settings(max_examples=50)
@given(batches=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=40), min_size=1, max_size=12))
def test_the_codebook_window_counts_the_shortest_tail_of_batches_that_fills_it(batches):
    window = CodebookWindow(5)
    for batch in batches:
        window.add(torch.tensor(batch))
    tail: list[int] = []
    for batch in reversed(batches):
        if len(tail) >= 50:
            break
        tail += batch
    assert window.total.tolist() == [tail.count(code) for code in range(5)]
    assert window.full == (len(tail) >= 50)
    measured = window.metrics()
    assert 1 - 1e-9 <= measured["codebook_perplexity"] <= 5 * measured["codebook_usage"] + 1e-9
