"""The watch over a rank from outside: code that keeps the interpreter's lock ends it, a stop of it does not."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_pretrain.system.outside_watch import _line_at

PROGRAM = """
import ctypes, faulthandler, signal, sys, threading, time
from pathlib import Path
from moe_pretrain.system import outside_watch
from moe_pretrain.system.outside_watch import OutsideWatch, Watched
stacks = open(sys.argv[1], "w")
faulthandler.register(signal.SIGUSR2, file=stacks)
{setting}
watch = OutsideWatch(Watched("rank 0 on here", {limits}, signal.SIGUSR2, Path(sys.argv[1]), 69))
def live():
    while True:
        watch.tell()
        time.sleep(0.2)
threading.Thread(target=live, daemon=True).start()
{place}
def router():
    {body}
router()
watch.close()
print("went on")
"""
LINE = PROGRAM.partition("{body}")[0].count("\n") + 1
PLACE = 'watch.tell("step 3, phase train.backward")'
SLEEP = "while True: ctypes.PyDLL(None).sleep(60)"  # a signal cuts a sleep short


def program(folder: Path, body: str, place: str = PLACE, limits: str = "2, 600", setting: str = "") -> subprocess.Popen:
    text = PROGRAM.format(body=body, place=place, limits=limits, setting=setting)
    words = [sys.executable, "-c", text, str(folder / "rank.txt")]
    return subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("body", [SLEEP, "while True: 7 ** 10**9"], ids=["a foreign function", "a huge integer"])
def test_code_that_keeps_the_lock_ends_the_process_with_its_line_and_code(tmp_path: Path, body: str):
    process = program(tmp_path, body)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 69, err
    assert err == (
        "moe-pretrain: stuck, in one place of its loop for 2 s (parallel.timeout_seconds): rank 0 on here, last seen "
        f"at step 3, phase train.backward, in router (<string>:{LINE}), which keeps the interpreter's lock; stacks in "
        f"{tmp_path}\n"
    )
    assert "in router" in (tmp_path / "rank.txt").read_text()


def test_a_start_up_has_a_limit_of_its_own(tmp_path: Path):
    process = program(tmp_path, SLEEP, place="", limits="600, 2")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 69 and "for 2 s" in err and "rank 0 on here, last seen at start-up" in err


@pytest.mark.slow
def test_where_the_c_library_cannot_end_it_the_process_is_killed(tmp_path: Path):
    process = program(tmp_path, SLEEP, setting="outside_watch._exit_when_told = lambda *words: None")
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL and "rank 0 on here, last seen at step 3" in err


def test_a_process_that_was_stopped_for_longer_goes_on(tmp_path: Path):
    process = program(tmp_path, "print('ready', flush=True)\n    time.sleep(2)", limits="5, 5")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(8)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "went on\n", "")


def test_a_process_that_ends_takes_its_watch_along(tmp_path: Path):
    process = program(tmp_path, "print(watch._process.pid, flush=True)\n    import os; os._exit(3)")
    out, err = process.communicate(timeout=60)  # its standard error stays open while the other process lives
    assert process.returncode == 3 and err == ""
    deadline = time.monotonic() + 30
    while Path(f"/proc/{int(out)}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_line_is_that_of_the_thread_with_the_lock_outside_of_torch(tmp_path: Path):
    file = tmp_path / "rank.txt"
    file.write_text(
        'Thread 0x1 (most recent call first):\n  File "/a/early.py", line 1 in f\n\n'
        'Thread 0x2 (most recent call first):\n  File "/a/wait.py", line 2 in g\n\n'
        'Current thread 0x3 (most recent call first):\n  File "/x/torch/nn/linear.py", line 3 in forward\n'
        '  File "/b/router.py", line 27 in <lambda>\n  File "/b/layer.py", line 5 in h\n'
    )
    assert _line_at(file, 0) == "<lambda> (router.py:27)"
    assert _line_at(file, file.stat().st_size) == "" == _line_at(tmp_path / "none", 0)
