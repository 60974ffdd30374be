"""The configuration that a command's overrides ask for: routers of the user's own, and matched budgets."""

import dataclasses
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_pretrain.config.compose import compose_values, config_folder, validate
from moe_pretrain.config.match_budget import match
from moe_pretrain.config.schema import Config, ConfigError
from moe_pretrain.model.size import ModelSize, model_size


def load(overrides: Sequence[str] = ()) -> Config:
    """Compose the YAML files with Hydra ``overrides``, validate, and solve ``budget.match`` if it is set.

    ``router_file=PATH`` puts a scheme of the user's own in the place of the ``router`` group: its fields start from
    the defaults of its dataclass, and ``router.FIELD=VALUE`` overrides them as ever.

    Raises:
        ConfigError: A typo, a wrong type, another variant's field, or a value out of range.
    """
    file = next((word.partition("=")[2] for word in reversed(overrides) if word.startswith("router_file=")), None)
    if file in (None, "null"):
        values = compose_values(overrides)
        return _matched(validate(values), values, overrides)
    assert file is not None
    chosen = [word for word in overrides if word.startswith("router=")]
    if chosen:
        raise ConfigError(f"{chosen[0]} and router_file={file} are two schemes: give one of them")
    router = load_router_file(file)
    name = router.__dataclass_fields__["name"].default
    others = [word for word in overrides if not word.startswith("router_file=")]
    words = [f"++{word}" if word.startswith("router.") else word for word in others]
    values = compose_values(["~router", f"+router.name={name}", *words])
    return _matched(validate({**values, "router_file": file}, router), values, others)


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
    model = compose_values([*own, *of_model])["model"] if of_model else values["model"]
    router = compose_values(of_router)["router"]
    config = validate({**values, "model": model, "router": router, "budget": {**values["budget"], "match": None}})
    return model_size(config.model, config.router)


def load_router_file(file: str) -> type[Any]:
    """The configuration class of a routing scheme in a user's own file, anywhere outside the package.

    The file defines one frozen dataclass with a default for every field, ``name: Literal["..."]`` among them, that
    satisfies ``moe.RouterFileConfig``; its ``build`` returns the scheme's ``Router``.

    Raises:
        ConfigError: The file cannot be imported, or does not define that.
    """
    module_name = f"router_file_{Path(file).stem}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None or not Path(file).is_file():
        raise ConfigError(f"router_file={file} must be a python file that exists")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # where dataclasses and pydantic look up the file's annotations
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"router_file={file}: {type(error).__name__}: {error}") from error
    own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module_name]
    routers = [value for value in own if "name" in getattr(value, "__dataclass_fields__", {})]
    if len(routers) != 1:
        found = ", ".join(value.__name__ for value in routers) or "none"
        raise ConfigError(f"router_file={file} must define one dataclass with a field 'name'; it has {found}")
    (router,) = routers
    where = f"router_file={file}: {router.__name__}"
    for field in dataclasses.fields(router):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}.{field.name} must have a default")
    for name in ("build", "check_num_experts", "mean_experts_per_token"):
        if not hasattr(router, name):
            raise ConfigError(f"{where} must have {name}; see RouterFileConfig in moe_pretrain/moe/__init__.py")
    shipped = {path.stem for path in (config_folder() / "router").glob("*.yaml")}
    if router.__dataclass_fields__["name"].default in shipped:
        raise ConfigError(f"{where}.name must not be that of a shipped scheme: {', '.join(sorted(shipped))}")
    return router
