"""Composed values to a ``Config``, or one line of complaint."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pydantic

from moe_pretrain.config.schema import Config, ConfigError
from moe_pretrain.moe.by_layer import in_place
from moe_pretrain.system.words import nearest


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
    """Validator of a ``root``; to make it takes longer than to use it."""
    return pydantic.TypeAdapter(root).validate_python


_ALTERNATIVE = re.compile(r"(constrained-)?(int|float|str)|literal\[.+\]")
"""Name that pydantic gives to one of several types of a field, at the end of the field's path."""


def _first_complaint(error: pydantic.ValidationError, variants: set[str]) -> str:
    first = error.errors()[0]
    # In a union, pydantic's location names the variant behind the field; the user's path does not.
    location = [str(part) for part in first["loc"]]
    if is_alternative := len(location) > 1 and _ALTERNATIVE.fullmatch(location[-1]):
        del location[-1]
    if len(location) > 1 and location[0] in variants:
        del location[1]
    if location[:3] in (["model", "moe", "combine"], ["model", "moe", "experts"]) and len(location) > 4:
        del location[3]
    is_named_corpus = location[:2] in (["evaluation", "sets"], ["data", "sources"]) and len(location) > 3
    of_layers = location[:2] == ["router", "layers"] and len(location) > 2
    if is_named_corpus or (of_layers and len(location) > 3):
        del location[3]
    if first["type"] == "value_error":
        text = str(first["ctx"]["error"])
        if of_layers:
            return in_place(text, ".".join(location[:3]))
        # A corpus calls itself data, wherever it stands.
        return f"{'.'.join(location[:3])}.{text.removeprefix('data.')}" if is_named_corpus else text
    path = ".".join(location)
    if first["type"] in ("tuple_type", "list_type") and isinstance(first["input"], str | int | float):
        return f"{path}={first['input']} must be a list: '{path}=[{first['input']}]'"
    if first["type"] == "missing":
        return f"{path} is missing: it must be given"
    if first["type"] == "union_tag_invalid":
        field = first["ctx"]["discriminator"].strip("'")
        return f"{path}.{field}={first['ctx']['tag']} must be one of {first['ctx']['expected_tags']}"
    if constraint := _constraint(first["type"], first.get("ctx", {})):
        return f"{path}={first['input']} must {constraint}"
    alternatives = [each["msg"] for each in error.errors() if is_alternative and each["loc"][:-1] == first["loc"][:-1]]
    said = " or ".join(message[0].lower() + message[1:] for message in alternatives or [first["msg"]])
    return f"{path}={first['input']!r}: {said}"


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
                raise ConfigError(f"{path}{key}={value!r} is not a field of {kind}{suggest(key, fields)}")
            _refuse_unknown(getattr(part, key), value, f"{path}{key}.")
    elif isinstance(values, bool) and not isinstance(part, bool):
        raise ConfigError(f"{path.removesuffix('.')}={str(values).lower()} must be a number")


def suggest(word: str, known: Sequence[str] | set[str]) -> str:
    """The known name nearest to an unknown ``word``, or all of them, as the end of a complaint."""
    near = nearest(word, known)
    return f"; did you mean {near}?" if near else f"; known: {', '.join(sorted(known))}"
