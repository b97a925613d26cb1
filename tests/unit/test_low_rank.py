"""What is compressed of a share, and the state of it."""

import torch

from dalle.low_rank import compressed
from dalle.powersgd import PowerSGD
from stage2_prior.config import PriorConfig
from stage2_prior.model import Prior
from tests.tiny import PRIOR_SHAPE

D, RANK = 3968, 896  # the paper's width and total rank


def shares(rows: int, columns: int, stacked: int = 1, m: int = 8) -> list[list[tuple[int, int, int]]]:
    """Rows, columns and rank of all that each of m equal shares compresses."""
    numel = rows * columns // m
    cut = [compressed("w", (rows, columns), i * numel, numel, RANK, stacked) for i in range(m)]
    return [[(matrix.rows, matrix.columns, matrix.rank) for matrix in share] for share in cut]


def test_a_share_of_a_matrix_has_the_papers_part_of_the_rank():
    assert shares(D, D) == [[(496, D, 112)]] * 8
    assert shares(4 * D, D) == [[(1984, D, 112)]] * 8


def test_q_k_and_v_have_a_rank_each_wherever_shares_are_cut():
    inside, across = [(1488, D, 336)], ([(992, D, 224), (496, D, 112)], [(496, D, 112), (992, D, 224)])
    assert shares(3 * D, D, 3) == [inside, inside, across[0], inside, inside, across[1], inside, inside]
    assert shares(3 * D, D, 3, m=1) == [[(D, D, RANK)] * 3]


def test_the_prior_says_which_of_its_parameters_are_three_matrices():
    matrices = Prior(PriorConfig(**PRIOR_SHAPE)).matrices()
    assert {n.split(".", 2)[2]: count for n, count in matrices.items()} == {
        "attention.qkv.weight": 3, "attention.out.weight": 1, "mlp.up.weight": 1, "mlp.down.weight": 1,
    }  # fmt: skip


def test_the_sums_of_a_parameter_are_one_run_even_where_a_matrix_in_it_is_averaged_in_full():
    """So they are what a run saved whose matrices were cut in another way, and load from it."""
    shape, offset, numel = (36, 12), 8 * 12, 20 * 12
    powersgd = PowerSGD(None, matrices={"w": 3}, rank=6, factors="fp32")
    saved = torch.arange(36.0 * 12).view(shape)
    powersgd.load("w", shape, offset, numel, saved, machines=2)
    assert [(m.rows, m.rank) for m in powersgd._errors] == [(4, 2), (4, 2)]  # the one between saves nothing
    begin, sums = powersgd.sums()["w"]
    assert begin == offset
    expected = saved.flatten()[offset:][:numel].clone() / 2
    expected[4 * 12 : 16 * 12] = 0
    assert torch.equal(sums, expected)
