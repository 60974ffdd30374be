"""A run that exists: overrides that keep what it was started with, under a release with other defaults too.

A run's folder may come from anybody and lie anywhere: it is the run where it lies, and nothing that it names is
executed or evaluated unless the command line names it again.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from moe_pretrain.config.compose import choices, compose_values, quoted, refuse_resolvers, setting
from moe_pretrain.config.earlier_releases import BEFORE_OF_CORPORA, RENAMED, completed, corpora_of
from moe_pretrain.config.load import in_hydras_words, router_file_defaults
from moe_pretrain.config.schema import ConfigError

_SOLVED = {
    "expert_width": ("model.moe.expert_hidden_size", "model.moe.shared_expert_hidden_size"),
    "num_experts": ("model.moe.num_experts",),
    "top_k": ("router.top_k",),
}
"""Fields that ``budget.match`` fills in: the same question is asked again, and its answer must not change it."""
_MISSING, _NOT_GIVEN = object(), object()


_SEARCH_PATH = "hydra.searchpath"
_LAYERS = ("router", "layers")
"""Schemes by layer go on as a whole: Hydra has no words for a field below a key such as ``0-1``."""


def earlier_words(folder: Path, recorded: Sequence[str], given: Sequence[str]) -> list[str]:
    """Overrides by which a command goes on with the run in ``folder``: those that it records, then ``given`` ones.

    Args:
        folder: The run's folder, which is its ``run.output_dir`` and ``run.name`` whatever was recorded.
        recorded: Overrides that the run was started with, as its folder has them.
        given: Overrides of the command line; they win.

    Raises:
        ConfigError: A recorded one asks for what only the command line may ask for.
    """
    here = folder if folder.name not in ("", "..") else folder.resolve()
    place = {"run.output_dir": str(here.parent), "run.name": here.name}
    named = {_key(word): word for word in given}
    left = _left_behind(recorded, given)
    words: dict[str, str] = {}
    for word in recorded:
        key, equals, value = word.partition("=")
        if _key(word) not in place and word not in left:
            words[_key(word)] = f"{RENAMED.get(key, key)}{equals}{value}"
    refuse_strange_words([word for key, word in words.items() if key not in named], given, str(folder))
    here_words = {key: f"{key}={quoted(value)}" for key, value in place.items()}
    merged = list((here_words | words | named).values())
    if _SEARCH_PATH in words and _SEARCH_PATH not in named:
        refuse_resolvers(in_hydras_words(merged), given)
    return merged


def words_at_start(folder: Path, recorded: Sequence[str], given: Sequence[str]) -> list[str]:
    """Overrides that a run was started with, but for those that may not be looked at and that ``given`` replaces."""
    named = {_key(word) for word in given}
    own = [word for word in recorded if _key(word) not in named or not _strangeness(word)]
    place = [word for word in given if _key(word) in ("router_file", "run.output_dir", "run.name")]
    return earlier_words(folder, own, place)


def _left_behind(earlier: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Earlier overrides of fields in a group of which another choice is made now: they were fields of the other."""
    then = {key: value for key, _, value in (word.lstrip("+").partition("=") for word in earlier)}
    groups = [group for group in choices(overrides) if group not in ("budget", "experiment")]
    chosen = {key: value for key, _, value in (word.lstrip("+").partition("=") for word in overrides) if key in groups}
    anew = tuple(f"{group}." for group, value in chosen.items() if then.get(group) != value)
    return [word for word in earlier if word.lstrip("+~").startswith(anew)] if anew else []


def _key(word: str) -> str:
    return word.split("=")[0].lstrip("+")


def _strangeness(word: str) -> str:
    """Effect of a recorded override beside setting a value or naming a choice; empty for most."""
    key, _, value = word.partition("=")
    key = key.lstrip("+~")
    if key == "router_file" and value != "null":
        return "python that would be run"
    if key in ("evaluation.tasks.names", "evaluation.tasks") and any(end in value for end in (".yaml", ".yml", "/")):
        return "task files, whose templates and python would be run"
    is_folders = key == _SEARCH_PATH and "pkg://" not in value
    is_path = "/" in value and key.partition("@")[0] in choices()
    if "${" in word or is_path or (key.startswith("hydra") and not is_folders):
        return "which would be evaluated"
    return ""


def refuse_strange_words(recorded: Sequence[str], given: Sequence[str], where: str) -> None:
    """Raise unless recorded overrides, other than those that ``given`` repeats, only set values and name choices.

    Args:
        recorded: Overrides as a folder has them.
        given: Overrides of the command line.
        where: The folder, for the message.

    Raises:
        ConfigError: One would run python of its own choice, or evaluate an interpolation; how to allow it.
    """
    for word in recorded:
        if word not in given and (why := _strangeness(word)):
            raise ConfigError(f"{where} names {word}, {why}: if you trust it, give {word} on the command line too")


