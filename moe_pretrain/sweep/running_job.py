"""Runs one job of a sweep as a process of its own, whoever asks for it, and writes down what became of it.

    code = run_job(job)                       # starts, passes signals on, waits, judges
    running = RunningJob(job); ...; running.settle()    # the same for who has several at once

The process has a session of its own and dies with the one that started it; the lock that it inherits says while it
lives that the job runs.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Protocol

from moe_pretrain.run_folder.paths import JOB_LOCK, LOG_FILE
from moe_pretrain.sweep.job_record import JobState, SweepJob, judge, written_state
from moe_pretrain.system.child_process import die_with_parent
from moe_pretrain.system.exit_codes import INTERRUPTED, LOST_RANK, STOPPED, UNSAVED
from moe_pretrain.system.file_lock import try_lock
from moe_pretrain.system.stop_signals import HANDLED

PROGRAM = (sys.executable, "-m", "moe_pretrain", "train")
"""What a job's overrides are given to."""
_LOCK_SECONDS = 10.0
"""How long the processes of a driver that was killed may take to die, before a job is called running elsewhere."""
_STOPPING = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Signals by which somebody else ends a process; any other is a crash."""
_REASON_LENGTH = 300


class RunsElsewhere(ValueError):
    """Another process has the job."""


class Signalled(Protocol):
    """Process or job that signals are passed on to."""

    def signal(self, number: int) -> None:
        """Pass a signal on, if it still runs."""


class RunningJob:
    """A job's process, from its start."""

    def __init__(self, job: SweepJob, environment: Mapping[str, str] | None = None, program: Iterable[str] = PROGRAM):
        """Start it.

        Args:
            job: What to run.
            environment: Variables beside this process's own.
            program: What the job's overrides are given to.

        Raises:
            RunsElsewhere: Another process has the job, for longer than one takes to die.
        """
        self.job = job
        lock = _lock(job)
        try:
            self._state = written_state(job.folder)
            self._state = replace(
                self._state, state="running", reason="", exit_code=None, attempts=self._state.attempts + 1
            )
            self._state.write(job.folder)
            with (job.folder / LOG_FILE).open("ab") as log:
                self._log_start = log.tell()
                self.process = subprocess.Popen(
                    [*program, *job.words],
                    env={**os.environ, **(environment or {})},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(lock,),
                    start_new_session=True,
                    preexec_fn=die_with_parent,
                )
        finally:
            os.close(lock)  # the process has its own handle of it

    def signal(self, number: int) -> None:
        """Pass a signal on to the process, if it still runs."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def settle(self) -> JobState:
        """Wait for the process; judge how the job ended and write it down."""
        code = self.process.wait()
        code = code if code >= 0 else 128 - code
        ended = replace(self._state, exit_code=code)
        state = judge(self.job.folder, self._by_code(ended, code))
        if code == 0 and state.state not in ("finished", "diverged"):
            state = replace(ended, state="failed", reason="it exited with 0 before its last step")
        state.write(self.job.folder)
        return state

    def _by_code(self, ended: JobState, code: int) -> JobState:
        """Meaning of the exit code, where the run's own rows do not say more."""
        if code == STOPPED:
            return replace(ended, state="stopped", reason="stopped by a signal, its checkpoint written")
        if code == INTERRUPTED or code - 128 in _STOPPING:
            return replace(ended, state="stopped", reason=f"killed by {signal.Signals(code - 128).name}")
        if code > 128 and code - 128 in signal.valid_signals():
            return replace(ended, state="failed", reason=f"killed by {signal.Signals(code - 128).name}")
        names = {UNSAVED: "its last checkpoint could not be written: ", LOST_RANK: "a rank was stuck or gone: "}
        return replace(ended, state="failed", reason=names.get(code, "") + self._last_words())

    def _last_words(self) -> str:
        """The program's own complaint in this attempt's output, else its last line."""
        with (self.job.folder / LOG_FILE).open("rb") as log:
            log.seek(self._log_start)
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        complaints = [line for line in lines if line.startswith("moe-pretrain ")]
        said = (complaints or lines or [f"exit code {self.process.returncode}, and no word why"])[-1]
        return said.removeprefix("moe-pretrain train: ")[:_REASON_LENGTH]


def run_job(job: SweepJob, environment: Mapping[str, str] | None = None, program: Iterable[str] = PROGRAM) -> JobState:
    """Run a job in a process of its own, pass on the signals that stop a run, and wait for it.

    To be called in the main thread.

    Raises:
        RunsElsewhere: Another process has the job.
    """
    running: list[RunningJob] = []
    with passed_on(lambda: running) as signals:
        running.append(RunningJob(job, environment, program))
        if signals:  # one that came while it was started
            running[0].signal(signal.SIGTERM)
        return running[0].settle()


@contextmanager
def passed_on(jobs: Callable[[], Iterable[Signalled]]) -> Iterator[list[int]]:
    """Context in which a signal that stops a run is passed on to the jobs that run at that moment.

    A second SIGINT kills them.

    Yields:
        The numbers of the signals that came so far.
    """
    came: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        came.append(number)
        for job in jobs():
            job.signal(signal.SIGKILL if came.count(signal.SIGINT) > 1 else number)

    before = {number: signal.signal(number, pass_on) for number in HANDLED}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _lock(job: SweepJob) -> int:
    deadline = time.monotonic() + _LOCK_SECONDS
    while (handle := try_lock(job.folder / JOB_LOCK)) is None:
        if time.monotonic() > deadline:
            raise RunsElsewhere(f"{job.folder}: another process runs this job")
        time.sleep(0.1)
    return handle
