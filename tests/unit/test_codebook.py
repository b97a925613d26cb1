"""Usage and perplexity of the codes chosen lately."""

import math

import pytest
import torch

from stage1_dvae.codebook import CodebookWindow


def window(vocab: int, *batches) -> CodebookWindow:
    made = CodebookWindow(vocab)
    for batch in batches:
        made.add(torch.as_tensor(batch))
    return made


def test_usage_and_perplexity_by_hand():
    measured = window(5, [[0, 0], [0, 0]], [[3, 3], [4, 4]]).metrics()
    assert measured["codebook_usage"] == 3 / 5
    # frequencies ½, ¼, ¼: entropy 1.5 bits
    assert measured["codebook_perplexity"] == pytest.approx(2**1.5)


def test_one_code_has_perplexity_1_and_all_alike_have_k():
    assert window(7, [2] * 9).metrics() == {"codebook_usage": 1 / 7, "codebook_perplexity": 1.0}
    measured = window(7, list(range(7)) * 3).metrics()
    assert measured["codebook_usage"] == 1.0
    assert measured["codebook_perplexity"] == pytest.approx(7)


def test_perplexity_is_the_exponential_of_the_entropy():
    measured = window(3, [0] * 7 + [1] * 2 + [2]).metrics()
    entropy = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1))
    assert measured["codebook_perplexity"] == pytest.approx(math.exp(entropy))


def test_an_empty_window_measures_nothing():
    assert window(7).metrics() == {"codebook_usage": 0.0, "codebook_perplexity": 0.0}
    assert not window(7).full


def test_it_is_full_at_ten_codes_per_entry_and_not_before():
    assert not window(3, [0] * 29).full
    assert window(3, [0] * 29, [1]).full


def test_it_forgets_what_came_before_the_last_ten_per_entry():
    seen = window(3, [0] * 10)
    for _ in range(2):
        seen.add(torch.ones(10, dtype=torch.int64))
    assert seen.metrics()["codebook_usage"] == 2 / 3  # 30 codes: all are still needed
    seen.add(torch.ones(9, dtype=torch.int64))
    assert seen.metrics()["codebook_usage"] == 2 / 3  # without the first, 29 would be left
    seen.add(torch.ones(1, dtype=torch.int64))
    assert seen.metrics()["codebook_usage"] == 1 / 3
    assert seen.full


def test_a_batch_larger_than_the_window_replaces_all():
    seen = window(3, [0] * 500, [1] * 30)
    assert seen.metrics() == {"codebook_usage": 1 / 3, "codebook_perplexity": 1.0}
    assert len(seen.batches) == 1
