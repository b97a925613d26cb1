"""What a person sees while a command runs: lines and a progress bar, on standard error."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text


class Patient(Console):
    """Falls silent once nobody listens any more or the disk is full, where rich would end the command."""

    def print(self, *objects: Any, **how: Any) -> None:
        """See `Console.print`."""
        with self._patience():
            super().print(*objects, **how)

    def __exit__(self, *error: Any) -> None:
        with self._patience():
            super().__exit__(*error)

    @contextmanager
    def _patience(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Let go of the pipe, too: what it did not take would be an error at the command's end."""
        self.quiet = True
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self.file.fileno())


console = Patient(stderr=True, highlight=False)


def say(text: str) -> None:
    """One line for the user. Never wrapped or coloured, so that it can be searched for in a log."""
    console.print(Text(text), soft_wrap=True)


def warn(text: str) -> None:
    """One line that the user should act on."""
    console.print(Text(f"warning: {text}", style="yellow"), soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds in the words one would use: `40 s`, `12 min`, `3 h 05 min`, `2 d 4 h`."""
    if seconds < 99:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"


class Stopwatch:
    """Seconds since it was made, pauses left out."""

    def __init__(self) -> None:
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds counted so far."""
        return time.monotonic() - self.began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what happens inside."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.began += time.monotonic() - began


class Bar:
    """A progress bar with rate and time left; where no terminal listens, a plain line now and then.

    Args:
        label: what is under way.
        total: how many there will be.
        start: how many were done before.
        clock: the time that the rate is taken over.
        unit: what is counted, in the plural.
        every: seconds between lines where no terminal listens.
    """

    def __init__(
        self,
        label: str,
        total: int,
        start: int = 0,
        clock: Stopwatch | None = None,
        unit: str = "steps",
        every: float = 15.0,
    ) -> None:
        self.label, self.total, self.start, self.unit, self.every = label, total, start, unit, every
        self.clock = clock or Stopwatch()
        self.done = start
        self.last_line = 0.0
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[words]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task(label, total=total, completed=start, words="")

    def __enter__(self) -> "Bar":
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        self.progress.stop()

    def expect(self, total: int) -> None:
        """Change the expected total."""
        self.total = total
        self.progress.update(self.task, total=total)

    def rate(self, done: int) -> float:
        """Units a second."""
        return (done - self.start) / max(1e-9, self.clock.seconds)

    def left(self, done: int) -> float:
        """Seconds that the rest will take at this rate."""
        return (self.total - done) / max(1e-9, self.rate(done))

    def advance(self, more: int) -> None:
        """Show that `more` of them are done than before."""
        self.done += more
        self.show(self.done)

    def show(self, done: int, values: Mapping[str, str] | None = None) -> None:
        """Show that `done` of them are done, with a few values beside the bar."""
        self.done = done
        rate = self.rate(done)
        shown = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
        words = [f"{shown} {self.unit}/s", f"{duration(self.left(done))} left"]
        words += [f"{name} {value}" for name, value in (values or {}).items()]
        self.progress.update(self.task, completed=done, words=" · ".join(words))
        if not console.is_terminal and (
            self.clock.seconds >= self.last_line + self.every or done == self.total
        ):
            self.last_line = self.clock.seconds
            say(f"{self.label} {done:,}/{self.total:,} · " + " · ".join(words))
