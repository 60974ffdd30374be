"""Files are written whole or not at all, whatever the disk does meanwhile."""

import builtins
import errno
import os
import resource
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from moe_pretrain.commands.errors import code_of, describe
from moe_pretrain.data.prepare.cache import remove_old_leftovers
from moe_pretrain.system.exit_codes import UNSAVED
from moe_pretrain.system.files import WholeFile, read_json, remove_leftovers, write_json, write_whole


@contextmanager
def no_room_after(num_bytes):
    """Files cannot grow beyond ``num_bytes``: the kernel takes a part of a write and refuses the rest."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "content", ["x" * 5000, b"x" * 5000, "\u00e9" * 2500], ids=["text", "bytes", "text beyond ASCII"]
)
def test_a_disk_without_room_keeps_the_old_file(tmp_path, content):
    path = tmp_path / "config.yaml"
    write_whole(path, "old")
    with no_room_after(1000), pytest.raises(OSError, match="File too large"):
        write_whole(path, content)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["config.yaml"]
    write_whole(path, content)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_refused_flush_or_rename_keeps_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "summary.json"
    write_json(path, {"seed": 1})

    def refuse(*_args, **_keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(OSError, match="No space left"):
            write_json(path, {"seed": 2})
    assert read_json(path) == {"seed": 1} and os.listdir(tmp_path) == ["summary.json"]


class _Refusing:
    """An open file that fails at one call, as a network file system does that writes late."""

    def __init__(self, file, call, number):
        self._file, self._call, self._number = file, call, number

    def __getattr__(self, name):
        def refuse(*_args):
            raise OSError(self._number, os.strerror(self._number))

        return refuse if name == self._call else getattr(self._file, name)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EDQUOT, errno.ENOTCONN])
@pytest.mark.parametrize("call", ["write", "close", "fsync", "rename", "flush of the folder"])
def test_each_refusal_of_a_network_file_system_names_the_file_and_keeps_the_old_one(
    tmp_path, monkeypatch, call, number
):
    path = tmp_path / "summary.json"
    write_json(path, {"seed": 1})
    fsync, plain = os.fsync, open

    def refuse(*words, **_keywords):
        is_folder = isinstance(words[0], int) and os.path.isdir(f"/proc/self/fd/{words[0]}")
        if call in ("fsync", "rename") or is_folder:
            raise OSError(number, os.strerror(number))
        fsync(*words)

    with monkeypatch.context() as patch:
        if call in ("write", "close"):
            patch.setattr(builtins, "open", lambda *words, **more: _Refusing(plain(*words, **more), call, number))
        patch.setattr(
            os, "rename" if call == "rename" else "fsync", refuse if call not in ("write", "close") else fsync
        )
        with pytest.raises(OSError) as caught:
            write_json(path, {"seed": 2})
    assert caught.value.errno == number and str(caught.value.filename).startswith(str(tmp_path))
    assert code_of(caught.value) == UNSAVED and str(tmp_path) in describe(caught.value)
    assert read_json(path) == {"seed": 2 if call == "flush of the folder" else 1}
    assert os.listdir(tmp_path) == ["summary.json"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_without_a_flush_of_folders_will_do(tmp_path, monkeypatch, number):
    fsync = os.fsync

    def refuse(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    write_whole(tmp_path / "a", "text")
    assert (tmp_path / "a").read_text() == "text"


def test_hosts_whose_processes_have_one_number_do_not_share_a_temporary_file(tmp_path, monkeypatch):
    """Containers do, and write the same cache on a network file system."""
    with WholeFile(tmp_path / "a") as ours:
        ours.write(b"one")
        monkeypatch.setattr(socket, "gethostname", lambda: "other")
        with WholeFile(tmp_path / "a") as theirs:
            theirs.write(b"other")
        assert (tmp_path / "a").read_bytes() == b"other"
    assert (tmp_path / "a").read_bytes() == b"one"


def test_a_clock_that_jumps_takes_no_file_from_a_process_that_lives(tmp_path, monkeypatch):
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = tmp_path / f"b.{socket.gethostname()}.{dead.pid}.tmp"
    left.touch()
    (tmp_path / "c.4.tmp").touch()  # of an earlier release
    later = time.time() + 5 * 3600
    with WholeFile(tmp_path / "a") as file:
        file.write(b"half")
        remove_old_leftovers(tmp_path)
        assert len(os.listdir(tmp_path)) == 3, "none is old"
        monkeypatch.setattr(time, "time", lambda: later)
        remove_old_leftovers(tmp_path)
        file.write(b" and half")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"half and half"


def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    seen = []
    fsync, rename = os.fsync, os.rename

    def spy_fsync(handle):
        fsync(handle)
        seen.append(("fsync", os.readlink(f"/proc/self/fd/{handle}"), os.fstat(handle).st_size))

    def spy_rename(source, target, **keywords):
        rename(source, target, **keywords)
        seen.append(("rename", str(source), str(target)))

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "rename", spy_rename)
    path = tmp_path / "a"
    write_whole(path, "abc")
    temporary = f"{path}.{socket.gethostname()}.{os.getpid()}.tmp"
    assert [each[:2] for each in seen] == [("fsync", temporary), ("rename", temporary), ("fsync", str(tmp_path))]
    assert seen[0][2] == 3


def test_a_killed_writer_leaves_the_old_file_and_what_it_left_can_be_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_whole(path, "old")
    code = f"""
import os, pathlib
from moe_pretrain.system.files import WholeFile
file = WholeFile(pathlib.Path({str(path)!r}))
file.write(b"new")
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    (tmp_path / "metrics.jsonl2.1.tmp").touch()  # another file's
    assert path.read_text() == "old" and len(list(tmp_path.glob("metrics.jsonl.*.tmp"))) == 1
    remove_leftovers(path)
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "metrics.jsonl2.1.tmp"]


def test_an_exception_between_two_pieces_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), WholeFile(tmp_path / "a") as file:
        file.write(b"half")
        raise RuntimeError
    assert not os.listdir(tmp_path)


def test_numbers_that_json_does_not_know_are_refused_before_the_old_file_is_touched(tmp_path):
    write_json(tmp_path / "a.json", {"loss": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert read_json(tmp_path / "a.json") == {"loss": 1.0}
