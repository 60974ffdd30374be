"""A user's own routing scheme, loaded from a python file."""

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

from moe_pretrain.config.compose import config_folder
from moe_pretrain.config.schema import ConfigError


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
