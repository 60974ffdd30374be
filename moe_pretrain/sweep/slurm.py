"""Hydra's launcher for SLURM: one job of SLURM for each job of a sweep, one task for each rank.

submitit writes the batch scripts. What it does with signals and results is not used: a job is told to end as any run
is, its batch script queues it again, and what became of it stands in the sweep's folder. So whoever drives the sweep
may be killed; the same command finds the jobs that SLURM still has, and waits for them.
"""

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from moe_pretrain.config.schema import ConfigError
from moe_pretrain.run_folder.paths import SLURM_FILE
from moe_pretrain.sweep.job_record import SweepJob, correct
from moe_pretrain.sweep.launcher import SweepLauncher, SweepStopped, must_run
from moe_pretrain.sweep.running_job import passed_on
from moe_pretrain.sweep.slurm_task import SlurmTask
from moe_pretrain.system.files import read_json, write_json

_QUEUE_SECONDS = 5.0
_POLL_SECONDS = 0.2
_SRUN = ["--export=ALL", "--distribution=block", "--kill-on-bad-exit=0", "--wait=300"]
"""As in ``scripts/slurm/train.sbatch``, where the reasons stand."""
_QUEUE_AGAIN = [
    "code=$?",
    # Saved and stopped; or killed by USR1 or TERM before there was anything to save.
    'case $code in 75 | 138 | 143) scontrol requeue "$SLURM_JOB_ID" ;; esac',
    "exit $code",
]
_COMMON_NAMES = {
    *("name", "nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "timeout_min", "mem_gb", "stderr_to_stdout"),
}
"""Names of submitit's for every kind of cluster; all others get SLURM's prefix."""


class SlurmLauncher(SweepLauncher):
    """Has SLURM run the jobs of a batch, and waits for them."""

    def __init__(self, **settings: Any):
        self._settings: dict[str, Any] = {
            name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for name, value in settings.items()
        }

    def run(self, jobs: Sequence[SweepJob]) -> None:
        """Submit what is left to do of the jobs and is not submitted yet; wait until SLURM has none of them.

        Raises:
            ValueError: The jobs do not fit to the tasks, or SLURM does not take them.
            SweepStopped: A signal came; SLURM keeps the jobs.
        """
        self._check(jobs)
        jobs = list({job.folder: job for job in jobs}.values())
        queue = queued()
        numbers = {job.folder: number for job in jobs if (number := _number_of(job.folder)) in queue}
        left = [job for job in jobs if job.folder not in numbers and self._is_left(job)]
        waiting = {*numbers.values(), *self._submit(left)}
        next_look = time.monotonic() + _QUEUE_SECONDS
        with passed_on(lambda: ()) as signals:
            while waiting and not signals:
                self.board.show()
                time.sleep(_POLL_SECONDS)
                if time.monotonic() > next_look:
                    waiting &= queued(otherwise=waiting)
                    next_look = time.monotonic() + _QUEUE_SECONDS
        if signals:
            print(f"SLURM keeps its jobs; to end them too:  scancel {' '.join(sorted(waiting))}")
            raise SweepStopped(is_killed=False)
        for job in jobs:
            correct(job.folder)
        self.board.finish()

    def _is_left(self, job: SweepJob) -> bool:
        return must_run(correct(job.folder), self.sweep.settings.retry)

    def _check(self, jobs: Sequence[SweepJob]) -> None:
        if self.sweep.settings.parallel != 1:
            raise ConfigError(
                f"sweep.parallel={self.sweep.settings.parallel} has no effect on SLURM: hydra.launcher."
                "array_parallelism says how many jobs run at the same time"
            )
        nodes, tasks = self._settings["nodes"], self._settings["tasks_per_node"]
        for job in jobs:
            processes = job.values["parallel"]["processes"]
            if processes != nodes * tasks:
                raise ConfigError(
                    f"job {job.name}: parallel.processes={processes} must be hydra.launcher.nodes={nodes} times "
                    f"hydra.launcher.tasks_per_node={tasks}"
                )

    def _submit(self, jobs: Sequence[SweepJob]) -> set[str]:
        """Submit the jobs, together if there are several; SLURM's numbers, written down."""
        if not jobs:
            return set()
        # What submitit has sbatch ask for, in its own words; read when it is imported, here and in the jobs.
        os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        settings = dict(self._settings)
        folder, most = settings.pop("submitit_folder"), settings.pop("max_num_timeout")
        cpus = settings["cpus_per_task"]
        # From 22.05 on srun does not take it over from sbatch.
        srun = _SRUN if cpus is None else [*_SRUN, f"--cpus-per-task={cpus}"]
        try:
            executor = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_max_num_timeout=most)
            executor.update_parameters(
                **{name if name in _COMMON_NAMES else f"slurm_{name}": value for name, value in settings.items()},
                slurm_srun_args=srun,
                slurm_teardown=_QUEUE_AGAIN,
            )
            with executor.batch():
                submitted = [executor.submit(SlurmTask(job)) for job in jobs]
        except (FailedJobError, FailedSubmissionError) as error:
            raise ConfigError(f"SLURM does not take the jobs: {' '.join(str(error).split())}") from error
        for job, has in zip(jobs, submitted, strict=True):
            write_json(job.folder / SLURM_FILE, {"number": has.job_id})
        return {has.job_id for has in submitted}


def queued(otherwise: set[str] | None = None) -> set[str]:
    """Numbers of the user's jobs that SLURM has not ended.

    Args:
        otherwise: What to take for the answer when there is none; None to raise.

    Raises:
        ConfigError: SLURM does not answer.
    """
    words = ["squeue", "--noheader", "--array", "--me", "--format=%i"]
    try:
        return set(subprocess.run(words, check=True, encoding="utf-8", capture_output=True).stdout.split())
    except FileNotFoundError:
        raise ConfigError("hydra/launcher=submitit_slurm needs SLURM: there is no squeue here") from None
    except subprocess.CalledProcessError as error:
        if otherwise is not None:
            return otherwise
        raise ConfigError(f"SLURM does not answer: {' '.join(error.stderr.split())}") from error


def _number_of(folder: Path) -> str | None:
    path = folder / SLURM_FILE
    return read_json(path)["number"] if path.exists() else None
