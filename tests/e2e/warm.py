"""The commands in processes of their own, without the seconds that importing torch takes.

A server imports everything and forks a process for every command: a real one, which can be killed, with its
own signals, streams and exit status. The first commands of the road go through the installed script instead.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SERVER = """
import gc, json, os, sys
import contextlib
with contextlib.suppress(ImportError):
    import pydantic  # which typer loads late where it is installed
import torch._dynamo  # which the first optimizer loads
import cli.main, dalle.pipeline, dalle.drawings, dalle.info, dalle.scenes.source, dalle.data.open
import stage1_dvae.train, stage1_dvae.released, stage2_prior.train

gc.freeze()  # or every process would spend a second on looking through all this at its end
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.chdir(job["cwd"])
        for number, name, flags in (
            (0, job["stdin"], os.O_RDONLY),
            (1, job["stdout"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
            (2, job["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        ):
            os.dup2(os.open(name, flags, 0o600), number)
        os.environ.update(job["environ"])
        sys.argv = ["dalle", *job["arguments"]]
        cli.main.main()
        sys.exit(0)
    print(job["number"], pid, flush=True)
    print(job["number"], os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass
class Done:
    """How a command ended; `code` is negative for a signal."""

    code: int
    out: str
    err: str

    @property
    def paths(self) -> list[Path]:
        return [Path(line) for line in self.out.splitlines()]


def complaint(done: Done) -> str:
    """The one line of a mistake."""
    assert done.code == 2, done.err
    assert "Traceback" not in done.err
    complaints = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(complaints) == 1, done.err
    assert done.err.splitlines()[-1] == complaints[0]
    assert done.out == ""
    return complaints[0].removeprefix("error: ")


class Command:
    """A command under way."""

    def __init__(self, server: "Server", number: int, folder: Path) -> None:
        self.server, self.number, self.folder = server, number, folder
        self.pid = server.read(number)
        assert self.pid > 1  # 0 and below are groups of processes, our own among them

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it may have come to its end by itself
            os.kill(self.pid, number)

    @property
    def err(self) -> str:
        path = self.folder / "stderr"
        return path.read_text() if path.exists() else ""

    def wait_for(self, words: str, seconds: float = 60.0) -> None:
        """Wait until it has said these words on standard error."""
        end = time.monotonic() + seconds
        while words not in self.err:
            assert time.monotonic() < end, f"never said {words!r}: {self.err}"
            time.sleep(0.005)

    def done(self) -> Done:
        code = self.server.read(self.number)
        self.server.under_way = None
        return Done(code, (self.folder / "stdout").read_text(), self.err)


class Server:
    """One for all tests of a process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.jobs = folder, 0
        self.under_way: Command | None = None
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the server of the commands has ended; see standard error"
        return line.strip()

    def read(self, job: int) -> int:
        """The next number that it tells of this job: its process' id, then its exit code."""
        while True:
            number, value = self._line().split()
            if int(number) == job:
                return int(value)

    def end(self) -> None:
        """End what a test that failed has left running, which the next command would wait for."""
        if self.under_way is not None:
            self.under_way.signal(signal.SIGKILL)
            self.under_way.done()

    def start(
        self,
        *arguments: Any,
        cwd: Path | None = None,
        stdin: str | bytes = "",
        environ: dict[str, str] | None = None,
    ) -> Command:
        self.end()
        self.jobs += 1
        folder = self.folder / str(self.jobs)
        folder.mkdir()
        (folder / "stdin").write_bytes(stdin.encode() if isinstance(stdin, str) else stdin)
        job = {
            "number": self.jobs,
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd or folder),
            "environ": environ or {},
            **{name: str(folder / name) for name in ("stdin", "stdout", "stderr")},
        }
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        self.under_way = Command(self, self.jobs, folder)
        return self.under_way

    def __call__(self, *arguments: Any, **more: Any) -> Done:
        return self.start(*arguments, **more).done()

    def close(self) -> None:
        self.end()
        self.process.communicate()
