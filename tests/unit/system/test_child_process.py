"""Helper processes of a rank do not hear the signals that ask the rank to stop."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moe_pretrain.system.child_process import signal_main_thread, start_helper

MAIN = """
import os, sys
def main():
    os.read(int(sys.argv[1]), 1)
    open(sys.argv[2], "w").write("done")
"""


def test_a_helper_outlives_signals_that_ask_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "slow_helper.py").write_text(MAIN)
    monkeypatch.syspath_prepend(tmp_path)
    theirs, ours = os.pipe()
    process = start_helper("slow_helper", [str(theirs), str(tmp_path / "out")], [theirs])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        process.send_signal(number)
    os.write(ours, b"x")
    assert process.wait(20) == 0 and (tmp_path / "out").read_text() == "done"
    os.close(theirs)
    os.close(ours)


def test_the_caller_still_hears_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "quick_helper.py").write_text("def main(): pass")
    monkeypatch.syspath_prepend(tmp_path)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert start_helper("quick_helper", [], []).wait(20) == 0
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


STOPS = 30
STOPPING = f"""
import faulthandler, signal, sys, threading, time
faulthandler.register(signal.SIGUSR2, file=sys.stdout)
for _ in range(16):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
def stop():
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
def go_on():
    time.sleep(0.005)
for _ in range({STOPS}):
    stop()
    go_on()
"""


def test_a_stopped_main_thread_handles_its_signal_before_it_goes_on(tmp_path: Path):
    """To the process, another of its threads took the signal two times of fifteen, and the stacks missed the place."""
    path = tmp_path / "stacks.txt"
    with path.open("w") as stacks:  # no pipe: those of 17 threads do not fit into one
        process = subprocess.Popen([sys.executable, "-c", STOPPING], stdout=stacks)
    for _ in range(STOPS):
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        signal_main_thread(process.pid, signal.SIGUSR2)
        process.send_signal(signal.SIGCONT)
    process.wait(20)
    assert path.read_text().count("in stop\n") == STOPS


def test_a_signal_to_no_process_is_an_error():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(20)
    with pytest.raises(ProcessLookupError):
        signal_main_thread(process.pid, signal.SIGCONT)
