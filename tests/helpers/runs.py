"""The program as a user runs it: a process in a folder, and what it leaves there."""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from helpers.program_server import Poll, Start

STEPS = 12
TINY = [
    "model.vocab_size=512",
    "model.sequence_length=64",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.moe.num_experts=4",
    "model.moe.expert_hidden_size=32",
    "batch.global_batch_tokens=1024",
    "batch.micro_batch_size=4",
    f"budget.tokens={STEPS * 1024}",
    "schedule.warmup_steps=2",
    "checkpoint.every_steps=4",
    "evaluation.every_steps=6",
    "evaluation.max_rows=16",
    "metrics.log_every_steps=1",
    "metrics.wandb=off",
    "engine.check_every_steps=5",
    "data.validation_fraction=0.1",
    "run.report=false",  # drawn where a test looks at it
]


class Program:
    """``python WORDS`` in a process of its own, forked where imports are done; what `subprocess.Popen` can, of it."""

    def __init__(self, home: Path, words: tuple[str, ...], more: Mapping[str, str] | None = None):
        self._folder = tempfile.TemporaryDirectory()
        self._output, self._errors = (Path(self._folder.name) / name for name in ("output", "errors"))
        self._output.touch()
        self._errors.touch()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(more or {})}
        self.pid = _ask(Start(words, str(home), environment, str(self._output), str(self._errors)))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask(Poll(self.pid))
        return self.returncode

    def wait(self, timeout: float = 200.0) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise subprocess.TimeoutExpired(
                    "moe_pretrain", timeout, self._output.read_text(), self._errors.read_text()
                )
            time.sleep(0.01)
        return code

    def communicate(self, timeout: float = 200.0) -> tuple[str, str]:
        self.wait(timeout)
        return self._output.read_text(), self._errors.read_text()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _ask(request: Start | Poll) -> Any:
    server = _server()
    server.send(request)
    return server.recv()


@functools.cache
def _server() -> Connection:
    """The other end of ``program_server``, which ends with this process."""
    ours, theirs = Pipe()
    code = f"from helpers.program_server import serve_forever; serve_forever({theirs.fileno()})"
    tests = Path(__file__).parent.parent
    paths = [str(tests), str(tests.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.Popen([sys.executable, "-c", code], env=environment, pass_fds=[theirs.fileno()])
    theirs.close()
    return ours


def start(home: Path, *words: str) -> Program:
    """Start the program in ``home``."""
    return Program(home, ("-m", "moe_pretrain", *words))


def run(home: Path, *words: str) -> tuple[int, str, str]:
    """Run the program in ``home`` to its end: exit code, standard output and errors."""
    program = start(home, *words)
    out, err = program.communicate()
    assert program.returncode is not None
    return program.returncode, out, err


def run_script(home: Path, script: Path, *words: str, timeout: float = 280.0) -> tuple[int, str, str]:
    """Run ``python SCRIPT WORDS`` in ``home`` to its end: exit code, standard output and errors."""
    program = Program(home, (str(script), *words))
    out, err = program.communicate(timeout)
    assert program.returncode is not None
    return program.returncode, out, err


def run_python(home: Path, *words: str) -> tuple[int, str, str]:
    """`run` in a new interpreter, which takes seconds: for what imports may print, or change."""
    command = [sys.executable, "-m", "moe_pretrain", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=home, env=environment, text=True, capture_output=True, timeout=200)
    return done.returncode, done.stdout, done.stderr


def train_words(name: str, *more: str) -> list[str]:
    """The command that trains on the small corpus of ``home``."""
    return ["train", *TINY, "data=files", "data.paths=[corpus.jsonl]", f"run.name={name}", *more]


def rows_of(home: Path, name: str, kind: str = "train") -> list[dict]:
    path = home / "outputs" / name / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [row for row in rows if row["kind"] == kind]


def files_of_step(home: Path, name: str, step: int) -> dict:
    """Names, sizes and hashes of the files of a checkpoint."""
    manifest = home / "outputs" / name / "checkpoints" / f"step_{step:08d}" / "manifest.json"
    return json.loads(manifest.read_text())["files"]


def wait_for_step(home: Path, name: str, step: int, process: "Program | subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        if any(row["step"] >= step for row in rows_of(home, name)):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    raise AssertionError(f"{name} did not reach step {step}")
