"""Signals in the first seconds of a run, and limits that the system sets: a line and an exit code, no traceback."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moe_pretrain.system.open_files import allow_open_files
from moe_pretrain.system.threads import start_thread

IMPORTING = """
import signal, sys, time, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
slow = types.ModuleType("moe_pretrain.commands.train")
sys.meta_path.insert(0, type("Slow", (), {"find_spec": staticmethod(lambda name, *rest:
    (print("importing", flush=True), time.sleep(600)) if name == "torch" else None)}))
print("ready", flush=True)
from moe_pretrain.cli import main
sys.exit(main(["train", "run.name=early"]))
"""


def catches(process: int, number: int) -> bool:
    status = Path(f"/proc/{process}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_while_packages_are_imported(number: signal.Signals, code: int, tmp_path: Path):
    """``import torch`` lasts as long as the test wants."""
    program = subprocess.Popen([sys.executable, "-c", IMPORTING], stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not catches(program.pid, signal.SIGUSR1):
        assert program.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.1)  # all three are taken
    program.send_signal(number)
    _, err = program.communicate(timeout=30)
    assert program.returncode == code
    assert f"{number.name} while nothing is trained: nothing to save; the same command goes on" in err
    assert "Traceback" not in err and len(err.splitlines()) == 1


def test_an_interrupted_command_has_no_traceback(tmp_path: Path):
    program = IMPORTING.replace('"train", "run.name=early"', '"report", "."')
    process = subprocess.Popen(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "importing\n"]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "moe-pretrain: interrupted\n")


def test_too_few_open_files_are_said_with_the_number(monkeypatch: pytest.MonkeyPatch):
    limits: list[tuple[int, int]] = [(64, 300)]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limit: limits.append(limit))
    allow_open_files(8)
    assert limits[-1] == (300, 300), "what a process may raise by itself is raised"
    with pytest.raises(ValueError, match=r"^the limit of open files, ulimit -n 300, must be at least \d+ for 64 ranks"):
        allow_open_files(64)


def test_a_thread_that_cannot_be_started_names_the_limits(monkeypatch: pytest.MonkeyPatch):
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    limits = {resource.RLIMIT_AS: 2**30, resource.RLIMIT_NPROC: 100}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], limits[kind]))
    with pytest.raises(ValueError, match=r"prefetch: can't start new thread: raise ulimit -v 1048576 KiB .* ulimit -u"):
        start_thread(lambda: None, "prefetch")


def test_a_limit_of_open_files_before_anything_starts(tmp_path: Path):
    program = "import sys; from moe_pretrain.cli import main; sys.exit(main(['train', 'run.name=few']))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (150, 150)),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2 and "ulimit -n 150, must be at least 192 for 1 rank" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "outputs").exists()
