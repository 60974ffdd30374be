"""A job of a sweep inside SLURM: what each of its tasks does, one task for each rank."""

import os
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from moe_pretrain.sweep.job_record import SweepJob
from moe_pretrain.sweep.running_job import PROGRAM, passed_on, run_job
from moe_pretrain.system.child_process import die_with_parent
from moe_pretrain.system.exit_codes import STOPPED

_FIRST_PORT, _NUM_PORTS = 10_000, 20_000
"""Below the ports that the kernel gives to connections."""


class SlurmTask:
    """Task that submitit pickles and calls in every task of a job.

    The first rank keeps the job's record. If a signal ended the run, its exit code is ``signals.STOPPED`` and submitit
    hears of no result; the batch script then queues the job again, and the same call goes on.
    """

    def __init__(self, job: SweepJob, program: Iterable[str] = PROGRAM):
        self._job, self._program = job, tuple(program)

    def __call__(self) -> None:
        """Run this task's rank as a process of its own, pass signals on, and wait for it."""
        variables = rank_variables()
        if variables.get("RANK", "0") != "0":
            return _follow([*self._program, *self._job.words], variables)
        state = run_job(self._job, variables, self._program)
        print(f"{self._job.name}: {state.state} {state.reason}", flush=True)
        if state.state == "stopped":
            os._exit(STOPPED)

    def checkpoint(self) -> Any:
        """Task that submitit queues again after a signal that came before ours are heeded."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class _Follower:
    """The process of a rank that is not the first."""

    def __init__(self, words: list[str], variables: dict[str, str]):
        self._process = subprocess.Popen(words, env={**os.environ, **variables}, preexec_fn=die_with_parent)

    def signal(self, number: int) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)

    def wait(self) -> None:
        self._process.wait()


def _follow(words: list[str], variables: dict[str, str]) -> None:
    followers: list[_Follower] = []
    with passed_on(lambda: followers):
        followers.append(_Follower(words, variables))
        followers[0].wait()


def rank_variables() -> dict[str, str]:
    """Torchrun's variables from SLURM's, and the threads of a rank; no ranks where there is only one."""
    variables = {}
    if "OMP_NUM_THREADS" not in os.environ and "SLURM_CPUS_PER_TASK" in os.environ:
        variables["OMP_NUM_THREADS"] = os.environ["SLURM_CPUS_PER_TASK"]
    if int(os.environ["SLURM_NTASKS"]) == 1:
        return variables
    return variables | {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": os.environ["SLURM_NTASKS"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "MASTER_ADDR": _first_address(os.environ["SLURM_JOB_NODELIST"]),
        "MASTER_PORT": str(_FIRST_PORT + int(os.environ["SLURM_JOB_ID"]) % _NUM_PORTS),
    }


def _first_address(nodes: str) -> str:
    """Address of the node of rank 0, as SLURM knows it: its name need not be one that resolves."""
    first = _scontrol("show", "hostnames", nodes).split()[0]
    facts = _scontrol("--oneliner", "show", "node", first).split()
    return next((fact.partition("=")[2] for fact in facts if fact.startswith("NodeAddr=")), first)


def _scontrol(*words: str) -> str:
    done = subprocess.run(["scontrol", *words], check=True, encoding="utf-8", stdout=subprocess.PIPE, stderr=sys.stderr)
    return done.stdout
