"""A user's own routing scheme, loaded from a python file."""

import dataclasses
import importlib.util
import sys
import typing
from pathlib import Path
from typing import Annotated, Any

import pydantic

from moe_pretrain.config.compose import config_folder
from moe_pretrain.config.schema import ConfigError
from moe_pretrain.moe.routers import SHIPPED, RouterConfig


def load_router_file(file: str) -> type[Any]:
    """The configuration class of a routing scheme in a user's own file, anywhere outside the package.

    The file defines one frozen dataclass with a default for every field, ``name: Literal["..."]`` among them, that
    has what ``moe.RouterConfig`` asks of every scheme, whether or not it derives from it; its ``build`` returns the
    scheme's ``Router``. A field of a shipped class that the file repeats to give it a default keeps its range.

    Returns:
        The file's class, on top of ``RouterConfig`` if it is not, with these ranges.

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
        # A member of RouterConfig of the same name would pass for the default.
        has_no_default = field.default is dataclasses.MISSING or isinstance(field.default, property)
        if has_no_default and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}.{field.name} must have a default")
    if not issubclass(router, RouterConfig):
        # Same name and module, so that messages and annotations find the file's own.
        router = type(router.__name__, (router, RouterConfig), {"__module__": module_name})
    # build must be the file's own: a shipped scheme's would train that scheme under this one's name.
    shipped_builds = {RouterConfig.build, *(scheme.build for scheme in SHIPPED.values())}
    missing = {*router.__abstractmethods__, *(["build"] if router.build in shipped_builds else [])}
    for name in sorted(missing):
        raise ConfigError(f"{where} must have {name}; see RouterConfig in moe_pretrain/moe/routers/config.py")
    shipped = {*SHIPPED, *(path.stem for path in (config_folder() / "router").glob("*.yaml"))}
    if router.__dataclass_fields__["name"].default in shipped:
        raise ConfigError(f"{where}.name must not be that of a shipped scheme: {', '.join(sorted(shipped))}")
    return _with_ranges(router)


def _with_ranges(router: type[Any]) -> type[Any]:
    """``router``, its fields as narrow as those of the shipped classes below it, their defaults included.

    A dataclass takes the last annotation of a field alone: with ``top_k: int = 2`` the ``PositiveInt`` would be lost.
    """
    plain: dict[str, Any] = {}
    ranged: dict[str, Any] = {}
    for shipped in reversed([base for base in router.__mro__ if base.__module__ != router.__module__]):
        plain |= typing.get_type_hints(shipped)
        ranged |= typing.get_type_hints(shipped, include_extras=True)
    own = typing.get_type_hints(router, include_extras=True)
    fields = [
        (
            field.name,
            Annotated[ranged[field.name], pydantic.Field(validate_default=True)],
            dataclasses.field(default=field.default, default_factory=field.default_factory),
        )
        for field in dataclasses.fields(router)
        if field.name in plain and own[field.name] == plain[field.name] != ranged[field.name]
    ]
    if not fields:
        return router
    names = {"__module__": router.__module__, "__doc__": router.__doc__}
    return dataclasses.make_dataclass(
        router.__name__, fields, bases=(router,), namespace=names, frozen=True, kw_only=True
    )
