"""UTF-8 mode of the interpreter, under a locale of another encoding.

Our own files name their encoding. Names of files do not: Python, tokenizers, pyarrow and datasets each turn a path into
bytes in their own way, and agree only in UTF-8.
"""

import os
import sys


def restart_in_utf8_mode() -> None:
    """Start this program anew, in this process, if names of files are not UTF-8 (``LC_ALL=C PYTHONUTF8=0``).

    Words and environment arrive as the bytes that they were. The processes that are started later inherit the mode.
    """
    if sys.getfilesystemencoding() == "utf-8" or not sys.executable:
        return
    os.putenv("PYTHONUTF8", "1")
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
