"""How a command ends: with one line and exit status 2 where its user can do something about it."""

import errno
import gc
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from dalle.errors import DalleError


@contextmanager
def ending() -> Iterator[None]:
    """Around a command. Without a traceback: mistakes of the caller, a full disk or memory, Ctrl-C."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        _end(1)
    except Exception as error:
        if (mistake := _mistake(error)) is not None:
            typer.echo(f"error: {' '.join(line.strip() for line in mistake.splitlines())}", err=True)
            _end(2)
        _end_of_one_among_several(error)
        raise
    finally:
        gc.freeze()  # or the interpreter looks through all of torch once more at its end: 0.4 s


def _mistake(error: Exception) -> str | None:
    """What is told of an error in place of its traceback; None for a bug, which needs it.

    torch tells some by their words alone, and its types would take a second to import.
    """
    said = str(error)
    if isinstance(error, DalleError):
        return said
    if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in said:
        return (
            "the device's memory is too small: train with a smaller --set micro_batch=… or with --set "
            "recompute=true, draw with a smaller --at-once"
        )
    if said.startswith("DataLoader worker"):
        return (
            f"{said.partition('.')[0]}: a process that reads pictures ended, perhaps for want of memory; "
            "give a container more shared memory (docker run --shm-size=8g), or use --set workers=0"
        )
    if isinstance(error, OSError):
        reason = (error.strerror or said).lower()
        if error.filename:
            return f"{error.filename}: {reason}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            # What could not be written is still in the buffer, and Python would try once more at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return f"the output could not be written: {reason}"
    return None


def _end_of_one_among_several(error: Exception) -> None:
    """Where another process ended, this one cannot go on: it says so, and leaves the reason to that one."""
    from dalle.launch import LOST, launched

    if launched():
        if any(word in str(error) for word in ("gloo", "NCCL", "Connection closed", "Connection reset")):
            typer.echo("this process lost the others of its run, and ends", err=True)
            _end(LOST)
        traceback.print_exc()
        _end(1)


def _end(status: int) -> None:
    """Leave; one among several without waiting for the others, which notice."""
    from dalle.launch import launched

    if launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
