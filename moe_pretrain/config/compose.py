"""YAML files and overrides to plain values, and those to a ``Config``, or one line of complaint.

Outside ``sweep/`` the only file that knows Hydra.
"""

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pydantic
from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from moe_pretrain.config.layer_choices import layer_choices, settle_layers, words_of_choice
from moe_pretrain.config.schema import Config, ConfigError
from moe_pretrain.model.parameter_groups import GROUP_NAMES
from moe_pretrain.moe.by_layer import in_place

ROOT_CONFIG = "pretrain"
RENAMED = {"batch.total_tokens": "budget.tokens"}
"""Fields by their names in earlier releases."""
BEFORE = {
    "run.report": True,
    "model.init": "normal",
    "model.gate_init": "paper",
    "model.head_size": None,
    "model.qk_norm": "none",
    "model.moe.experts": {"name": "swiglu"},
    "model.moe.combine": {"name": "sum"},
    "model.moe.shared_expert_gate": False,
    "model.moe.activation": "swiglu",
    "model.moe.activation_limit": None,
    "model.moe.latent_size": None,
    "model.moe.latent_norm": False,
    "model.mup_base_width": 128,
    "model.mup_base_layers": 4,
    "optimizer.name": "adamw",
    "optimizer.groups": {name: {"lr_scale": 1.0} for name in GROUP_NAMES},
    "tokenizer.end_of_document": None,
    "tokenizer.max_unknown": 1.0,
    "metrics.collapse_ratio": 1.25,
    "evaluation.tasks": {"names": [], "every_steps": None, "max_documents": None},
}
"""Fields that earlier releases did not have, with what they did."""
BEFORE_OF_CORPORA: dict[str, dict[str, Any]] = {
    "builtin": {"near_duplicates": "ignore"},
    "files": {
        "validation_split": "hash",
        "validation_paths": None,
        "near_duplicates": "ignore",
        "sha256": None,
        "invalid_text": "fail",
        "content_check": "sampled",
    },
    "hub": {"near_duplicates": "ignore", "invalid_utf8": "fail", "invalid_text": "fail"},
    "tokens": {
        "megatron_documents": "index",
        "validation_split": "hash",
        "validation_paths": None,
        "near_duplicates": "ignore",
        "content_check": "sampled",
    },
}
"""The same of a corpus by its source, wherever it stands: as data, in a mixture, as an evaluation set."""
_IGNORED_COST = {
    "k_means",
    "hash",
    "relu",
    "expert_choice",
    "expert_threshold",
    "sinkhorn",
    "thor",
    "random",
    "uniform",
}
"""Routers that did not heed ``model.moe.experts.balance=cost``, which stood there by default, before releases that know
``parallel.overlap_exchange``: such a run evened routes, or nothing."""
_WITHOUT_EFFECT = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.output_subdir", "hydra.job.chdir")
_SEARCH_PATH = "hydra.searchpath="


def config_folder() -> Path:
    """The YAML files: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def folder_override(folder: Path) -> str:
    """The override that has Hydra look for groups and choices in a folder of the user's own too.

    As an override it reaches workers, the jobs of a sweep and a resumed run like any other.

    Raises:
        ConfigError: There is no such folder, or a file in it has the name of a shipped one, which would win.
    """
    word = f"{_SEARCH_PATH}[{quoted(f'file://{folder.resolve()}')}]"
    _check_folders([word], f"--config-dir={folder}")
    return word


def quoted(text: str) -> str:
    """A text as the right side of an override, taken as it is."""
    return QuotedString(text, Quote.single).with_quotes()


def setting(field: str, value: Any) -> str:
    """The override that gives a field a plain value, whether the composed values have the field or not."""
    return f"++{field}={_word(value)}"


def _word(value: Any) -> str:
    """A plain value as the right side of an override."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_word, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_word(inner)}' for key, inner in value.items())}}}"
    return repr(value)


def _own_folders(overrides: Sequence[str]) -> list[Path]:
    """Folders of the user's own that the last ``hydra.searchpath`` in ``overrides`` names."""
    words = [word for word in overrides if word.startswith(_SEARCH_PATH)]
    try:
        places = OverridesParser.create().parse_overrides(words[-1:])[0].value() if words else list[str]()
    except HydraException as error:
        raise ConfigError(f"{words[-1]}: {' '.join(str(error).split())}") from error
    if not isinstance(places, list):
        raise ConfigError(f"{words[-1]} must be a list of folders")
    texts = [str(place.text if isinstance(place, QuotedString) else place) for place in places]
    return [Path(text.removeprefix("file://")) for text in texts if not text.startswith("pkg://")]


