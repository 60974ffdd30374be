"""The program under a locale that is not UTF-8."""

import os
import subprocess
import sys

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
PROGRAM = """
import os, sys
from moe_pretrain.system.utf8_mode import restart_in_utf8_mode
before = os.getpid()
restart_in_utf8_mode()
print(sys.getfilesystemencoding(), ascii(sys.argv[1:]), os.environ["PYTHONUTF8"], before)
"""


def test_names_are_utf8_whatever_the_locale_says():
    words = ["größe/東.txt", "a b"]
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words], env=os.environ | ASCII, stdout=subprocess.PIPE, encoding="utf-8"
    )
    output, _ = program.communicate()
    assert output.strip() == f"utf-8 {ascii(words)} 1 {program.pid}"


def test_output_that_a_terminal_cannot_show_ends_no_command(tmp_path):
    words = [sys.executable, "-m", "moe_pretrain", "prepare", "data=files", f'data.paths=["{tmp_path}/ü*.txt"]']
    (tmp_path / "ü.txt").write_bytes(b"\xff")
    done = subprocess.run(
        [*words, f"run.output_dir={tmp_path}/o"], env=os.environ | ASCII | {"PYTHONIOENCODING": "ascii"},
        capture_output=True, encoding="ascii",
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "\\xfc*.txt" in done.stdout  # the progress line names the pattern
    assert "\\xfc.txt" in done.stderr
