"""YAML files and overrides to plain values, and those to a ``Config``, or one line of complaint.

Outside ``sweep/`` the only file that knows Hydra.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from moe_pretrain.config.schema import Config, ConfigError

ROOT_CONFIG = "pretrain"
RENAMED = {"batch.total_tokens": "budget.tokens"}
"""Fields by their names in earlier releases."""
BEFORE = {"model.init": "normal", "model.gate_init": "paper", "optimizer.name": "adamw"}
"""Fields that earlier releases did not have, with what they did."""


def config_folder() -> Path:
    """The YAML files: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def compose_values(overrides: Sequence[str]) -> dict[str, Any]:
    """The composed values as plain dictionaries, interpolations resolved."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_folder().resolve()), version_base="1.3"):
            # With Hydra's own part, which knows the file that was chosen from each group: `run.name` is made of it.
            composed = compose(ROOT_CONFIG, overrides=list(overrides), return_hydra_config=True)
            return {str(key): _resolved(composed, key) for key in composed if key != "hydra"}
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, overrides)) from error


def _resolved(composed: DictConfig, key: Any) -> Any:
    value = composed[key]
    return OmegaConf.to_container(value, resolve=True, throw_on_missing=True) if OmegaConf.is_config(value) else value


def completed(values: dict[str, Any]) -> dict[str, Any]:
    """Values that a run has recorded, with the fields that did not exist then."""
    for name, value in BEFORE.items():
        *parts, field = name.split(".")
        part = values
        for each in parts:
            part = part[each]
        part.setdefault(field, value)
    return values


def validate(values: Mapping[str, Any], router: type[Any] | None = None) -> Config:
    """Turn composed values into dataclasses.

    Args:
        values: What the YAML files and overrides come to.
        router: The class of the ``router`` part when it is the user's own, from ``load_router_file``.

    Raises:
        ConfigError: Something is wrong; the first complaint, in one line.
    """
    root: type[Config] = Config
    variants = {"router", "data", "schedule", "optimizer"}
    if router is not None:
        root = dataclasses.make_dataclass("Config", [("router", router)], bases=(Config,), frozen=True)
        variants.remove("router")
    try:
        config = _validator(root)(dict(values))  # type: ignore[arg-type]  # a class is hashable
    except pydantic.ValidationError as error:
        raise ConfigError(_first_complaint(error, variants)) from error
    _refuse_unknown(config, values, "")
    return config


@functools.lru_cache(maxsize=8)  # a router file makes a class of its own
def _validator(root: Any) -> Callable[[dict[str, Any]], Any]:
    """What makes a ``root``; to make it takes longer than to use it."""
    return pydantic.TypeAdapter(root).validate_python


def _first_complaint(error: pydantic.ValidationError, variants: set[str]) -> str:
    first = error.errors()[0]
    # In a union, pydantic's location names the variant behind the field; the user's path does not.
    location = [str(part) for part in first["loc"]]
    if len(location) > 1 and location[0] in variants:
        del location[1]
    is_named_corpus = location[:2] in (["evaluation", "sets"], ["data", "sources"]) and len(location) > 3
    if is_named_corpus:
        del location[3]
    if first["type"] == "value_error":
        text = str(first["ctx"]["error"])
        # A corpus calls itself data, wherever it stands.
        return f"{'.'.join(location[:3])}.{text.removeprefix('data.')}" if is_named_corpus else text
    path = ".".join(location)
    if first["type"] == "missing":
        return f"{path} is missing: it must be given"
    if first["type"] == "union_tag_invalid":
        field = first["ctx"]["discriminator"].strip("'")
        return f"{path}.{field}={first['ctx']['tag']} must be one of {first['ctx']['expected_tags']}"
    if constraint := _constraint(first["type"], first.get("ctx", {})):
        return f"{path}={first['input']} must {constraint}"
    return f"{path}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _constraint(kind: str, bounds: Mapping[str, Any]) -> str | None:
    """A violated range in words; None if ``kind`` of pydantic's errors is about something else."""
    match kind, bounds:
        case "finite_number", _:
            return "be finite"
        case "greater_than", {"gt": 0 as bound}:  # of a whole number the bound is one too
            return "be at least 1" if isinstance(bound, int) else "be positive"
        case "greater_than_equal", {"ge": 0}:
            return "not be negative"
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    return next((f"be {words[bound]} {value:.10g}" for bound, value in bounds.items() if bound in words), None)


def _refuse_unknown(part: Any, values: Any, path: str) -> None:
    """Raise if ``values`` has a key that is not a field of the dataclass ``part``, or of one inside it.

    Also if it has ``true`` or ``false`` where a number was made of it.
    """
    if isinstance(part, dict):
        for name, member in part.items():
            _refuse_unknown(member, values[name], f"{path}{name}.")
    elif isinstance(part, tuple):
        for number, (member, value) in enumerate(zip(part, values, strict=True)):
            _refuse_unknown(member, value, f"{path}{number}.")
    elif dataclasses.is_dataclass(part):
        fields = {field.name for field in dataclasses.fields(part)}
        for key, value in values.items():
            if key not in fields:
                kind = type(part).__name__
                raise ConfigError(f"{path}{key}={value!r} is not a field of {kind}{_suggest(key, fields)}")
            _refuse_unknown(getattr(part, key), value, f"{path}{key}.")
    elif isinstance(values, bool) and not isinstance(part, bool):
        raise ConfigError(f"{path.removesuffix('.')}={str(values).lower()} must be a number")


def _suggest(word: str, known: Sequence[str] | set[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(known))}"


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    """One line out of Hydra's several, with the nearest name where a key or a choice is unknown."""
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is missing: it must be given"
    if "--multirun" in str(error):
        several = str(error).splitlines()[0].partition("'")[2].removesuffix("'")
        return f"{several} lists several values: --multirun makes a run for each; quote what is one text with a comma"
    for override in overrides:
        if (key := override.partition("=")[0]) in RENAMED:
            return f"{override}: {key} is called {RENAMED[key]}"
    choices = []
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        folder = config_folder() / key.partition("@")[0]
        if key and folder.is_dir():
            names = {path.stem for path in folder.glob("*.yaml")}
            if value not in names:
                return f"{key}={value} is not a choice{_suggest(value, names)}"
            choices.append(override)
    fields = _fields_of(choices)
    for override in overrides:
        key = override.partition("=")[0]
        if override in choices or override.startswith(("+", "~")) or not key:
            continue
        known = fields
        for depth, part in enumerate(parts := key.split(".")):
            if not isinstance(known, dict) or part not in known:
                where = ".".join(parts[:depth]) or "the configuration"
                if known == {}:  # names of the user's own
                    return f"{override}: {where} has no {part!r} yet; write +{override}"
                names = set(known) if isinstance(known, dict) else set()
                return f"{override}: {part!r} is not a field of {where}{_suggest(part, names)}"
            known = known[part]
    text = " ".join(str(error).split())
    return text.removesuffix(" Set the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace.")


def _fields_of(choices: Sequence[str]) -> Any:
    """The composed fields of what is chosen from the groups, whatever values are set or missing."""
    with initialize_config_dir(str(config_folder().resolve()), version_base="1.3"):
        try:
            composed = compose(ROOT_CONFIG, overrides=list(choices))
        except (HydraException, OmegaConfBaseException):  # put at a place that does not exist
            composed = compose(ROOT_CONFIG)
    return OmegaConf.to_container(composed)
