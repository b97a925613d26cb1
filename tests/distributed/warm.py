"""Teams of processes without the seconds in which each imports torch and DeepSpeed.

A server imports everything and forks the processes of a team. They join one another as those that `dalle`
starts; what their functions return comes back as JSON from the first one.
"""

import gc
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from dalle.launch import PARENT, STORE, die_with_parent

MODULES = ("tests.distributed.team", "tests.distributed.compressed")
TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
ENDING = 5.0  # seconds in which the others may say why they failed after the first one did


class Server:
    """One for all teams of a session."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.jobs = folder, 0
        self.process = self._begin()

    def _begin(self) -> subprocess.Popen[str]:
        own = {PARENT: str(os.getpid()), "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.warm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | own,
        )

    def __call__(
        self,
        module: str,
        functions: str,
        *arguments: Any,
        local: int,
        machines: int = 1,
        names: tuple[str, ...] = TORCH,
    ) -> Any:
        """What the functions (names joined by +) return in so many processes, by name.

        `names` are the variables that tell a process its place.
        """
        self.jobs += 1
        file = self.folder / f"{self.jobs}.json"
        store = self.folder / f"{self.jobs}.store"
        job = {
            "module": module, "functions": functions.split("+"), "arguments": list(map(str, arguments)),
            "local": local, "machines": machines, "file": str(file), "store": str(store),
            "names": names,
        }  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        try:
            answer = self.process.stdout.readline()
        except BaseException:  # a team that hangs, or a Ctrl-C: the next one needs a server that listens
            self.process.kill()
            self.process.wait()
            self.process = self._begin()
            raise
        assert answer == "0\n", f"{functions} failed; see standard error"
        return json.loads(file.read_text())

    def close(self) -> None:
        self.process.communicate()


def serve() -> None:
    """Fork the processes of each job that is read from standard input; print 0 if all went well, else 1."""
    die_with_parent()
    os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed  # noqa: F401
    import torch
    import torch._dynamo  # which the first optimizer loads

    for module in MODULES:
        importlib.import_module(module)
    torch.set_num_threads(1)
    gc.freeze()  # or every process would look through all this at its end
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed meanwhile is no answer: torch 2.9's Gloo prints from C++
    for line in sys.stdin:
        job = json.loads(line)
        members = [member(job, rank) for rank in range(job["local"] * job["machines"])]
        print(int(any_fails(members)), file=answers, flush=True)


def member(job: dict[str, Any], rank: int) -> int:
    """Fork one process; its id."""
    server = os.getpid()
    if (pid := os.fork()) > 0:
        return pid
    status = 1
    try:
        local = job["local"]
        place = map(str, (rank, local * job["machines"], rank % local, local))
        os.environ.update(zip(job["names"], place, strict=True))
        os.environ.update({STORE: job["store"], PARENT: str(server)})
        run(job)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def run(job: dict[str, Any]) -> None:
    """Join the others and call the functions."""
    from dalle.distributed import joined

    with joined() as here:
        module = sys.modules[job["module"]]
        results = {name: getattr(module, name)(*job["arguments"]) for name in job["functions"]}
        if here.main:
            Path(job["file"]).write_text(json.dumps(results))


def any_fails(members: list[int]) -> bool:
    """Wait for all; when one has failed, the others have some seconds to say why they did."""
    left, deadline = set(members), float("inf")
    while left:
        for pid in sorted(left):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                left.remove(pid)
                if status:
                    deadline = min(deadline, time.monotonic() + ENDING)
            elif time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return deadline < float("inf")


if __name__ == "__main__":
    serve()
