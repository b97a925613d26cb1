"""Work that waits for other processes, several pieces of it at a time.

Such work is a generator that yields whenever something of its own is on the wire. Whoever runs it does
something else meanwhile, and comes back when there may be an answer.
"""

from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

T = TypeVar("T")
Work = Generator[None, None, T]  # returns a T in the end

BLOCK = 4 * 2**20  # bytes of gradients that are sent together


class InTurn:
    """Pieces of work that are under way; each goes a step further when a new one has joined them.

    The order of all steps follows from the order in which the work was begun. So processes that begin the
    same work in the same order also send in the same order, as they have to.
    """

    def __init__(self) -> None:
        self._under_way: list[Work[None]] = []

    def begin(self, work: Work[None]) -> None:
        """Let this one take its first step, then all others their next: so the wire is never idle."""
        begun = _a_step_further([work])
        self._under_way = _a_step_further(self._under_way) + begun

    def finish(self) -> None:
        """Take all the steps that are left."""
        while self._under_way:
            self._under_way = _a_step_further(self._under_way)


def _a_step_further(works: list[Work[None]]) -> list[Work[None]]:
    """Those that have not come to their end by it."""
    end = object()
    return [work for work in works if next(work, end) is not end]


def finished(work: Work[T]) -> T:
    """What the work returns, with nothing done meanwhile."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            value: T = end.value
            return value


def blocks(things: Iterable[T], size: Callable[[T], int], limit: int = BLOCK) -> list[list[T]]:
    """Things in their order, in blocks of at most so many bytes; a larger one is a block by itself."""
    found: list[list[T]] = []
    held = 0
    for thing in things:
        held += size(thing)
        if not found or held > limit:
            found.append([])
            held = size(thing)
        found[-1].append(thing)
    return found
