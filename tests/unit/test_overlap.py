"""Work that waits: steps in an order that depends on nothing but the order in which it was begun."""

from hypothesis import given
from hypothesis import strategies as st

from dalle.overlap import InTurn, blocks, finished


def work(name: str, steps: int, told: list[str]):
    for i in range(steps):
        told.append(f"{name}{i}")
        yield
    told.append(f"{name} done")
    return name


def test_each_piece_of_work_goes_a_step_further_when_another_begins():
    told: list[str] = []
    in_turn = InTurn()
    in_turn.begin(work("a", 2, told))
    in_turn.begin(work("b", 1, told))
    assert told == ["a0", "b0", "a1"]
    in_turn.begin(work("c", 0, told))
    assert told[3:] == ["c done", "a done", "b done"]
    in_turn.finish()
    assert len(told) == 6


def test_finishing_takes_all_the_steps_that_are_left():
    told: list[str] = []
    in_turn = InTurn()
    in_turn.begin(work("a", 3, told))
    in_turn.finish()
    assert told == ["a0", "a1", "a2", "a done"]
    in_turn.finish()
    assert len(told) == 4


def test_finished_gives_what_the_work_returns():
    assert finished(work("a", 3, [])) == "a"
    assert finished(work("a", 0, [])) == "a"


@given(st.lists(st.integers(0, 20)), st.integers(1, 30))
def test_blocks_hold_everything_in_its_order_and_as_much_as_fits(sizes, limit):
    found = blocks(range(len(sizes)), sizes.__getitem__, limit)
    assert [thing for block in found for thing in block] == list(range(len(sizes)))
    totals = [sum(sizes[i] for i in block) for block in found]
    for i, (block, total) in enumerate(zip(found, totals, strict=True)):
        assert total <= limit or len(block) == 1
        if i:  # or it would have been in the block before
            assert totals[i - 1] + sizes[block[0]] > limit
