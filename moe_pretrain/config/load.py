"""The configuration that a command's overrides ask for: routers of the user's own, and matched budgets."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_pretrain.config.compose import compose_values
from moe_pretrain.config.earlier_releases import completed
from moe_pretrain.config.match_budget import match
from moe_pretrain.config.router_file import load_router_file
from moe_pretrain.config.schema import Config, ConfigError
from moe_pretrain.config.validate import validate
from moe_pretrain.model.size import ModelSize, model_size
from moe_pretrain.run_folder.paths import CONFIG_FILE, no_run
from moe_pretrain.run_folder.provenance import read_config


def load(overrides: Sequence[str] = ()) -> Config:
    """Compose the YAML files with Hydra ``overrides``, validate, and solve ``budget.match`` if it is set.

    ``router_file=PATH`` puts a scheme of the user's own in the place of the ``router`` group: its fields start from
    the defaults of its dataclass, and ``router.FIELD=VALUE`` overrides them as ever.

    Raises:
        ConfigError: A typo, a wrong type, another variant's field, or a value out of range.
    """
    file = _router_file(overrides)
    words = in_hydras_words(overrides)
    values = compose_values(words)
    if file is None:
        return _matched(validate(values), values, overrides)
    others = [word for word in overrides if not word.startswith("router_file=")]
    return _matched(validate({**values, "router_file": file}, load_router_file(file)), values, others)


def _router_file(overrides: Sequence[str]) -> str | None:
    """The file of the user's own router, if the overrides name one."""
    file = next((word.partition("=")[2] for word in reversed(overrides) if word.startswith("router_file=")), None)
    return None if file == "null" else file


def router_file_defaults(overrides: Sequence[str]) -> dict[str, Any]:
    """Defaults of the scheme in a user's own file; none without one."""
    file = _router_file(overrides)
    if file is None:
        return {}
    scheme = load_router_file(file)()
    return {field.name: getattr(scheme, field.name) for field in dataclasses.fields(scheme)}


def in_hydras_words(overrides: Sequence[str]) -> list[str]:
    """The overrides as Hydra can compose them, which knows no fields of a router in a user's own file.

    Raises:
        ConfigError: A router is chosen beside that of the file, or the file is wrong.
    """
    file = _router_file(overrides)
    if file is None:
        return list(overrides)
    chosen = [word for word in overrides if word.startswith("router=")]
    if chosen:
        raise ConfigError(f"{chosen[0]} and router_file={file} are two schemes: give one of them")
    name = load_router_file(file).__dataclass_fields__["name"].default
    others = [word for word in overrides if not word.startswith("router_file=")]
    return [
        "~router",
        f"+router.name={name}",
        f"++hydra.runtime.choices.router={name}",  # for `run.name`
        *(f"++{word}" if word.startswith("router.") else word for word in others),
    ]


def _matched(config: Config, values: Mapping[str, Any], overrides: Sequence[str]) -> Config:
    """``config``, and where ``budget.match`` is set with what it asks for solved.

    Raises:
        ConfigError: The reference is wrong, or nothing satisfies it.
    """
    budget = config.budget
    if budget.matched is not None:
        raise ConfigError("budget.matched must be null: budget.match fills it in")
    if budget.match is None:
        return config
    try:
        reference = _reference_size(values, overrides, budget.reference)
        model, router, matched = match(config.model, config.router, reference, budget)
        # A class of its own holds a user's own router, so the new one is made of the same.
        return dataclasses.replace(
            config, model=model, router=router, budget=dataclasses.replace(budget, matched=matched)
        )
    except ConfigError as error:
        raise ConfigError(f"budget.reference: {error}") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _reference_size(values: Mapping[str, Any], overrides: Sequence[str], words: Sequence[str]) -> ModelSize:
    """Size of the model of ``values`` with the overrides ``words`` of it, and their router."""
    of_model = [word for word in words if word.startswith("model")]
    of_router = [word for word in words if word.startswith("router")]
    own = [word for word in overrides if not word.lstrip("+~").startswith("router")]
    # Composed anew, without this run's router, whose word may say something of the model too: the factorised gate.
    chosen = [word for word in of_router if word.startswith("router=")]
    model = compose_values([*own, *of_model, *chosen])["model"]
    folders = [word for word in overrides if word.startswith("hydra.searchpath=")]
    router = compose_values([*folders, *of_router])["router"]
    config = validate({**values, "model": model, "router": router, "budget": {**values["budget"], "match": None}})
    return model_size(config.model, config.router)


def _moved(run: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Place of a run that was copied or moved; the cache moves along unless it was put elsewhere."""
    here = folder if folder.name not in ("", "..") else folder.resolve()
    cache = f"{here.parent}/cache" if run["cache_dir"] == f"{run['output_dir']}/cache" else run["cache_dir"]
    return {**run, "output_dir": str(here.parent), "name": here.name, "cache_dir": cache}


def read_run(folder: Path, choose_router_file: Callable[[str | None], str | None]) -> Config:
    """The configuration that the run in ``folder`` was last started with, at the place where it lies now.

    Args:
        folder: The run's folder.
        choose_router_file: From the file of its own router that the run names, to the one that may be imported.

    Raises:
        ConfigError: There is none, or it is no configuration.
    """
    recorded = read_config(folder)
    if not recorded:
        raise ConfigError(no_run(folder, CONFIG_FILE))
    try:
        values = completed(recorded)
        values["run"] = _moved(values["run"], folder)
        file = values["router_file"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder / CONFIG_FILE}: damaged: {type(error).__name__} {error}") from error
    file = choose_router_file(file)
    values["router_file"] = file
    try:
        config = validate(values, None if file is None else load_router_file(file))
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG_FILE} is of another release, or was changed by hand: {error}") from error
    return config
