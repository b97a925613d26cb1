"""Pieces of a batch on threads of their own."""

import threading

import pytest
import torch

from dalle.threads import Threads


def work(weight, unused):
    def loss(x, y):
        return torch.stack([(x @ weight).square().sum(), (y * weight[0]).sum()])

    return loss


@pytest.mark.parametrize("rows", [1, 2, 5, 6])
def test_the_sum_over_pieces_is_that_of_the_whole_with_its_gradients(rows):
    weight, unused = torch.randn(3, 3, requires_grad=True), torch.randn(2, requires_grad=True)
    x, y = torch.randn(rows, 3), torch.randn(rows, 3)
    expected = work(weight, unused)(x, y)
    wanted = torch.autograd.grad(expected @ torch.tensor([0.5, 2.0]), weight)
    threads = Threads(3)
    total = threads.summed(work(weight, unused), threads.split(x, y), [weight, unused])
    torch.testing.assert_close(total, expected)
    found = torch.autograd.grad(total @ torch.tensor([0.5, 2.0]), [weight, unused], allow_unused=True)
    torch.testing.assert_close(found[0], wanted[0])
    assert found[1] is None


def test_every_piece_has_a_thread_of_one_core_and_the_callers_modes():
    threads, before = Threads(2), torch.get_num_threads()
    meet = threading.Barrier(2, timeout=30)

    def look(_):
        meet.wait()
        return (
            torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"), threading.get_ident(),
        )  # fmt: skip

    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        (*first, one), (*second, other) = threads.map(look, [0, 1])
    assert first == second == [1, False, True, True]
    assert one != other
    assert torch.get_num_threads() == before
    with torch.no_grad():
        assert threads.map(look, [0, 1])[0][:4] == (1, False, False, False)


def test_one_thread_is_the_callers():
    assert Threads(1).map(lambda _: threading.get_ident(), [0, 1]) == [threading.get_ident()] * 2


def test_what_fails_in_a_piece_fails_in_the_caller():
    def fail(piece):
        raise ValueError(piece)

    with pytest.raises(ValueError, match="3"):
        Threads(2).map(fail, [3, 4])
