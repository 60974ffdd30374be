"""A run that exists, under a release with other defaults: overrides that keep what it was started with."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from moe_pretrain.config.compose import BEFORE_OF_CORPORA, choices, completed, compose_values, corpora_of, setting
from moe_pretrain.config.load import in_hydras_words, router_file_defaults
from moe_pretrain.config.schema import ConfigError

_SOLVED = {
    "expert_width": ("model.moe.expert_hidden_size", "model.moe.shared_expert_hidden_size"),
    "num_experts": ("model.moe.num_experts",),
    "top_k": ("router.top_k",),
}
"""Fields that ``budget.match`` fills in: the same question is asked again, and its answer must not change it."""
_MISSING, _NOT_GIVEN = object(), object()


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
    then = completed(deepcopy(dict(recorded)))
    now = _composed(words)
    base = now if list(earlier) == list(words) else _composed(earlier)
    _refuse_other_text(recorded, now)
    named = {path for word in words if word not in earlier for path in _named(word, words)}
    solved = _solved(then)
    found = []
    for path, value in _leaves(now).items():
        recorded_value, before = _at(then, path), _at(base, path)
        if recorded_value is _MISSING or before is _MISSING or before != value or recorded_value == value:
            continue
        if path[0] in ("run", "sweep", "fault") or any(path[: len(name)] == name for name in named):
            continue
        if ".".join(path) not in solved:
            found.append(setting(".".join(path), recorded_value))
    return found


def _refuse_other_text(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse a built-in corpus from before tables were left out of it, which is when its fields grew."""
    goes_on = {place for place, corpus in corpora_of(now) if corpus.get("source") == "builtin"}
    for place, corpus in corpora_of(recorded):
        if corpus["source"] == "builtin" and "near_duplicates" not in corpus and place in goes_on:
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
    if isinstance(value, dict) and value:
        return {at: leaf for key, inner in value.items() for at, leaf in _leaves(inner, (*path, str(key))).items()}
    return {path: value}


def _at(values: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        if not isinstance(values, dict) or key not in values:
            return _MISSING
        values = values[key]
    return values
