"""The root configuration: what Hydra composes, turned into frozen dataclasses or one line of complaint.

Values live in ``configs/*.yaml``; names, types, constraints and documentation live in the dataclasses beside the code
that reads them. Every value must be in a YAML file and every YAML key must be a field, so neither can go stale.
"""

import dataclasses
import difflib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from moe_pretrain.batching import BatchConfig
from moe_pretrain.budget import BudgetConfig
from moe_pretrain.checkpoint.config import CheckpointConfig
from moe_pretrain.data import (
    CorpusConfig,
    DataConfig,
    HubCorpusConfig,
    MixtureConfig,
    StreamingConfig,
    TokenizerConfig,
    TokensCorpusConfig,
)
from moe_pretrain.engine.deepspeed_config import EngineConfig
from moe_pretrain.engine.optimizer import OptimizerConfig, ScheduleConfig
from moe_pretrain.faults import FaultConfig
from moe_pretrain.metrics.sinks import MetricsConfig
from moe_pretrain.model.decoder import ModelConfig
from moe_pretrain.model.matching import match
from moe_pretrain.model.size import ModelSize, model_size
from moe_pretrain.moe import ShippedRouterConfig, check_gate
from moe_pretrain.moe.routers.dense import DenseConfig
from moe_pretrain.parallel.mesh import ParallelConfig
from moe_pretrain.spikes import SpikeConfig

ROOT_CONFIG = "pretrain"
RENAMED = {"batch.total_tokens": "budget.tokens"}
"""Fields by their names in earlier releases."""


class ConfigError(ValueError):
    """The configuration is wrong; one line naming the field, the value and the constraint."""


def _check_folder_name(field: str, name: str) -> None:
    if not name or name in (".", "..") or "/" in name:
        raise ValueError(f"{field}={name!r} must be a folder name without '/'")


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives.

    Attributes:
        name: Name of the run's folder. The same name again resumes the run.
        output_dir: Folder of all runs.
        cache_dir: Folder of tokenised corpora, shared by runs.
        prepare_workers: Processes that tokenise, or threads of the one process that tokenises a stream; None for one on
            each core. Shards do not depend on it.
    """

    name: str
    output_dir: str
    cache_dir: str
    prepare_workers: int | None

    def __post_init__(self) -> None:
        if self.prepare_workers is not None and self.prepare_workers < 1:
            raise ValueError(f"run.prepare_workers={self.prepare_workers} must be at least 1, or null for every core")
        _check_folder_name("run.name", self.name)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.output_dir) / self.name


@dataclass(frozen=True)
class SweepConfig:
    """How ``train --multirun`` runs its jobs: one for each combination of the values that overrides list.

    Attributes:
        name: Name of the sweep's folder in ``run.output_dir``; the same name again goes on with that sweep, or adds to
            it. None for one made of what is swept and a hash of the command.
        parallel: Jobs that run side by side on this machine, each with its share of the cores and GPUs.
        retry: Which jobs that have ended without a result are started again by the same command: those that ``failed``,
            ``all``, diverged ones too, or ``none``. Those that were stopped or killed always go on.
    """

    name: str | None
    parallel: int
    retry: Literal["none", "failed", "all"]

    def __post_init__(self) -> None:
        if self.parallel < 1:
            raise ValueError(f"sweep.parallel={self.parallel} must be at least 1")
        if self.name is not None:
            _check_folder_name("sweep.name", self.name)


@dataclass(frozen=True)
class PackingConfig:
    """How documents share a row.

    Attributes:
        method: ``concatenate`` cuts the stream of documents into rows and wastes nothing; ``best_fit`` keeps each
            document that fits into a row whole and pads the rows. Validation rows are always ``concatenate``, so that
            their loss compares.
        isolate_documents: Documents of a row do not attend to each other, and the step from one document to the next is
            not a target.
        reset_positions: Positions start again at each document; False counts them through the row.
    """

    method: Literal["concatenate", "best_fit"]
    isolate_documents: bool
    reset_positions: bool


@dataclass(frozen=True)
class EvaluationConfig:
    """Validation during training.

    Attributes:
        every_steps: Steps between validations; one is always made at the end.
        max_rows: Rows of each validation set that are read, over all ranks.
        sets: Further corpora by name, of which nothing is trained on, logged as ``validation/NAME/loss``. A choice of
            the group ``data`` fills one in: ``+data@evaluation.sets.code=files evaluation.sets.code.paths=[a.jsonl]``.
    """

    every_steps: int
    max_rows: int
    sets: dict[str, Annotated[CorpusConfig, pydantic.Field(discriminator="source")]]

    def __post_init__(self) -> None:
        for name in self.sets:
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"evaluation.sets: name {name!r} must be of letters, digits, - and _")
        for name in ("every_steps", "max_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"evaluation.{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. Constraints between parts are checked here.

    Attributes:
        seed: Seed of the weights, of the order of the data and of routing noise, in [0, 2**31).
        router_file: A python file with a routing scheme of the user's own, which takes the place of ``router=NAME``;
            None for the shipped ones. See ``load_router_file``.
    """

    seed: int
    router_file: str | None
    run: RunConfig
    sweep: SweepConfig
    model: ModelConfig
    router: Annotated[ShippedRouterConfig, pydantic.Field(discriminator="name")]
    data: Annotated[DataConfig, pydantic.Field(discriminator="source")]
    streaming: StreamingConfig
    tokenizer: TokenizerConfig
    packing: PackingConfig
    budget: BudgetConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    schedule: Annotated[ScheduleConfig, pydantic.Field(discriminator="name")]
    engine: EngineConfig
    spike: SpikeConfig
    parallel: ParallelConfig
    checkpoint: CheckpointConfig
    evaluation: EvaluationConfig
    metrics: MetricsConfig
    fault: FaultConfig

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed={self.seed} must be in [0, 2**31)")
        if not isinstance(self.router, DenseConfig):
            self.router.check_num_experts(self.model.moe.num_experts)
            check_gate(self.model.moe, self.router, self.model.hidden_size)
        sources = self.data.sources if isinstance(self.data, MixtureConfig) else {"": self.data}
        if self.tokenizer.kind == "train" and any(isinstance(one, TokensCorpusConfig) for one in sources.values()):
            raise ValueError(
                "tokenizer.kind=train must be pretrained with data=tokens: name the tokenizer that made the tokens, "
                "tokenizer=pretrained tokenizer.path=..."
            )
        if isinstance(self.data, MixtureConfig):
            self.data.check_steps(self.num_steps)
            if self.spike.rewind and self.data.when_exhausted != "repeat":
                raise ValueError(
                    f"spike.rewind=true must be false with data.when_exhausted={self.data.when_exhausted}: rows left "
                    "out would move the end of the run"
                )
            for name in self.data.sources.keys() & self.evaluation.sets.keys():
                raise ValueError(f"evaluation.sets.{name} must have another name than data.sources.{name}")
        if self.streaming.applies_to(self.data):
            if self.packing.method != "concatenate":
                raise ValueError(
                    f"packing.method={self.packing.method} must be concatenate for data that is streamed, or "
                    "streaming.mode=never"
                )
            if isinstance(self.data, HubCorpusConfig) and self.data.max_tokens is not None:
                raise ValueError(
                    f"data.max_tokens={self.data.max_tokens} must be null for data that is streamed, or "
                    "streaming.mode=never"
                )
        if self.tokenizer.kind == "train" and self.tokenizer.vocab_size > self.model.vocab_size:
            raise ValueError(
                f"tokenizer.vocab_size={self.tokenizer.vocab_size} must be at most "
                f"model.vocab_size={self.model.vocab_size}"
            )

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run; with ``budget.flops`` at the scheme's expected number of experts per token."""
        # Only a budget of FLOPs needs them, and they take a model without storage to count.
        flops = 0.0 if self.budget.flops is None else model_size(self.model, self.router).training_flops_per_token
        return self.budget.planned_steps(self.batch.global_batch_tokens, flops)

    @property
    def num_tokens(self) -> int:
        """Tokens that the run needs, as ``num_steps``; the budget's own number of tokens if it is one of tokens."""
        return self.budget.tokens or self.num_steps * self.batch.global_batch_tokens


