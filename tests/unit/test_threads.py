"""Pieces of a batch on threads of their own."""

import threading

import pytest
import torch

from dalle.threads import Threads


def work(weight):
    def rows(x, y, unused):
        return (x @ weight).square() + (y * weight[0]).sum(1, keepdim=True)

    return rows


@pytest.mark.parametrize("rows", [1, 2, 5, 6])
def test_pieces_come_to_the_whole_with_all_its_gradients(rows):
    weight, idle = torch.randn(3, 4, requires_grad=True), torch.randn(2, requires_grad=True)
    x, y, unused = (
        torch.randn(rows, n, requires_grad=grad) for n, grad in ((3, True), (4, False), (2, True))
    )
    expected, slope = work(weight)(x, y, unused), torch.randn(rows, 4)
    wanted = torch.autograd.grad(expected, (x, weight), slope)
    total = Threads(3).apply(work(weight), x, y, unused, parameters=[weight, idle])
    torch.testing.assert_close(total, expected)
    found = torch.autograd.grad(total, (x, weight, idle, unused), slope, allow_unused=True)
    torch.testing.assert_close(found[:2], wanted)
    assert found[2] is None
    assert found[3] is None or not found[3].any()
    with torch.no_grad():
        assert not Threads(3).apply(work(weight), x, y, unused, parameters=[weight, idle]).requires_grad


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
