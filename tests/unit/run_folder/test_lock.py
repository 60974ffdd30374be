"""One folder, one run: locks between processes, without the training."""

import errno
import fcntl
import multiprocessing
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from moe_pretrain.run_folder import lock as ownership
from moe_pretrain.run_folder.lock import RunInUse, joined, owned
from moe_pretrain.run_folder.paths import OWNER_FILE

fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "_WAIT_SECONDS", 0.5)


def _hold(folder: Path, context: Any, ready: Any, release: Any) -> None:
    """Body of a process: hold the folder until it is released or killed."""
    try:
        with context(folder):
            ready.put("holds")
            release.wait()
    except RunInUse as refusal:
        ready.put(str(refusal))


def _own(folder: Path) -> Any:
    return owned(folder, lambda line: None)


def _start(folder: Path, context: Any) -> tuple[Any, Any, Any]:
    ready, release = fork.Queue(), fork.Event()
    process = fork.Process(target=_hold, args=(folder, context, ready, release), daemon=True)
    process.start()
    return process, ready, release


def test_of_many_starts_at_once_exactly_one_owns(tmp_path: Path):
    for number in range(10):
        folder = tmp_path / f"run-{number}"
        started = [_start(folder, _own) for _ in range(4)]
        answers = [ready.get(timeout=60) for _, ready, _ in started]
        (owner,) = [process for (process, _, _), answer in zip(started, answers, strict=True) if answer == "holds"]
        refusals = [answer for answer in answers if answer != "holds"]
        expected = f"{folder} is in use by process {owner.pid} on {socket.gethostname()} since 20"
        assert all(expected in refusal and f"run.name={folder.name}" in refusal for refusal in refusals), refusals
        for process, _, release in started:
            release.set()
            process.join()


def test_a_killed_owner_leaves_nothing_behind(tmp_path: Path):
    process, ready, _ = _start(tmp_path, _own)
    assert ready.get(timeout=60) == "holds"
    os.kill(process.pid, signal.SIGKILL)
    with owned(tmp_path, lambda line: None):
        assert f"process {os.getpid()} on" in (tmp_path / OWNER_FILE).read_text()


def test_a_rank_that_outlives_its_owner_keeps_others_out_while_it_lives(tmp_path: Path):
    orphan, ready, _ = _start(tmp_path, joined)
    assert ready.get(timeout=60) == "holds"
    with pytest.raises(RunInUse, match="ranks of that run which have not ended"), owned(tmp_path, lambda line: None):
        pass
    os.kill(orphan.pid, signal.SIGKILL)
    with owned(tmp_path, lambda line: None):
        pass


def test_ranks_join_their_owner(tmp_path: Path):
    with owned(tmp_path, lambda line: None), joined(tmp_path), joined(tmp_path):
        pass


def test_a_start_waits_for_one_that_is_dying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ownership, "_WAIT_SECONDS", 60.0)
    dying, ready, _ = _start(tmp_path, _own)
    assert ready.get(timeout=60) == "holds"
    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        os.kill(dying.pid, signal.SIGKILL)

    with owned(tmp_path, report):
        assert len(lines) == 1 and f"process {dying.pid} on" in lines[0] and "waiting" in lines[0]


def test_a_start_that_gets_in_between_the_two_locks_is_the_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The kernel lets go of the exclusive lock before it gives the shared one."""
    real, others = fcntl.flock, []

    def flock(handle: int, operation: int) -> None:
        if operation & fcntl.LOCK_SH and not others:
            real(handle, fcntl.LOCK_UN)
            others.append(os.open(tmp_path / OWNER_FILE, os.O_RDWR))
            real(others[0], fcntl.LOCK_EX)
        real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(RunInUse), owned(tmp_path, lambda line: None):
        pass
    os.close(others[0])


def test_a_file_system_without_locks_is_said_aloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    lines: list[str] = []
    with owned(tmp_path, lines.append), joined(tmp_path):
        assert "cannot be locked (No locks available)" in lines[0]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"run\.output_dir=.*cannot be written: Not a directory"):
        with owned(tmp_path / "file" / "run", lambda line: None):
            pass
