"""The root configuration: frozen dataclasses that hold everything that decides a run.

Values live in ``configs/*.yaml``; names, types, constraints and documentation live in the dataclasses beside the code
that reads them. Every value must be in a YAML file and every YAML key must be a field, so neither can go stale.
``config_loading`` makes a ``Config`` of them.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

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
from moe_pretrain.data.documents.config import has_own_split
from moe_pretrain.data.rows.packing import PackingConfig
from moe_pretrain.engine.deepspeed_config import EngineConfig
from moe_pretrain.engine.optimizers import OptimizerConfig
from moe_pretrain.metrics.writer import MetricsConfig
from moe_pretrain.model.decoder import ModelConfig
from moe_pretrain.model.size import ModelSize, model_size
from moe_pretrain.moe.build import check_combine, check_coupling, check_experts, check_gate, check_latent
from moe_pretrain.moe.by_layer import AnyRouterConfig
from moe_pretrain.parallel.config import ParallelConfig
from moe_pretrain.schedule.batch_plan import BatchConfig
from moe_pretrain.schedule.budget import BudgetConfig
from moe_pretrain.schedule.learning_rate import ScheduleConfig
from moe_pretrain.schedule.loss_spikes import SpikeConfig
from moe_pretrain.system.faults import FaultConfig


class ConfigError(ValueError):
    """The configuration is wrong; one line naming the field, the value and the constraint."""


def _check_folder_name(field: str, name: str) -> None:
    if not name or name in (".", "..") or "/" in name:
        raise ValueError(f"{field}={name!r} must be a folder name without '/'")


@dataclass(frozen=True)
class RunConfig:
    """Folder, name and seed of a run.

    Attributes:
        name: Name of the run's folder. The same name again resumes the run.
        output_dir: Folder of all runs.
        cache_dir: Folder of tokenised corpora, shared by runs.
        prepare_workers: Processes that tokenise, or threads of the one process that tokenises a stream; None for one on
            each core. Shards do not depend on it.
        report: Whether ``report.html`` is written when the run ends or stops, which takes seconds; the command
            ``report`` writes it at any time.
    """

    name: str
    output_dir: str
    cache_dir: str
    prepare_workers: pydantic.PositiveInt | None
    report: bool

    def __post_init__(self) -> None:
        _check_folder_name("run.name", self.name)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.output_dir) / self.name


@dataclass(frozen=True)
class SweepConfig:
    """Settings of ``train --multirun``: one job for each combination of the values that overrides list.

    Attributes:
        name: Name of the sweep's folder in ``run.output_dir``; the same name again goes on with that sweep, or adds to
            it. None for one made of what is swept and a hash of the command.
        parallel: Jobs that run side by side on this machine, each with its share of the cores and GPUs.
        retry: Which jobs that have ended without a result are started again by the same command: those that ``failed``,
            ``all``, diverged ones too, or ``none``. Those that were stopped or killed always go on.
    """

    name: str | None
    parallel: pydantic.PositiveInt
    retry: Literal["none", "failed", "all"]

    def __post_init__(self) -> None:
        if self.name is not None:
            _check_folder_name("sweep.name", self.name)


@dataclass(frozen=True)
class TasksConfig:
    """Tasks of lm-evaluation-harness during training, on all ranks; needs the extra ``evaluate``.

    Attributes:
        names: Task files, and names of the harness's own; none by default. See ``inference.harness.tasks``.
        every_steps: Steps between them; None for ``evaluation.every_steps``. They are always asked at the end.
        max_documents: Questions of each task that are asked, the first ones; None for all.
    """

    names: list[str]
    every_steps: pydantic.PositiveInt | None
    max_documents: pydantic.PositiveInt | None


@dataclass(frozen=True)
class EvaluationConfig:
    """Validation during training.

    Attributes:
        every_steps: Steps between validations; one is always made at the end.
        max_rows: Rows of each validation set that are read, over all ranks: drawn over the whole set, one from each of
            so many equal stretches, the same in every run; all of them where there are no more.
        sets: Further corpora by name, of which nothing is trained on, logged as ``validation/NAME/loss``. A choice of
            the group ``data`` fills one in: ``+data@evaluation.sets.code=files evaluation.sets.code.paths=[a.jsonl]``.
        tasks: Tasks whose results are logged as ``tasks/NAME/METRIC``.
    """

    every_steps: pydantic.PositiveInt
    max_rows: pydantic.PositiveInt
    sets: dict[str, Annotated[CorpusConfig, pydantic.Field(discriminator="source")]]
    tasks: TasksConfig

    def __post_init__(self) -> None:
        for name in self.sets:
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"evaluation.sets: name {name!r} must be of letters, digits, - and _")


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. Constraints between parts are checked here.

    Attributes:
        seed: Seed of the weights, of the order of the data and of routing noise, in [0, 2**31).
        router_file: A python file with a routing scheme of the user's own, which takes the place of ``router=NAME``;
            None for the shipped ones. See ``config_loading.load_router_file``.
    """

    __pydantic_config__ = pydantic.ConfigDict(allow_inf_nan=False)  # for all parts: they have none of their own

    seed: Annotated[int, pydantic.Field(ge=0, lt=2**31)]
    router_file: str | None
    run: RunConfig
    sweep: SweepConfig
    model: ModelConfig
    router: Annotated[AnyRouterConfig, pydantic.Field(discriminator="name")]
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
        self.router.check_layers(self.model.moe_layers, self.model.num_layers)
        check_experts(self.model.moe, self.router)
        self.router.check_sequence_length(self.model.sequence_length)
        if self.model.init == "mup" and (self.router.merges_experts or self.model.moe.experts.name == "matrix_product"):
            kind = f"router={self.router.name}" if self.router.merges_experts else "experts=matrix_product"
            raise ValueError(
                f"model.init=mup must be normal or width_aware with {kind}: its rules are of experts that have their "
                "matrices to themselves"
            )
        check_coupling(self.model.moe, self.router)
        check_latent(self.model.moe, self.router, self.model.hidden_size)
        check_gate(self.model.moe, self.router, self.model.hidden_size)
        check_combine(self.model.moe, self.router)
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
            if not isinstance(self.data, MixtureConfig) and has_own_split(self.data):
                raise ValueError(
                    "data.validation_paths and data.validation_split=end are for data that is not streamed, whose held-"
                    "out documents are those of the first shards: streaming.mode=never"
                )
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
        flops = 0.0 if self.budget.flops is None else self.size.training_flops_per_token
        return self.budget.planned_steps(self.batch.global_batch_tokens, flops)

    @property
    def size(self) -> ModelSize:
        """Parameters and FLOPs of the model, with those of the optimizer's updates over the tokens of a step."""
        size, update = model_size(self.model, self.router), self.optimizer.update_flops(self.model, self.router)
        return dataclasses.replace(size, update_flops_per_token=update / self.batch.global_batch_tokens)

    @property
    def num_tokens(self) -> int:
        """Tokens that the run needs, as ``num_steps``; the budget's own number of tokens if it is one of tokens."""
        return self.budget.tokens or self.num_steps * self.batch.global_batch_tokens


def to_values(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain values, for the run folder."""
    return dataclasses.asdict(config)
