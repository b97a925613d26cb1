"""Pieces of a batch on threads of their own."""

import threading

import pytest
import torch

from dalle.threads import Threads, cores, using


def work(weight):
    def rows(x, y):
        square = (x @ weight).square()
        return square + (y * weight[0]).sum(1, keepdim=True), square[:, 0], y.argmax(1), square.detach()

    return rows


@pytest.mark.parametrize("rows", [1, 2, 5, 6])
@pytest.mark.parametrize("asked", [(0,), (1,), (0, 1)])
def test_pieces_come_to_the_whole_with_all_its_gradients(rows, asked):
    weight, idle = torch.randn(3, 4, requires_grad=True), torch.randn(2, requires_grad=True)
    x, y = torch.randn(rows, 3), torch.randn(rows, 4)
    expected = work(weight)(x, y)
    slopes = [torch.randn_like(expected[i]) for i in asked]
    total = Threads(3).apply(work(weight), x, y, parameters=[weight, idle])
    for ours, theirs in zip(total, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.requires_grad == theirs.requires_grad
    found, unused = torch.autograd.grad([total[i] for i in asked], [weight, idle], slopes, allow_unused=True)
    torch.testing.assert_close(found, torch.autograd.grad([expected[i] for i in asked], weight, slopes)[0])
    assert unused is None
    with torch.no_grad():
        assert not any(y.requires_grad for y in Threads(3).apply(work(weight), x, y, parameters=[weight]))


def test_a_single_result_is_no_tuple():
    weight, x = torch.randn(3, requires_grad=True), torch.randn(5, 3)
    total = Threads(2).apply(lambda rows: rows * weight, x, parameters=[weight])
    torch.testing.assert_close(total, x * weight)
    torch.testing.assert_close(torch.autograd.grad(total.sum(), weight)[0], x.sum(0))


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


def test_the_callers_cores_are_shared_out_among_the_pieces():
    with using(6):
        assert Threads(3).map(lambda _: torch.get_num_threads(), [0, 1, 2]) == [2, 2, 2]
        assert Threads(9).map(lambda _: torch.get_num_threads(), range(9)) == [1] * 9
        assert torch.get_num_threads() == 6


def test_threads_are_for_a_cpu_that_the_process_has_to_itself(monkeypatch):
    with using(3):
        assert cores(torch.device("cpu")) == 3
        assert cores(torch.device("cuda")) == 1
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        assert cores(torch.device("cpu")) == 1


def test_another_number_of_threads_lasts_no_longer_than_asked():
    before = torch.get_num_threads()
    with using(before + 2):
        assert torch.get_num_threads() == before + 2
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pieces_compute_in_the_callers_type(dtype):
    with torch.autocast("cpu", dtype):
        found = Threads(2).map(lambda rows: (rows @ rows.t()).dtype, [torch.ones(2, 2), torch.ones(3, 2)])
    assert found == [dtype, dtype]
