"""``data.paths`` to files: every match is a file that is read, or an error that names it.

Python's own ``glob`` leaves out what it may not read, follows links in circles and gives a file once for each way to
it. A corpus that is shorter or longer than its user thinks is worse than a line of complaint.
"""

import errno
import fnmatch
import glob
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_REST = "; mend that, or write a pattern without it"


@dataclass(frozen=True)
class Matches:
    """The files behind some names and patterns.

    Attributes:
        files: Absolute paths in the order of the patterns, a pattern's matches sorted; each real file once.
        again: Names that lead to a file that is listed already, each with the name it is listed under.
    """

    files: list[Path]
    again: list[tuple[Path, Path]]

    def describe_again(self) -> str:
        """Names that are left out of the matches, in one line, or nothing."""
        if not self.again:
            return ""
        name, first = self.again[0]
        names = "name leads" if len(self.again) == 1 else "names lead"
        return (
            f"data.paths: {len(self.again):,} {names} to a file that is listed under another name ({name} is {first}): "
            f"each of the {len(self.files):,} files is read once"
        )


def match_files(paths: tuple[str, ...], endings: tuple[str, ...]) -> Matches:
    """Find the files of ``data.paths``.

    Args:
        paths: Files or glob patterns; ``**`` descends, into folders behind links too, into each once.
        endings: What a file's name may end in, in small letters.

    Raises:
        ValueError: A file or a match is missing, unreadable, a folder or of another ending, or a pattern matches
            nothing; one line that names it.
    """
    seen: dict[tuple[int, int], Path] = {}
    again: list[tuple[Path, Path]] = []
    for pattern in paths:
        for name in _names_of(pattern, endings):
            path = Path(name).absolute()
            if not path.name.lower().endswith(endings):
                raise ValueError(f"data.paths: {path}: name must end in one of {' '.join(endings)}")
            status = path.stat()
            first = seen.setdefault((status.st_dev, status.st_ino), path)
            if first is not path and first != path:
                again.append((path, first))
    return Matches(list(seen.values()), again)


def _names_of(pattern: str, endings: tuple[str, ...]) -> list[str]:
    """The files that one entry of ``data.paths`` names."""
    kind = _kind(pattern)
    if kind == "file":
        return [pattern]
    if not glob.has_magic(pattern):
        if kind == "folder":
            raise ValueError(f"data.paths: {pattern} is a folder, write a pattern: {pattern}/*{endings[0]}")
        raise ValueError(f"data.paths: {pattern} {kind}{_hint(pattern)}")
    parts = Path(pattern).parts
    root = parts[0] if Path(pattern).is_absolute() else ""
    files: list[str] = []
    folders: list[str] = []
    for name in sorted(set(_expand(root, parts[1:] if root else parts))):
        kind = _kind(name)
        if kind not in ("file", "folder"):
            raise ValueError(f"data.paths: {name}, which {pattern} matches, {kind}{_REST}")
        (files if kind == "file" else folders).append(name)
    if parts[-1] != "**":  # which stands for folders, to be searched and not to be read
        for folder in folders:
            if not any(file.startswith(f"{folder}/") for file in files) and any(_scan(folder)):
                ending = next((ending for ending in endings if pattern.endswith(ending)), endings[0])
                raise ValueError(
                    f"data.paths: {folder}, which {pattern} matches, is a folder: name its files too "
                    f"({folder}/*{ending}), or write a pattern that it does not match"
                )
    if not files:
        raise ValueError(f"data.paths: pattern {pattern} matches no file{_hint(pattern)}")
    return files


def _hint(pattern: str) -> str:
    return ": ~ is not replaced by your home folder here, write it out" if pattern.startswith("~") else ""


def _kind(name: str) -> str:
    """``file``, ``folder``, or what is wrong with it."""
    try:
        mode = os.stat(name).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return f"is a link to {os.readlink(name)}, which does not exist" if os.path.islink(name) else "does not exist"
    except OSError as error:  # no permission for a folder on the way, a name too long, ...
        if error.errno == errno.ELOOP:
            return "is a link that leads in a circle"
        return f"cannot be reached: {error.strerror}"
    except ValueError as error:  # a null character
        return f"cannot be reached: {error}"
    if stat.S_ISDIR(mode):
        return "folder"
    if not stat.S_ISREG(mode):
        return "is no regular file but a pipe, socket or device: it cannot be read twice"
    return "file" if os.access(name, os.R_OK) else "cannot be read: Permission denied"


def _scan(folder: str) -> list[os.DirEntry[str]]:
    """Entries of a folder, by name."""
    try:
        with os.scandir(folder or ".") as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"data.paths: {folder} cannot be searched: {error.strerror}{_REST}") from None


def _expand(folder: str, parts: tuple[str, ...]) -> Iterator[str]:
    """Names below ``folder`` that match the parts, folders and broken links among them."""
    if not parts:
        yield folder
        return
    first, rest = parts[0], parts[1:]
    if first == "**":
        for below in _descend(folder):
            if rest:
                yield from _expand(below, rest)
            else:
                yield from (entry.path for entry in _scan(below) if not entry.name.startswith("."))
    elif glob.has_magic(first):
        for entry in _scan(folder):
            if fnmatch.fnmatchcase(entry.name, first) and (not entry.name.startswith(".") or first.startswith(".")):
                name = os.path.join(folder, entry.name)
                if not rest or _is_folder(name):
                    yield from _expand(name, rest)
    else:
        name = os.path.join(folder, first)
        if _is_folder(name) if rest else _kind(name) != "does not exist":
            yield from _expand(name, rest)


def _descend(folder: str) -> Iterator[str]:
    """``folder`` and the folders below it, each real one once; hidden ones are not searched.

    Those behind links come last: what is reached in two ways is named by the straight one.
    """
    waiting = [folder]
    behind_links: list[str] = []
    seen: set[tuple[int, int]] = set()
    while waiting or behind_links:
        here = waiting.pop() if waiting else behind_links.pop(0)
        status = os.stat(here or ".")
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        yield here
        for entry in _scan(here):
            name = os.path.join(here, entry.name)
            if not entry.name.startswith(".") and _is_folder(name):
                (behind_links if entry.is_symlink() else waiting).append(name)


def _is_folder(name: str) -> bool:
    """Whether it is a folder, behind a link or not.

    Raises:
        ValueError: It may be one, but permission to look is missing.
    """
    kind = _kind(name)
    if kind.startswith("cannot be reached"):
        raise ValueError(f"data.paths: {name} {kind}{_REST}")
    return kind == "folder"
