"""Exit codes of errors: what the disk refuses is one, what the user has mistaken another, a mistake of ours none."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from moe_pretrain.checkpoint.manifest import CheckpointError, DamagedCheckpoint, UnreadableCheckpoint
from moe_pretrain.commands.errors import code_of, describe
from moe_pretrain.data.prepare.worker_pool import WriteError


def disk_error(number: int) -> OSError:
    return OSError(number, os.strerror(number), "/runs/one/config.yaml")


def wrapped(error: OSError, is_chained: bool) -> ValueError:
    try:
        try:
            raise error
        except OSError as cause:
            if is_chained:
                raise ValueError("run.cache_dir: refused") from cause
            raise ValueError("run.cache_dir: refused") from None
    except ValueError as found:
        return found


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EIO", "EROFS", "ESTALE"])
def test_the_disk_has_one_exit_code(name: str):
    error = disk_error(getattr(errno, name))
    assert [code_of(each) for each in (error, wrapped(error, True), wrapped(error, False))] == [74] * 3
    assert describe(error).startswith(f"/runs/one/config.yaml: {os.strerror(error.errno)}; ")


def test_other_errors_have_others():
    assert code_of(UnreadableCheckpoint("x")) == 74
    assert [code_of(kind("x")) for kind in (CheckpointError, DamagedCheckpoint, ValueError)] == [2, 2, 2]
    assert code_of(disk_error(errno.EACCES)) == 2 and code_of(wrapped(disk_error(errno.EACCES), True)) == 2
    assert [code_of(error) for error in (KeyError("x"), BrokenPipeError("a worker is gone"), OSError("x"))] == [
        None
    ] * 3


def test_a_full_disk_that_another_process_has_met_has_it_too():
    assert [code_of(WriteError("shards", number)) for number in (errno.ENOSPC, None)] == [74, 2]


def test_a_line_is_one_write(tmp_path: Path):
    """Ranks share standard error: the end of a line must not come after another rank's line."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)  # a message is a write
    command = [sys.executable, "-m", "moe_pretrain", "train", "model=nope"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with ours, theirs:
        done = subprocess.run(command, cwd=tmp_path, stderr=theirs.fileno(), env=environment, timeout=100)
        assert done.returncode == 2
        written = ours.recv(65536).decode()
    assert written.startswith("moe-pretrain train: ") and written.endswith("\n")
