"""The router of each layer, of a model whose layers have several schemes."""

from copy import copy
from typing import Any

ROUTERS: dict[str, Any] = {}  # name of a scheme to its class; in a modelling file those that its model has


class Router:
    """Makes a layer's router, by the settings that ``config.json`` has for it."""

    float32_parts = sorted({part for kind in ROUTERS.values() for part in kind.float32_parts})

    def __new__(cls, config: Any, layer: int) -> Any:
        """The router of ``layer``, which reads a configuration that is its own."""
        own = copy(config)
        own.router = config.router["of_layer"][layer]
        return ROUTERS[own.router["name"]](own, layer)