def _check_folders(overrides: Sequence[str], name: str = "hydra.searchpath") -> None:
    """Raise if a folder of the user's own would be passed over in silence, as a whole or in part."""
    for folder in _own_folders(overrides):
        if not folder.is_dir():
            raise ConfigError(f"{name}: {folder} must be a folder that exists; name it anew with --config-dir DIR")
        for file in sorted(folder.rglob("*.yaml")):
            if (config_folder() / (relative := file.relative_to(folder))).exists():
                raise ConfigError(f"{name}: {relative} has the name of a shipped file, which would win; rename it")


def choices(overrides: Sequence[str] = ()) -> dict[str, list[str]]:
    """Groups and their choices: the shipped ones, and those of the folders that ``overrides`` add."""
    found: dict[str, set[str]] = {}
    for folder in (config_folder(), *_own_folders(overrides)):
        for file in folder.glob("*/*.yaml"):
            if file.stem != "base" and file.parent.name != "hydra":
                found.setdefault(file.parent.name, set()).add(file.stem)
    return {group: sorted(names) for group, names in sorted(found.items())}


def show_config(overrides: Sequence[str], kind: str, resolve: bool) -> None:
    """Print the composed configuration as YAML, as Hydra's ``--cfg`` does.

    Args:
        overrides: In Hydra's words.
        kind: ``job``, ``hydra`` or ``all``.
        resolve: Print values instead of interpolations.
    """
    with _hydra(overrides) as hydra:
        hydra.show_cfg(ROOT_CONFIG, list(overrides), kind, None, resolve)


def show_info(overrides: Sequence[str], kind: str) -> None:
    """Print how the configuration is composed, as Hydra's ``--info`` does."""
    with _hydra(overrides) as hydra:
        hydra.show_info(kind, ROOT_CONFIG, list(overrides))


@contextmanager
def _hydra(overrides: Sequence[str]) -> Iterator[Hydra]:
    """Hydra with our YAML files; what it complains of is a ``ConfigError`` of one line."""
    _check_folders(overrides)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_folder().resolve()), version_base="1.3"):
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None
            yield hydra
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, overrides)) from error


_RESOLVER = re.compile(r"\$\{\s*(?!hydra\s*:)[\w.]+\s*:")
"""An interpolation that runs something, ``${oc.env:HOME}``; not one that names another field, and not Hydra's own."""


def refuse_resolvers(overrides: Sequence[str], given: Sequence[str]) -> None:
    """Raise if a YAML file that the overrides of a run's folder lead to asks for more than other fields' values.

    Args:
        overrides: In Hydra's words.
        given: Those of them that stand on the command line, which may ask for anything.

    Raises:
        ConfigError: The first such value.
    """
    composed = [list(overrides)]
    for words in composed:
        with _hydra(words):
            values: Any = OmegaConf.to_container(compose(ROOT_CONFIG, overrides=words), resolve=False)
        for path, value in _texts(values, ""):
            if _RESOLVER.search(value) and not any(value in word for word in given):
                raise ConfigError(f"{path}={value} is not evaluated for a run's folder: give it on the command line")
        if len(composed) == 1:
            composed += [words_of_choice(choice, overrides) for choice in layer_choices(values["router"]).values()]


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, path)
    elif isinstance(value, str):
        yield path, value


