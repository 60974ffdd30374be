"""Tasks of the harness: its own by name, and local ones from a task file (YAML) with data beside it."""

import contextlib
import difflib
import glob
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.tasks.manager import TaskDict

from moe_pretrain.config.schema import ConfigError
from moe_pretrain.inference.harness.extra import check_tasks, is_task_file
from moe_pretrain.system.words import one_line

_FEW_SHOT_SEED = 1234
"""The harness's own: the same examples in every evaluation."""


def load_tasks(field: str, words: Sequence[str], num_fewshot: int | None = None) -> TaskDict:
    """Load tasks with their data.

    Files that a task file names (``dataset_kwargs.data_files``, ``dataset_path``) are looked for beside it. A group may
    name tasks of files beside its own. The network is asked only for data of the harness's own tasks that is not in
    the cache of ``datasets``.

    Args:
        field: Option or field that names them.
        words: Task files and names of tasks, groups and tags of the harness.
        num_fewshot: Examples before each question; None for what each task says. As in the harness, a task that says 0
            keeps it.

    Raises:
        ConfigError: One of them is unknown, has no data or is no task.
    """
    check_tasks(field, words)
    with quiet():
        manager = TaskManager(include_defaults=not all(map(is_task_file, words)))
        names = [_add_file(manager, field, word) if is_task_file(word) else word for word in words]
        for word, name in zip(words, names, strict=True):
            if name not in manager.task_index:
                close = difflib.get_close_matches(name, manager.all_tasks, 3)
                like = f"; there are {', '.join(close)}" if close else ""
                raise ConfigError(f"{field}={word} must be a task of the harness or a task file{like}")
        found = _loaded(manager, field, dict(zip(names, words, strict=True)))
    for task in found["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (own != 0 and num_fewshot is not None):
            task.set_config("num_fewshot", num_fewshot or 0)
    seed_examples(found)
    return found


def seed_examples(tasks: TaskDict) -> None:
    """Have every task draw the same examples again."""
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(_FEW_SHOT_SEED)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without progress bars and retries of the network on the screen, and without counting downloads there."""
    hub = logging.getLogger("huggingface_hub")
    counts, level = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, hub.level
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    hub.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        hub.setLevel(level)


def _loaded(manager: TaskManager, field: str, words: Mapping[str, str]) -> TaskDict:
    """All of them; ``words`` are those by which each name was asked for."""
    found = TaskDict(tasks={}, groups={}, group_map={})
    for name, word in words.items():
        try:
            own = manager.load([name])
        except Exception as error:  # of templates, functions and data of anybody
            raise ConfigError(f"{field}={word} cannot be loaded: {type(error).__name__}: {one_line(error)}") from error
        found["tasks"] |= own["tasks"]
        found["groups"] |= own.get("groups", {})
        found["group_map"] |= own.get("group_map", {})
    return found


def _add_file(manager: TaskManager, field: str, word: str) -> str:
    """Add the task or group of a file, and for a group the tasks beside it; its name."""
    try:
        entry = _entry(Path(word))
    except ConfigError as error:
        raise ConfigError(f"{field}={word}: {error}") from error.__cause__
    if entry.kind == Kind.GROUP:
        for file in sorted(Path(word).parent.glob("*.y*ml")):
            with contextlib.suppress(ConfigError):  # it is another kind of file, or nobody's business
                beside = _entry(file)
                manager.task_index[beside.name] = beside
    manager.task_index[entry.name] = entry
    return entry.name


def _entry(file: Path) -> Entry:
    """The harness's entry of a task file, whose data lies where it can be found from anywhere.

    Raises:
        ConfigError: It is no task file, or data is missing.
    """
    try:
        entry = TaskIndex.entry_from_path(file)
        values = load_yaml(file)
    except Exception as error:
        raise ConfigError(f"no task file can be read: {one_line(error)}") from error
    if entry is None:
        raise ConfigError("a task file must have a key task or group that names it")
    name = str(values["group"] if entry.kind == Kind.GROUP else entry.name)  # the harness calls a group by its tasks
    return replace(entry, name=name, yaml_path=None, cfg=_with_places(values, file.resolve().parent))


def _with_places(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The values of a task file with the files that they name looked for in ``folder``.

    Raises:
        ConfigError: One is not there.
    """
    found = dict(values)
    if (path := found.get("dataset_path")) and (folder / str(path)).is_dir():
        found["dataset_path"] = str(folder / str(path))
    options = dict(found.get("dataset_kwargs") or {})
    for name in ("data_files", "data_dir"):
        if options.get(name) is not None:
            options[name] = _placed(options[name], folder, f"dataset_kwargs.{name}")
    if options:
        found["dataset_kwargs"] = options
    return found


def _placed(value: Any, folder: Path, field: str) -> Any:
    if isinstance(value, dict):
        return {key: _placed(inner, folder, field) for key, inner in value.items()}
    if isinstance(value, list):
        return [_placed(inner, folder, field) for inner in value]
    place = folder / str(value)  # one that begins with / stays where it is
    if "://" in str(value):
        return value
    if not place.exists() and not glob.glob(str(place), recursive=True):
        raise ConfigError(f"{field}={value} must be a file that exists, beside the task file")
    return str(place)
