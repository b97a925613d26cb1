"""What holds for drawing, whatever is drawn."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stage2_prior.sample import Sampling, choose_codes, noise
from tests import oracles, tiny

shapes = st.fixed_dictionaries(
    {
        "depth": st.integers(1, 6),
        "grid": st.integers(1, 4),
        "text_length": st.integers(2, 6),
        "kernel": st.sampled_from([1, 3, 11]),
    }
)
# Apart enough that sums in another order cannot move an edge across a number.
rows = st.lists(st.integers(-40, 40).map(lambda x: x / 8), min_size=1, max_size=9)
uniforms = st.integers(0, 999).map(lambda i: (i + 0.5) / 1000)
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    top_k=st.none() | st.integers(1, 10),
)


@settings(max_examples=15)
@given(shape=shapes, prompts=st.integers(1, 3), pictures=st.integers(1, 3), seed=st.integers(0, 99))
def test_cached_logits_equal_uncached_ones(shape, prompts, pictures, seed):
    model = tiny.prior(seed, **shape)
    tokens, _ = tiny.batch(model, prompts, seed)
    _, codes = tiny.batch(model, prompts * pictures, seed)
    with torch.no_grad():
        _, image = model(tokens.repeat_interleave(pictures, 0), codes)
        whole = model.image_logits(image)
    scale = whole.abs().max()
    cached = tiny.cached_logits(model, tokens, codes)
    torch.testing.assert_close(cached / scale, whole / scale, rtol=1e-5, atol=1e-5)


@settings(max_examples=15)
@given(shape=shapes, n=st.integers(1, 5), beside=st.integers(0, 4), seed=st.integers(0, 99))
def test_a_picture_does_not_depend_on_what_is_drawn_beside_it(shape, n, beside, seed):
    model = tiny.prior(seed, **shape)
    tokens, _ = tiny.batch(model, 1, seed)
    cells = model.config.cells
    few, more = (tiny.drawn(model, tokens, noise(seed, range(m), cells)) for m in (n, n + beside))
    assert torch.equal(few, more[:n])


@given(logits=rows, u=uniforms, how=samplings)
def test_the_choice_is_the_inverse_of_the_distribution_function(logits, u, how):
    if how.top_k is not None and len(set(logits)) < len(logits):
        logits = [x + i / 64 for i, x in enumerate(logits)]  # which of two equal ones is cut is left open
        if len(set(logits)) < len(logits):
            return
    code = choose_codes(torch.tensor([logits]), torch.tensor([u]), how).item()
    wanted = {
        oracles.pick(np.array(logits), near, temperature=how.temperature, top_k=how.top_k)
        for near in (u - 1e-6, u, u + 1e-6)
    }
    assert code in wanted


@given(logits=rows, lower=uniforms, upper=uniforms, how=samplings)
def test_a_larger_number_never_draws_an_earlier_code(logits, lower, upper, how):
    lower, upper = sorted((lower, upper))
    row = torch.tensor([logits, logits])
    first, second = choose_codes(row, torch.tensor([lower, upper]), how).tolist()
    assert first <= second
