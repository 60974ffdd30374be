"""Data of a run from its configuration: corpus, validation sets and loader, and the lines about them at the start."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moe_pretrain import data
from moe_pretrain.config.preflight import RunPlan
from moe_pretrain.config.schema import Config, ConfigError
from moe_pretrain.parallel.mesh import Mesh
from moe_pretrain.schedule.batch_plan import BatchPlan
from moe_pretrain.schedule.budget import BudgetMeter

Corpora = tuple[data.TrainingCorpus, dict[str, data.ShardReader]]


@dataclass(frozen=True)
class RunData:
    """Data of a run on one rank, and how long it and the budget last.

    Attributes:
        corpus: Corpus that is trained on.
        evaluation_sets: Sets that are logged by name beside the corpus's own validation.
        loader: Micro-batches of this rank.
        meter: Budget meter: FLOPs and seconds spent; ends the run when the budget is spent or the data ends.
        validation_text: Size and baseline of the text that each of the corpus's own sets is validated on; empty on
            ranks other than the first, which says it.
    """

    corpus: data.TrainingCorpus
    evaluation_sets: dict[str, data.ShardReader]
    loader: data.TrainLoader
    meter: BudgetMeter
    validation_text: dict[str, data.ValidationText]

    @property
    def unigram_cross_entropy(self) -> float:
        """The line that the validation loss has to beat, nats per token: a mixture's sources by their shares."""
        return sum(self.corpus.shares[name] * text.unigram_cross_entropy for name, text in self.validation_text.items())


def open_run_data(config: Config, plan: RunPlan, corpora: Corpora, mesh: Mesh) -> RunData:
    """The loader over prepared corpora, and the meter that knows where they end.

    Raises:
        ConfigError: The model's vocabulary is too small, or a mixture that stops ends before the first step.
    """
    corpus, sets = corpora
    if corpus.tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} must be at least the tokenizer's {corpus.tokenizer.vocab_size}"
        )
    batches = plan.batches
    loader = train_loader(config, batches, corpus, mesh.rank, mesh.world_size)
    limit = steps_until_exhausted(loader) if corpus.stops_when_exhausted else None
    meter = BudgetMeter(config.budget, batches.tokens_per_step, plan.size.training_flops_per_token, limit)
    return RunData(corpus, sets, loader, meter, _examine_validation(config, corpus) if mesh.is_main else {})


def train_loader(
    config: Config, batches: BatchPlan, corpus: data.TrainingCorpus, rank: int = 0, world_size: int = 1
) -> data.TrainLoader:
    """Loader of one rank over the documents that are trained on."""
    packing = config.packing
    return data.TrainLoader(
        corpus.train,
        config.model.sequence_length,
        batches.rows_per_step,
        batches.micro_batch_size,
        rank,
        world_size,
        config.seed,
        packing.isolate_documents,
        method=packing.method,
        reset_positions=packing.reset_positions,
    )


def _examine_validation(config: Config, corpus: data.TrainingCorpus) -> dict[str, data.ValidationText]:
    counts, packing = corpus.train_token_counts(), config.packing
    return {
        name: data.examine_validation(
            reader,
            counts[name],
            config.model.sequence_length,
            config.evaluation.max_rows,
            packing.isolate_documents,
        )
        for name, reader in corpus.validation_sets().items()
    }


def prepare_corpora(config: Config, say: Callable[[str], None], is_first: bool = True, number: int = 0) -> Corpora:
    """The corpus that is trained on, and by name the sets that are logged beside its validation.

    Those are the held-out documents of each source of a mixture, and ``evaluation.sets``.

    Args:
        config: Configuration of the run.
        say: Called with lines for the user.
        is_first: Whether this is the first rank, which writes what is streamed.
        number: Number that all ranks of this run have in common, and no other run.

    Raises:
        ValueError: A corpus cannot be used, or is shorter than a row.
    """
    cache, workers = Path(config.run.cache_dir), config.run.prepare_workers
    corpus: data.TrainingCorpus
    if isinstance(config.data, data.MixtureConfig):
        corpus = data.prepare_mixture(config.data, config.tokenizer, cache, _run_length(config), workers, say)
    elif config.streaming.applies_to(config.data):
        threads = workers or len(os.sched_getaffinity(0))
        corpus = data.open_stream(
            config.data, config.tokenizer, config.streaming, cache, config.run.name, is_first, number, threads, say
        )
    else:
        corpus = data.prepare_corpus(config.data, config.tokenizer, cache, config.num_tokens, workers, say)
    sets = {
        name: data.prepare_evaluation_set(
            name, source, corpus, config.tokenizer, cache, _evaluation_tokens(config), workers, say
        )
        for name, source in config.evaluation.sets.items()
    }
    return _with_long_enough_sets(config, corpus, sets)


