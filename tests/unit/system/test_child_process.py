"""Helper processes of a rank do not hear the signals that ask the rank to stop."""

import os
import signal
from pathlib import Path

import pytest

from moe_pretrain.system.child_process import start_helper

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
