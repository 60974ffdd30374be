"""Exit codes of errors: what the disk refuses is one, what the user has mistaken another, a mistake of ours none."""

import errno
import os

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
