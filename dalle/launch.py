"""Several training processes on this machine from one command: started, watched and ended together."""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from dalle.console import say
from dalle.errors import ConfigError

LOST = 75  # exit status of a process that ended because another one of its run did
GRACE = 3.0  # seconds in which the others may still say why they ended
STOPPING = 60.0  # and in which all may end together after a signal
POLL = 0.05

# -P: a folder called cli or dalle in the working directory is not ours.
DALLE = (sys.executable, "-P", "-c", "from cli.main import main; main()")
STORE, PARENT = "DALLE_STORE", "DALLE_PARENT"  # what `launch` tells its processes


def launched(environ: Mapping[str, str] = os.environ) -> bool:
    """Is this process one of several, started by `launch`, torchrun, deepspeed or Slurm?"""
    # A shell that Slurm opened for one task (`srun --pty bash`) is no such process.
    return "WORLD_SIZE" in environ or int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def stopping() -> list[signal.Signals]:
    """The signals that ask for a stop; a terminal that closes is none under `nohup`."""
    closed = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *closed]


def launch(
    processes: int, arguments: Sequence[str], program: Sequence[str] = DALLE, machines: int = 1
) -> int:
    """Run a program, `dalle` itself, with these arguments as so many processes; the exit status of the whole.

    With `machines` above 1 there are so many times more of them, as if each machine ran `processes`.

    Process 0 has the terminal. The others are heard only where one of them ends the run. A Ctrl-C or a
    SIGTERM is handed to process 0, which agrees with the others on when to stop; a second one ends all at
    once. None of them outlives this process.
    """
    if not sys.platform.startswith("linux"):
        raise ConfigError(f"--processes {processes}: several processes need Linux; leave it out, or give 1")
    with tempfile.TemporaryDirectory(prefix="dalle-") as folder:
        team = _Team(processes, [*program, *arguments], Path(folder), machines)
        before = {s: signal.signal(s, team.forward) for s in stopping()}
        try:
            return team.watch()
        finally:
            team.kill()
            for number, handler in before.items():
                signal.signal(number, handler)


class _Team:
    def __init__(self, local: int, command: list[str], folder: Path, machines: int) -> None:
        processes = local * machines
        self.said = [folder / f"process-{rank}" for rank in range(processes)]
        self.signals = 0
        threads = str(max(1, len(os.sched_getaffinity(0)) // processes))
        shared = {
            "OMP_NUM_THREADS": threads,
            "GLOO_SOCKET_IFNAME": "lo",  # the name of a laptop need not lead to an address
            **os.environ,
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(local),
            STORE: str(folder / "store"),
            PARENT: str(os.getpid()),
        }
        gpus = _gpus_of(machines, local)
        self.members = []
        for rank, said in enumerate(self.said):
            with said.open("wb") as file:
                self.members.append(
                    subprocess.Popen(
                        command,
                        env={
                            **shared,
                            **gpus[rank // local],
                            "RANK": str(rank),
                            "LOCAL_RANK": str(rank % local),
                        },
                        stdin=subprocess.DEVNULL,
                        stdout=None if rank == 0 else file,
                        stderr=None if rank == 0 else file,
                        start_new_session=True,  # a Ctrl-C reaches them through this process alone
                    )
                )

    def forward(self, number: int, _: FrameType | None) -> None:
        self.signals += 1
        if self.signals > 1:
            self.kill()
        elif self.members and self.members[0].poll() is None:
            self.members[0].send_signal(number)

    def kill(self) -> None:
        for member in self.members:
            if member.poll() is None:
                member.kill()
        for member in self.members:
            member.wait()

    def watch(self) -> int:
        """Wait for all of them; when one fails, end the others and tell its reason."""
        deadline = float("inf")
        while None in (statuses := [member.poll() for member in self.members]):
            failed = [status for status in statuses if status]
            if failed and deadline == float("inf"):
                deadline = time.monotonic() + GRACE
            if time.monotonic() > deadline or any(status != LOST for status in failed):
                break
            time.sleep(POLL)
        if not any(statuses):
            return 0
        self._let_finish()
        ended = {rank: status for rank, m in enumerate(self.members) if (status := m.poll())}
        self.kill()
        if self.signals > 1:
            return 1
        # Whoever only lost contact is not the reason; process 0 has told its own.
        culprits = [rank for rank, status in ended.items() if status != LOST] or list(ended)
        rank = culprits[0]
        if rank > 0:
            say(self._reason(rank, ended[rank]))
        elif ended[rank] < 0:
            say(self._killed(rank, -ended[rank]))
        return ended[rank] if ended[rank] in (1, 2) else 1

    def _let_finish(self) -> None:
        """An error that all make, such as a wrong setting, is told once: by process 0. So is a stop."""
        end = time.monotonic() + (STOPPING if self.signals else GRACE / 2)
        while self.members[0].poll() is None and time.monotonic() < end:
            time.sleep(POLL)

    def _reason(self, rank: int, status: int) -> str:
        if status < 0:
            return self._killed(rank, -status)
        text = self.said[rank].read_text(errors="replace").strip()
        text = text or f"ended with status {status} and said nothing"
        shown = text.splitlines()[-1] if status == 2 else text[-4000:]
        return f"error: process {rank} of {len(self.members)}: {shown.removeprefix('error: ')}"

    def _killed(self, rank: int, number: int) -> str:
        hint = "a machine out of memory does that; " if number == signal.SIGKILL else ""
        return (
            f"error: process {rank} of {len(self.members)} was killed ({signal.Signals(number).name}), which "
            f"ends the run; {hint}the same command goes on from the last save"
        )


def _gpus_of(machines: int, local: int) -> list[dict[str, str]]:
    """The environment in which each pretended machine sees GPUs of its own, where there are any.

    Raises:
        ConfigError: there are some, but fewer than processes.
    """
    if machines == 1:
        return [{}]
    import torch  # one machine, the usual case, starts its processes without waiting for it

    if not (count := torch.cuda.device_count()):
        return [{}] * machines
    if count < machines * local:
        raise ConfigError(f"--machines {machines} of {local} processes need as many GPUs; there are {count}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    names = visible.split(",")
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(names[at : at + local])} for at in range(0, machines * local, local)
    ]


def die_with_parent() -> None:
    """End this process when the one that launched it ends, however that happens. Linux only."""
    parent = os.environ.get(PARENT)
    if parent is None:
        return
    set_parent_death_signal = 1  # number of prctl(2)
    ctypes.CDLL("libc.so.6").prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != int(parent):  # it ended before
        os._exit(LOST)
