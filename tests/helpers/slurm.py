"""A real SLURM on this machine, made by ``scripts/slurm/local_cluster.sh``, as seen by a user who submits to it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sized
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "slurm" / "local_cluster.sh"
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin"])
T = TypeVar("T")


def missing() -> str | None:
    """Why no cluster can be started here; None if one can."""
    if os.geteuid():
        return "a SLURM of our own must be started by root"
    programs = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=PATH)]
    return f"apt-get install slurm-wlm munge: no {', '.join(programs)}" if programs else None


def control(command: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Call the script."""
    return subprocess.run(
        ["bash", str(SCRIPT), command, str(folder), *words], text=True, capture_output=True, timeout=120
    )


def wait_until(is_so: Callable[[], T], seconds: float, what: Callable[[], str]) -> T:
    """What ``is_so`` returns once that is true; ``what`` describes the state at the timeout."""
    deadline = time.monotonic() + seconds
    while not (found := is_so()):
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)
    return found


class Cluster:
    """A cluster that runs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {
            **os.environ,
            "PATH": PATH,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }

    def call(self, home: Path, *words: str) -> str:
        """Run a command of SLURM in ``home``; what it prints."""
        done = subprocess.run(words, cwd=home, env=self.environment, text=True, capture_output=True, timeout=60)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout.strip()

    def submit(self, home: Path, *words: str) -> str:
        """Submit with ``sbatch WORDS``; the job's number."""
        return self.call(home, "sbatch", "--parsable", *words)

    def job(self, number: str) -> dict[str, str]:
        """What SLURM says of a job, by field."""
        text = self.call(self.folder, "scontrol", "--oneliner", "show", "job", number)
        return dict(re.findall(r"(\w+)=(\S+)", text))

    def is_in(self, number: str, state: str, **fields: str) -> bool:
        """Whether a job is in ``state`` and ``fields`` have their values."""
        return {"JobState": state, **fields}.items() <= self.job(number).items()

    def wait(self, number: str, state: str, wake: bool = False, **fields: str) -> None:
        """Wait until ``is_in``; if asked to, wake what SIGSTOP stops meanwhile."""

        def look() -> bool:
            if wake:
                self.wake(number)
            return self.is_in(number, state, **fields)

        wait_until(look, 120, lambda: self._describe(number))

    def wait_until_stopped(self, number: str, ranks: int) -> None:
        """Wait until that many ranks of a job are stopped."""
        wait_until(lambda: len(self.stopped(number)) == ranks, 120, lambda: self._describe(number))

    def tell(self, number: str, words: list[str], rows: Callable[[], Sized], is_over: Callable[[], bool]) -> str:
        """Call ``words``, by which SLURM signals the stopped ranks of a job, and wait for ``is_over``.

        SLURM sends SIGCONT a moment before the signal, and the ranks may come to the next stop in between.

        Args:
            number: The job.
            words: A command.
            rows: The rows of its run, which say whether it has been woken.
            is_over: What is waited for.

        Returns:
            What the command prints.
        """
        before = len(rows())
        said = self.call(self.folder, *words)

        def look() -> bool:
            if len(rows()) > before:
                self.wake(number)
            return is_over()

        wait_until(look, 120, lambda: self._describe(number))
        return said

    def _describe(self, number: str) -> str:
        return f"{self.job(number)}\n{self.log(number)}"

    def log(self, number: str) -> str:
        """What a job has printed so far."""
        path = Path(self.job(number)["StdOut"])
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def start_now(self, number: str) -> None:
        """Have a job that was queued again start at once; SLURM would make it wait for two minutes."""

        def has_started() -> bool:
            # Again and again: the wait begins when the last of it has ended. Refused once it runs.
            words = ["scontrol", "update", f"jobid={number}", "StartTime=now"]
            subprocess.run(words, env=self.environment, capture_output=True, timeout=60)
            return self.job(number)["JobState"] == "RUNNING"

        # What starts in the second of the last attempt's end is refused: "Job credential revoked".
        time.sleep(2)
        wait_until(has_started, 60, lambda: str(self.job(number)))

    def stopped(self, number: str) -> list[int]:
        """Ids of those processes of a job that SIGSTOP has stopped."""
        return [process for process in self.processes(number) if _is_stopped(process)]

    def wake(self, number: str) -> None:
        """Wake the stopped processes of a job."""
        for process in self.stopped(number):
            os.kill(process, signal.SIGCONT)

    def processes(self, number: str) -> list[int]:
        """Ids of the processes of a job."""
        found, mark = [], f"SLURM_JOB_ID={self.job(number)['JobId']}".encode()
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (place / "environ").read_bytes().split(b"\0"):
                    found.append(int(place.name))
            except OSError:
                continue  # it has ended
        return found


def stop_in(*steps: int) -> list[str]:
    """Overrides that stop every rank in each of the steps, which follow each other, until a signal comes."""
    fault = {"point": "train.update", "action": "stop", "rank": -1, "step": steps[0], "num_steps": len(steps)}
    return [f"fault.{name}={value}" for name, value in fault.items()]


def _is_stopped(process: int) -> bool:
    try:
        return "\nState:\tT" in Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return False  # it has ended