def allowed_router_file(recorded: str | None, given: Sequence[str], where: str) -> str | None:
    """The file of a run's own router, which the command line must name too: by its path, its name, or as the only one.

    Args:
        recorded: The file that the run names; None for a shipped router.
        given: Overrides ``router_file=PATH`` of the command line.
        where: The run's folder, for the message.

    Raises:
        ConfigError: None is named, or it is not clear which.
    """
    if recorded is None:
        return None
    files = [word.partition("=")[2] for word in given if _key(word) == "router_file"]
    for found in (
        [file for file in files if file == recorded],
        [file for file in files if Path(file).name == Path(recorded).name],
        files,
    ):
        if len(found) == 1:
            return found[0]
    refuse_strange_words([f"router_file={recorded}"], [], where)
    return None


def kept(earlier: Sequence[str], recorded: Mapping[str, Any], words: Sequence[str]) -> list[str]:
    """Overrides for the fields in which a run's record differs from what its overrides come to in this release.

    Defaults move between releases. A run keeps those of the day it was started; fields that its release did not have
    take the value of what was done then (``compose.BEFORE``). A field that the new command names is left to it, and so
    is one that follows from such a field.

    Args:
        earlier: Overrides that the run was started with.
        recorded: Its resolved configuration, as ``config.yaml`` or ``job.json`` has it.
        words: Overrides that it is to go on with, the earlier ones among them.

    Raises:
        ConfigError: A text of the run is another one in this release, or the overrides are wrong.
    """
    try:
        then = completed(deepcopy(dict(recorded)))
        solved, corpora = _solved(then), corpora_of(recorded)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(f"the run's recorded configuration is damaged: {type(error).__name__} {error}") from error
    now = _composed(words)
    base = now if list(earlier) == list(words) else _composed(earlier)
    _refuse_other_text(corpora, now)
    named = {path for word in words if word not in earlier for path in _named(word, words)}
    found = []
    for path, value in _leaves(now).items():
        recorded_value, before = _at(then, path), _at(base, path)
        if recorded_value is _MISSING or before is _MISSING or before != value or recorded_value == value:
            continue
        if (
            path[0] in ("run", "sweep", "fault", "router_file")
            or path == ("checkpoint", "resume")
            or any(path[: len(name)] == name for name in named)
        ):
            continue
        if ".".join(path) not in solved:
            found.append(setting(".".join(path), recorded_value))
    refuse_strange_words(found, [], "the run's recorded configuration")
    return found


def _refuse_other_text(corpora: Sequence[tuple[str, dict[str, Any]]], now: Mapping[str, Any]) -> None:
    """Refuse a built-in corpus from before tables were left out of it, which is when its fields grew."""
    goes_on = {place for place, corpus in corpora_of(now) if corpus.get("source") == "builtin"}
    for place, corpus in corpora:
        if corpus.get("source") == "builtin" and "near_duplicates" not in corpus and place in goes_on:
            way_out = "choose another run.name (of a sweep: sweep.name) to start anew"
            if place.startswith("evaluation."):
                way_out = f"leave the set out with '~{place}'"
            raise ConfigError(
                f"{place}: the built-in corpus is another text in this release, without its tables, than when this was "
                f"started; {way_out}, or go on with the release that started it"
            )


def _composed(words: Sequence[str]) -> dict[str, Any]:
    values = compose_values(in_hydras_words(words))
    values["router"] = {**router_file_defaults(words), **values["router"]}
    for _, corpus in corpora_of(values):  # one that was written out, with the fields of its day
        for field in BEFORE_OF_CORPORA.get(corpus.get("source", ""), {}):
            corpus.setdefault(field, _NOT_GIVEN)
    return values


def _named(word: str, words: Sequence[str]) -> list[tuple[str, ...]]:
    """Paths that an override sets, all that lies below them included."""
    key = word.partition("=")[0].lstrip("+~")
    group, _, package = key.partition("@")
    if group in choices(words):
        return [] if not package and group in ("budget", "experiment") else [tuple((package or group).split("."))]
    return [tuple(key.split("."))]


def _solved(values: Mapping[str, Any]) -> tuple[str, ...]:
    budget = values["budget"]
    return ("budget.matched", *_SOLVED[budget["solve"]]) if budget.get("match") else ()


def _leaves(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if isinstance(value, dict) and value and path != _LAYERS:
        return {at: leaf for key, inner in value.items() for at, leaf in _leaves(inner, (*path, str(key))).items()}
    return {path: value}


def _at(values: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        if not isinstance(values, dict) or key not in values:
            return _MISSING
        values = values[key]
    return values
