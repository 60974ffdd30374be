"""Words of ``router.layers``: choices of the group ``router``, as YAML files have them, made into settings."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moe_pretrain.config.schema import ConfigError
from moe_pretrain.moe.by_layer import in_place
from moe_pretrain.run_folder.record import flatten

_CHOICE = "router"
"""Key of a choice among settings that differ from it."""


def layer_choices(settings: Any) -> dict[str, str]:
    """Choices that ``router.layers`` names, by layers, from the ``router`` part of composed values.

    Raises:
        ConfigError: One is no word that could be a choice.
    """
    if not isinstance(settings, dict) or settings.get("name") != "by_layer":
        return {}
    layers, found = settings["layers"], dict[str, str]()
    if not isinstance(layers, dict):
        raise ConfigError(f"router.layers={layers} must name layers: 'router.layers={{0-1:hash,rest:loss_free}}'")
    for key, value in layers.items():
        if isinstance(value, dict) and "name" in value:
            continue  # settings in full, as a run records them
        choice = value.get(_CHOICE) if isinstance(value, dict) else value
        # No path: a run's folder must not lead to files elsewhere.
        if not isinstance(choice, str) or not re.fullmatch(r"[\w-]+", choice) or choice == "by_layer":
            raise ConfigError(
                f"router.layers.{key}={value} must be a choice of router with one scheme for all its layers, or such a "
                "choice and what differs: {router:top_k,top_k:4}"
            )
        found[str(key)] = choice
    return found


def words_of_choice(choice: str, overrides: Sequence[str]) -> list[str]:
    """Overrides that compose a choice alone, with the folders of the user's own that ``overrides`` add."""
    return [*(word for word in overrides if word.startswith("hydra.searchpath=")), f"router={choice}"]


def settle_layers(
    values: dict[str, Any], overrides: Sequence[str], composed: Callable[[Sequence[str]], dict[str, Any]]
) -> None:
    """Put the settings of every choice that ``router.layers`` names in its place.

    Args:
        values: Composed values; changed.
        overrides: What they were composed of.
        composed: From overrides to their composed values.

    Raises:
        ConfigError: There is no such choice, or one asks for a model that this is not.
    """
    router = values.get("router", {})
    chosen = layer_choices(router)
    if router.get("name") != "by_layer":
        return
    layers = router["layers"] = {str(key): value for key, value in router["layers"].items()}
    for key in layers.keys() - chosen.keys():
        layers[key].pop(_CHOICE, None)  # full settings were put over a choice
    for key, choice in chosen.items():
        place, words = f"router.layers.{key}", words_of_choice(choice, overrides)
        try:
            own = composed(words)
        except ConfigError as error:
            raise ConfigError(in_place(str(error), place)) from error
        _check_model(f"{place}={choice}", own["model"], composed(words[:-1])["model"], values["model"], overrides)
        changes = layers[key]
        changes = (
            {name: value for name, value in changes.items() if name != _CHOICE} if isinstance(changes, dict) else {}
        )
        layers[key] = own["router"] | changes


def _check_model(
    word: str,
    asked: Mapping[str, Any],
    usual: Mapping[str, Any],
    have: Mapping[str, Any],
    overrides: Sequence[str],
) -> None:
    """Refuse a choice that says something of the model too, which all layers share, unless the model is such a one."""
    named = [override.lstrip("+~").partition("=")[0] for override in overrides]
    before, now = flatten({"model": usual}), flatten({"model": have})
    for path, value in flatten({"model": asked}).items():
        of_experts = path.startswith("model.moe.experts.")
        if (path in before and before[path] == value) or now.get(path) == value:
            continue
        if any(path == key or path.startswith(f"{key}.") for key in named) or (of_experts and "experts" in named):
            continue
        way_out = f"experts={value}" if path == "model.moe.experts.name" else f"{path}={value}"
        raise ConfigError(f"{word} comes with {path}={value}, which all layers share: give {way_out}, or another")
