"""What holds for every layout."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stage2_prior.masks import allowed, dense, visible
from tests.oracles import keys_seen

texts = st.integers(0, 7)
grids = st.integers(1, 6)
kernels = st.sampled_from([1, 3, 5, 11, 13])
every_kind = pytest.mark.parametrize("kind", ["row", "column", "conv"])


@every_kind
@given(text=texts, grid=grids, kernel=kernels)
def test_the_mask_is_the_walk_over_the_picture(kind, text, grid, kernel):
    mask = dense(kind, text, grid, kernel)
    assert mask.shape == (text + grid**2, text + grid**2)
    for q, row in enumerate(mask):
        assert set(row.nonzero()[:, 0].tolist()) == keys_seen(kind, q, text, grid, kernel)


@every_kind
@given(text=texts, grid=grids, kernel=kernels)
def test_no_slot_sees_a_later_one_and_each_sees_itself(kind, text, grid, kernel):
    mask = dense(kind, text, grid, kernel)
    assert not mask.triu(1).any()
    assert mask.diagonal().all()


@every_kind
@given(text=texts, grid=grids, kernel=kernels)
def test_text_sees_all_text_before_it_and_pictures_see_all_of_it(kind, text, grid, kernel):
    mask = dense(kind, text, grid, kernel)
    assert torch.equal(mask[:text, :text], torch.ones(text, text).tril().bool())
    assert not mask[:text, text:].any()
    assert mask[text:, :text].all()


@given(text=texts, grid=grids)
def test_a_row_and_a_column_layer_together_reach_every_earlier_slot(text, grid):
    reached = (dense("column", text, grid).int() @ dense("row", text, grid).int()) > 0
    assert torch.equal(reached, torch.ones_like(reached).tril())


@every_kind
@given(text=texts, grid=grids, kernel=kernels)
def test_the_cells_visible_while_drawing_are_the_masks_rows(kind, text, grid, kernel):
    picture = dense(kind, text, grid, kernel)[text:, text:]
    seen = visible(kind, grid, kernel)
    assert len(seen) == grid**2
    for slot, keys in enumerate(seen):
        assert keys.tolist() == picture[slot].nonzero()[:, 0].tolist()
        assert keys[-1] == slot


@every_kind
@given(text=texts, grid=grids, kernel=kernels, data=st.data())
def test_single_pairs_agree_with_the_matrix(kind, text, grid, kernel, data):
    slots = st.integers(0, text + grid**2 - 1)
    q, k = data.draw(slots), data.draw(slots)
    one = allowed(kind, text, grid, torch.tensor(q), torch.tensor(k), kernel)
    assert one == dense(kind, text, grid, kernel)[q, k]
