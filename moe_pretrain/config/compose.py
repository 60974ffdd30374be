"""YAML files and overrides to plain values, or one line of complaint.

Outside ``sweep/`` the only file that knows Hydra.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from moe_pretrain.config.earlier_releases import RENAMED
from moe_pretrain.config.layer_choices import layer_choices, settle_layers, words_of_choice
from moe_pretrain.config.schema import ConfigError
from moe_pretrain.config.validate import suggest

ROOT_CONFIG = "pretrain"
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
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {' '.join(str(error).split())}") from error
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
        if "=" not in override and not override.startswith("~"):
            return f"{override} has no value: an override is FIELD=VALUE or GROUP=CHOICE"
        if (mended := _mended(override)) is not None:
            return f"{override}: Hydra cannot read it, quote the text: '{mended}'"
    chosen = [word for word in overrides if word.startswith(_SEARCH_PATH)]
    groups = choices(chosen)
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key.partition("@")[0] in groups:
            names = set(groups[key.partition("@")[0]])
            if value not in names:
                return f"{key}={value} is not a choice{suggest(value, names)}"
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
                return f"{override}: {part!r} is not a field of {where}{suggest(part, names)}"
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