def config_folder() -> Path:
    """The YAML files: inside an installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


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


def compose_values(overrides: Sequence[str]) -> dict[str, Any]:
    """The composed values as plain dictionaries, interpolations resolved."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_folder().resolve()), version_base="1.3"):
            composed = compose(ROOT_CONFIG, overrides=list(overrides))
            values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, overrides)) from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def validate(values: Mapping[str, Any], router: type[Any] | None = None) -> Config:
    """Turn composed values into dataclasses.

    Args:
        values: What the YAML files and overrides come to.
        router: The class of the ``router`` part when it is the user's own, from ``load_router_file``.

    Raises:
        ConfigError: Something is wrong; the first complaint, in one line.
    """
    root: type[Config] = Config
    variants = {"router", "data", "schedule"}
    if router is not None:
        root = dataclasses.make_dataclass("Config", [("router", router)], bases=(Config,), frozen=True)
        variants.remove("router")
    try:
        config = pydantic.TypeAdapter(root).validate_python(dict(values))
    except pydantic.ValidationError as error:
        raise ConfigError(_first_complaint(error, variants)) from error
    _refuse_unknown(config, values, "")
    return config


def to_values(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain values, for the run folder."""
    return dataclasses.asdict(config)


def _first_complaint(error: pydantic.ValidationError, variants: set[str]) -> str:
    first = error.errors()[0]
    # In a union, pydantic's location names the variant behind the field; the user's path does not.
    location = [str(part) for part in first["loc"]]
    if len(location) > 1 and location[0] in variants:
        del location[1]
    is_named_corpus = location[:2] in (["evaluation", "sets"], ["data", "sources"]) and len(location) > 3
    if is_named_corpus:
        del location[3]
    if first["type"] == "value_error":
        text = str(first["ctx"]["error"])
        # A corpus calls itself data, wherever it stands.
        return f"{'.'.join(location[:3])}.{text.removeprefix('data.')}" if is_named_corpus else text
    path = ".".join(location)
    if first["type"] == "missing":
        return f"{path} is missing: it must be given"
    return f"{path}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _refuse_unknown(part: Any, values: Any, path: str) -> None:
    """Raise if ``values`` has a key that is not a field of the dataclass ``part``, or of one inside it."""
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
    choices = []
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        folder = config_folder() / key.partition("@")[0]
        if key and folder.is_dir():
            names = {path.stem for path in folder.glob("*.yaml")}
            if value not in names:
                return f"{key}={value} is not a choice{_suggest(value, names)}"
            choices.append(override)
    fields = _fields_of(choices)
    for override in overrides:
        key = override.partition("=")[0]
        if override in choices or override.startswith(("+", "~")) or not key:
            continue
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


def _fields_of(choices: Sequence[str]) -> Any:
    """The composed fields of what is chosen from the groups, whatever values are set or missing."""
    with initialize_config_dir(str(config_folder().resolve()), version_base="1.3"):
        try:
            composed = compose(ROOT_CONFIG, overrides=list(choices))
        except (HydraException, OmegaConfBaseException):  # put at a place that does not exist
            composed = compose(ROOT_CONFIG)
    return OmegaConf.to_container(composed)