def compose_values(overrides: Sequence[str]) -> dict[str, Any]:
    """The composed values as plain dictionaries, interpolations resolved.

    Raises:
        ConfigError: They cannot be composed, or a word says where Hydra is to put what is not its to put.
    """
    for word in overrides:
        if word.lstrip("+~").startswith(_WITHOUT_EFFECT):
            raise ConfigError(f"{word} has no effect: a run's folder is run.output_dir/run.name, a sweep's sweep.name")
    with _hydra(overrides), _own_part_kept():
        composed = compose(ROOT_CONFIG, overrides=list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(composed)
        with open_dict(composed):
            del composed["hydra"]
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    found = {str(key): value for key, value in values.items()}
    settle_layers(found, overrides, lambda words: deepcopy(_composed_choice(tuple(words))))
    return found


@functools.lru_cache(maxsize=64)
def _composed_choice(words: tuple[str, ...]) -> dict[str, Any]:
    return compose_values(words)


@contextmanager
def _own_part_kept() -> Iterator[None]:
    """Hydra's own part of the configuration, which ``${hydra:...}`` reads, is afterwards what it was: a sweep's."""
    kept = HydraConfig.instance().cfg
    try:
        yield
    finally:
        HydraConfig.instance().cfg = kept


def completed(values: dict[str, Any]) -> dict[str, Any]:
    """Values that a run has recorded, with the fields that did not exist then, and renamed ones by their new names."""
    for old, new in RENAMED.items():
        part, _, field = old.partition(".")
        if field in values.get(part, {}):
            part_now, _, field_now = new.partition(".")
            values[part_now].setdefault(field_now, values[part].pop(field))
    say_what_was_balanced(values)
    for name, value in BEFORE.items():
        *parts, field = name.split(".")
        part_of: dict[str, Any] = values
        for each in parts:
            part_of = part_of[each]
        part_of.setdefault(field, deepcopy(value))
    for _, corpus in corpora_of(values):
        for field, value in BEFORE_OF_CORPORA.get(corpus["source"], {}).items():
            corpus.setdefault(field, value)
    return values


def say_what_was_balanced(values: dict[str, Any]) -> None:
    """Put ``balance=routes`` where a run of before had experts of several widths and nothing that heeded their cost."""
    router, experts = values["router"], values["model"]["moe"].get("experts", {})
    if "overlap_exchange" in values["parallel"] or experts.get("balance") != "cost":
        return
    if router["name"] in _IGNORED_COST or router.get("load_balance_weight") == 0:
        experts["balance"] = "routes"


def corpora_of(values: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every corpus in resolved values, with its place: what is trained on, sources of a mixture, evaluation sets."""
    corpus = values["data"]
    trained_on = {"data": corpus}
    if corpus["source"] == "mixture":
        trained_on = {f"data.sources.{name}": source for name, source in corpus["sources"].items()}
    sets = {f"evaluation.sets.{name}": source for name, source in values["evaluation"]["sets"].items()}
    return list((trained_on | sets).items())


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
                raise ConfigError(f"{path}{key}={value!r} is not a field of {kind}{_suggest(key, fields)}")
            _refuse_unknown(getattr(part, key), value, f"{path}{key}.")
    elif isinstance(values, bool) and not isinstance(part, bool):
        raise ConfigError(f"{path.removesuffix('.')}={str(values).lower()} must be a number")


def _mended(override: str) -> str | None:
    """The override with its texts quoted, if Hydra can read it only so: a = of its own, a letter beyond ASCII."""

    def is_read(word: str) -> bool:
        try:
            OverridesParser.create().parse_override(word)
        except HydraException:
            return False
        return True

    if is_read(override):
        return None
    key, _, value = override.partition("=")
    texts = value[1:-1].split(",") if value.startswith("[") and value.endswith("]") else [value]
    quoted = ",".join(text if text.startswith(("'", '"')) else f'"{text}"' for text in texts)
    mended = f"{key}=[{quoted}]" if value.startswith("[") else f"{key}={quoted}"
    return mended if is_read(mended) else None


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
    for override in overrides:
        if (mended := _mended(override)) is not None:
            return f"{override}: Hydra cannot read it, quote the text: '{mended}'"
    chosen = [word for word in overrides if word.startswith(_SEARCH_PATH)]
    groups = choices(chosen)
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key.partition("@")[0] in groups:
            names = set(groups[key.partition("@")[0]])
            if value not in names:
                return f"{key}={value} is not a choice{_suggest(value, names)}"
            chosen.append(override)
    if missing := re.search(r"Could not find 'budget/(\S+)'", str(error)):
        size = missing[1]
        return (
            f"model={size} has no budget of its own: write budget/{size}.yaml beside model/{size}.yaml, or budget=tiny"
        )
    fields = _fields_of(chosen)
    for override in overrides:
        key = override.partition("=")[0]
        if override in chosen or override.startswith(("+", "~")) or not key:
            continue
        if key.startswith("router.layers.") and fields.get("router", {}).get("name") == "by_layer":
            return _explain_layers(override, key.split(".")[2], fields["router"]["layers"])
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


def _explain_layers(override: str, key: str, layers: Any) -> str:
    """Way out for an override of settings that layers do not have as yet."""
    if isinstance(layers, dict) and isinstance({str(name): value for name, value in layers.items()}.get(key), dict):
        return f"{override}: these layers have their choice's own value so far; write +{override}"
    return f"{override}: no layers have such a key; give all: 'router.layers={{0-1:{{router:hash,top_k:4}},...}}'"


def _fields_of(chosen: Sequence[str]) -> Any:
    """The composed fields of what is chosen from the groups, whatever values are set or missing."""
    with initialize_config_dir(str(config_folder().resolve()), version_base="1.3"):
        try:
            composed = compose(ROOT_CONFIG, overrides=list(chosen))
        except (HydraException, OmegaConfBaseException):  # put at a place that does not exist
            composed = compose(ROOT_CONFIG)
    return OmegaConf.to_container(composed)
