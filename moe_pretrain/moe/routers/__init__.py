"""One file per routing scheme: its configuration, which builds it and states its cost, and its module.

A scheme is found by being here: a file of this folder that defines a ``RouterConfig`` with a ``name``. Its values are a
YAML file in ``configs/router``; nothing lists it.
"""

import importlib
import pkgutil
import typing
from collections.abc import Iterator, Mapping
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Literal, Union

from moe_pretrain.moe.routers.config import RouterConfig


def discover(package: ModuleType) -> Mapping[str, type[RouterConfig]]:
    """Name -> configuration of every scheme in the modules of ``package``, by name.

    Raises:
        TypeError: Two schemes have the same name.
    """
    found: dict[str, type[RouterConfig]] = {}
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for scheme in _schemes_of(module):
            name = _name_of(scheme)
            if name in found:
                first = found[name]
                raise TypeError(
                    f"{first.__module__}.{first.__name__} and {scheme.__module__}.{scheme.__name__} are both "
                    f"called {name!r}: a scheme needs a name of its own"
                )
            found[name] = scheme
    return MappingProxyType(dict(sorted(found.items())))


def _schemes_of(module: ModuleType) -> Iterator[type[RouterConfig]]:
    for value in vars(module).values():
        # What a file has imported from another is that file's; what has no name of its own is a base.
        is_own = isinstance(value, type) and value.__module__ == module.__name__
        if is_own and issubclass(value, RouterConfig) and "name" in vars(value).get("__annotations__", {}):
            if typing.get_origin(typing.get_type_hints(value)["name"]) is Literal:
                yield value


def _name_of(scheme: type[RouterConfig]) -> str:
    (name,) = typing.get_args(typing.get_type_hints(scheme)["name"])
    return name


SHIPPED: Mapping[str, type[RouterConfig]] = discover(importlib.import_module(__name__))
"""Every shipped scheme's configuration by name."""

if TYPE_CHECKING:
    ShippedRouterConfig = RouterConfig
else:
    # A union, so that pydantic picks the class by ``name`` and complains of the fields of that one alone.
    ShippedRouterConfig = Union[tuple(SHIPPED.values())]  # noqa: UP007
