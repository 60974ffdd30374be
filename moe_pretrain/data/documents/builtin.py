"""The built-in corpus: Python's own standard library and its help texts, always at hand."""

import os
import re
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

from moe_pretrain.data.documents.document import CorpusRow, LeftOut, checked_text
from moe_pretrain.data.documents.text_files import FileSlice

_TOPICS = "pydoc_data.topics/"
_LEFT_OUT_FOLDERS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "pydoc_data",  # its topics are documents of their own: the same text must not come twice
}

# A number or a short string at the start of a line, and what separates it from the next or from a comment.
_TABLE_LINE = re.compile(r"""^\s*(0[xX][0-9a-fA-F]+|[-+]?\d[\d.]*|[bru]?(['"]).{0,12}?\2)\s*[,:#]""", re.MULTILINE)


def _standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def standard_library_files() -> list[str]:
    """Paths relative to the library, sorted; ``_sysconfigdata`` differs between builds."""
    root = _standard_library()
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - _LEFT_OUT_FOLDERS  # not walked: packages have ten times the library's files
        found += [
            (Path(folder) / name).relative_to(root).as_posix()
            for name in names
            if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    return sorted(found)


def builtin_pieces() -> list[FileSlice]:
    """Every module and help topic, one piece each, in an order that only the Python release decides."""
    root = _standard_library()
    modules = [FileSlice(name, 0, None, (root / name).stat().st_size) for name in standard_library_files()]
    return modules + [FileSlice(_TOPICS + name, 0, None, len(topics[name])) for name in sorted(topics)]


def builtin_row(name: str) -> CorpusRow:
    """The document of one module or help topic."""
    identity = f"builtin:{name}"
    if name.startswith(_TOPICS):
        return checked_text(identity, topics[name.removeprefix(_TOPICS)], "skip")
    try:
        text = (_standard_library() / name).read_bytes().decode()
    except UnicodeDecodeError:
        return LeftOut(identity, "invalid_utf8")  # a few sources are in another encoding
    if is_table(text):
        return LeftOut(identity, "table")
    return checked_text(identity, text, "skip")


def is_table(text: str) -> bool:
    """Whether more than half of the lines are entries of a table.

    The 72 code pages of ``encodings`` are one tenth of the library's text outside its tests, and each is the next with
    other numbers: a model that has seen one has seen the one that is held out.
    """
    lines = sum(1 for line in text.splitlines() if line.strip())
    return 2 * sum(1 for _ in _TABLE_LINE.finditer(text)) > lines