def check_corpora(config: Config) -> Corpora:
    """The result of an earlier ``prepare_corpora``, every checksum compared.

    Raises:
        ValueError: A part is not prepared, or a shard is damaged; the line names it.
    """
    cache = Path(config.run.cache_dir)
    corpus: data.TrainingCorpus
    if isinstance(config.data, data.MixtureConfig):
        corpus = data.check_mixture(config.data, config.tokenizer, cache, _run_length(config))
    elif config.streaming.applies_to(config.data):
        raise ValueError(
            "prepare --check is for corpora that are prepared whole (streaming.mode=never): the shards of a stream are "
            "checked whenever a run opens them"
        )
    else:
        corpus = data.check_prepared(config.data, config.tokenizer, cache, config.num_tokens)
    sets = {
        name: data.check_evaluation_set(name, source, corpus, config.tokenizer, cache, _evaluation_tokens(config))
        for name, source in config.evaluation.sets.items()
    }
    return _with_long_enough_sets(config, corpus, sets)


def _run_length(config: Config) -> data.RunLength:
    rows_per_step = config.batch.global_batch_tokens // config.model.sequence_length
    return data.RunLength(config.num_steps, rows_per_step, config.model.sequence_length)


def _evaluation_tokens(config: Config) -> int:
    return config.evaluation.max_rows * config.model.sequence_length + 1


def _with_long_enough_sets(config: Config, corpus: data.TrainingCorpus, sets: dict[str, data.ShardReader]) -> Corpora:
    """Refuse a validation set that is shorter than one row; those of a mixture's sources are put first."""
    sets = {name: source.validation for name, source in corpus.sources.items()} | sets
    for reader in sets.values():
        data.count_rows(reader, config.model.sequence_length)
    return corpus, sets


def steps_until_exhausted(loader: data.TrainLoader) -> int | None:
    """Steps before the first that needs a source of a mixture for the second time; None if that never comes.

    Raises:
        ConfigError: There is no whole step before that.
    """
    steps = loader.exhaustion_steps()
    if not steps:
        return None
    first = min(steps, key=lambda name: (steps[name], name))
    if not steps[first]:
        raise ConfigError(f"data.when_exhausted=stop: data.sources.{first} has not even enough rows for the first step")
    return steps[first]


def describe_corpus(run: RunData, plan: RunPlan, config: Config) -> list[str]:
    """Lines about the corpus, how often it is read, of a mixture also when which source runs out, and validation."""
    corpus, loader, sources = run.corpus, run.loader, run.corpus.sources
    num_steps, rows_per_step = plan.batches.num_steps, plan.batches.rows_per_step
    epochs = f"; {num_steps * rows_per_step / loader.num_rows:.2f} epochs" if loader.num_rows and not sources else ""
    waste = f"; packing leaves {loader.waste:.2%} of the positions empty" if loader.waste else ""
    lines = [f"corpus: {corpus.describe_size()}{epochs}{waste}"]
    exhaustion = loader.exhaustion_steps()
    for name, use in loader.source_use(num_steps).items():
        source, ends = sources[name], exhaustion.get(name, num_steps)
        line = (
            f"  {name}: {source.train.num_tokens:,} training and {source.validation.num_tokens:,} validation tokens, "
            f"{use.rows / (num_steps * rows_per_step):.2%} of the rows, {use.epochs:.2f} epochs"
        )
        if ends < num_steps:
            line += f"; runs out in step {ends + 1} and begins again in a new order"
        elif ends == num_steps and corpus.stops_when_exhausted and name in exhaustion:
            line += f"; would run out in step {ends + 1}: the run ends after step {ends}"
        lines.append(line + source.describe_duplicates())
    for name, text in run.validation_text.items():
        where = f" on {name}" if sources else ""
        lines.append(f"validation{where}: {text.describe(config.evaluation.max_rows, config.model.sequence_length)}")
    return lines
