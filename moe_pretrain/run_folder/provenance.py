"""Provenance of a run, written and read at this one place: command words, resolved configuration, sizes, versions."""

import contextlib
import json
import platform
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xxhash
import yaml

from moe_pretrain.run_folder.paths import CONFIG_FILE, OVERRIDES_FILE, SUMMARY_FILE, sick_step_file
from moe_pretrain.system.files import write_json, write_whole
from moe_pretrain.system.words import one_line

_GIT_SECONDS = 10.0
_FOR_ONE_START = re.compile(r"\+*(checkpoint\.resume|fault(\.\w+)?)=")
"""Overrides that a run's record does not keep."""


def write_overrides(folder: Path, overrides: Sequence[str]) -> None:
    """Write down what the run was started with, which the same name goes on with; other ranks may read it meanwhile.

    Without the words for one start: a kept ``checkpoint.resume=restart`` would begin anew whenever later checkpoints
    are lost, ``never`` would refuse every resume, and a run that a ``fault`` has killed would be killed again.

    Raises:
        ValueError: A word is of several lines, of which each would be a word when they are read.
    """
    if broken := next((word for word in overrides if "\n" in word), None):
        raise ValueError(f"override {broken!r} has a line break, with which {OVERRIDES_FILE} cannot keep it")
    kept = [word for word in overrides if not _FOR_ONE_START.match(word)]
    write_whole(folder / OVERRIDES_FILE, "".join(f"{word}\n" for word in kept))


def claim_overrides(folder: Path, overrides: Sequence[str]) -> None:
    """Write down what a new run was started with; one that has its record keeps it until new words are accepted."""
    if not (folder / CONFIG_FILE).exists():
        write_overrides(folder, overrides)


def read_overrides(folder: Path) -> list[str]:
    """The words that the run was started with; none where it recorded none.

    Raises:
        ValueError: The file is damaged, or cannot be read.
    """
    content = _content(folder / OVERRIDES_FILE, "put it back, or delete it and give all of the run's words again")
    return content.split("\n")[:-1] if content else []  # a word may hold other ends of lines (U+2028)


def refuse_lost_overrides(folder: Path) -> None:
    """Raise ValueError if a run has begun and what it was started with is not there any more."""
    path = folder / OVERRIDES_FILE
    if (folder / CONFIG_FILE).exists() and not path.exists():
        raise ValueError(
            f"{path} is missing, with which the run was started: put it back, or give all of the run's words again "
            f"({CONFIG_FILE} has every value)"
        )


def write_config(folder: Path, values: Mapping[str, Any]) -> None:
    """Write the resolved configuration, plain values only; a resume replaces that of the attempt before."""
    write_whole(folder / CONFIG_FILE, yaml.safe_dump(dict(values), sort_keys=False))


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration; empty where the run recorded none.

    Raises:
        ValueError: The file is damaged, or cannot be read.
    """
    return _read(folder / CONFIG_FILE, yaml.safe_load)


def write_summary(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the facts that hold for the whole run: sizes, corpus, versions, device."""
    write_json(folder / SUMMARY_FILE, facts)


def read_summary(folder: Path) -> dict[str, Any]:
    """The facts of ``write_summary``; empty where the run recorded none.

    Raises:
        ValueError: The file is damaged, or cannot be read.
    """
    return _read(folder / SUMMARY_FILE, json.loads)


_WRITTEN_ANEW = "delete it, and the next start of the run writes it anew"


def _content(path: Path, way_out: str) -> str | None:
    """Text of a file of ours, None if it is not there.

    Raises:
        ValueError: It is damaged, or cannot be read.
    """
    try:
        content = path.read_bytes().decode()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: damaged: {one_line(error)}; {way_out}") from error
    if "\0" in content:
        raise ValueError(f"{path}: damaged: it has bytes that are zero; {way_out}")
    return content


def _read(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    content = _content(path, _WRITTEN_ANEW)
    if content is None:
        return {}
    try:
        values = parse(content)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: damaged: {one_line(error)}; {_WRITTEN_ANEW}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: damaged: it holds no names and values; {_WRITTEN_ANEW}")
    return values


def write_sick_step(folder: Path, step: int, facts: Mapping[str, Any]) -> None:
    """Write down which rows a step had whose loss or gradient was not finite."""
    path = sick_step_file(folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, facts)


def processor() -> str:
    """Its model where Linux tells it: times compare between equal ones only."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "cpu"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes; liger-kernel's where it is installed."""
    packages = ("moe_pretrain", "torch", "deepspeed", "transformers", "datasets")
    found = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    with contextlib.suppress(PackageNotFoundError):
        found["liger-kernel"] = version("liger-kernel")
    return found


def router_file_hash(file: str | None) -> str | None:
    """Hash of the user's own router file, whose path says nothing of what is in it; None for a shipped scheme."""
    return None if file is None else xxhash.xxh3_64_hexdigest(Path(file).read_bytes())


def program_hash() -> str:
    """Hash of the files of python of this package: equal for equal programs, wherever they lie."""
    root = Path(__file__).parents[1]
    digest = xxhash.xxh3_64()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def commit() -> str | None:
    """Commit of the checkout that the package runs from, ``+changes`` if files differ from it; None without one."""
    file = Path(__file__).resolve()

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(file.parent), *words],
                capture_output=True,
                encoding="utf-8",
                errors="replace",  # names of files may be in another
                timeout=_GIT_SECONDS,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An environment inside somebody's repository is not a checkout of this one: there git does not know the file.
    if git("ls-files", "--error-unmatch", file.name) is None or (head := git("rev-parse", "HEAD")) is None:
        return None
    return head + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
