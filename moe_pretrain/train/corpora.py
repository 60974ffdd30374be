"""The data of a run from its configuration: corpora and validation sets, and what is said of them before it starts."""

import os
from collections.abc import Callable
from pathlib import Path

from moe_pretrain import data
from moe_pretrain.config.schema import Config, ConfigError
from moe_pretrain.schedule.batch_plan import BatchPlan

Corpus = data.TokenizedCorpus | data.TokenizedMixture | data.StreamedCorpus
Corpora = tuple[Corpus, dict[str, data.ShardReader]]


def prepare_corpora(config: Config, say: Callable[[str], None], is_first: bool = True, number: int = 0) -> Corpora:
    """The corpus that is trained on, and by name the sets that are logged beside its validation.

    Those are the held-out documents of each source of a mixture, and ``evaluation.sets``.

    Args:
        config: The run.
        say: Called with lines for the user.
        is_first: Whether this is the first rank, which writes what is streamed.
        number: The run's, for all its ranks.

    Raises:
        ValueError: A corpus cannot be used, or is shorter than a row.
    """
    cache, workers = Path(config.run.cache_dir), config.run.prepare_workers
    corpus: Corpus
    if isinstance(config.data, data.MixtureConfig):
        corpus = data.prepare_mixture(config.data, config.tokenizer, cache, _run_length(config), workers, say)
    elif config.streaming.applies_to(config.data):
        threads = workers or len(os.sched_getaffinity(0))
        corpus = data.open_stream(
            config.data, config.tokenizer, config.streaming, cache, config.run.name, is_first, number, threads, say
        )
    else:
        corpus = data.prepare(config.data, config.tokenizer, cache, config.num_tokens, workers, say)
    sets = {
        name: data.prepare_evaluation_set(
            name, source, corpus, config.tokenizer, cache, _evaluation_tokens(config), workers, say
        )
        for name, source in config.evaluation.sets.items()
    }
    return _with_long_enough_sets(config, corpus, sets)


def check_corpora(config: Config) -> Corpora:
    """What ``prepare_corpora`` has made, every checksum compared.

    Raises:
        ValueError: A part is not prepared, or a shard is damaged; the line names it.
    """
    cache = Path(config.run.cache_dir)
    corpus: Corpus
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


def _with_long_enough_sets(config: Config, corpus: Corpus, sets: dict[str, data.ShardReader]) -> Corpora:
    """Refuse a validation set that is shorter than one row; those of a mixture's sources are put first."""
    if isinstance(corpus, data.TokenizedMixture):
        sets = {name: source.validation for name, source in corpus.sources.items()} | sets
    for reader in sets.values():
        data.count_rows(reader, config.model.sequence_length)
    return corpus, sets


def steps_until_exhausted(config: data.DataConfig, loader: data.TrainLoader) -> int | None:
    """Steps before the first that needs a source of a mixture for the second time, if the mixture stops there.

    Raises:
        ConfigError: There is no whole step before that.
    """
    steps = loader.exhaustion_steps()
    if not isinstance(config, data.MixtureConfig) or config.when_exhausted == "repeat" or not steps:
        return None
    first = min(steps, key=lambda name: (steps[name], name))
    if not steps[first]:
        raise ConfigError(f"data.when_exhausted=stop: data.sources.{first} has not even enough rows for the first step")
    return steps[first]


def describe_corpus(corpus: Corpus, plan: BatchPlan, loader: data.TrainLoader, say: Callable[[str], None]) -> None:
    """What is trained on and how often, before it starts; of a mixture also when which source runs out."""
    entropy = f"unigram entropy {corpus.unigram_entropy:.3f} nats/token"
    waste = f"; packing leaves {loader.waste:.2%} of the positions empty" if loader.waste else ""
    if not isinstance(corpus, data.TokenizedMixture):
        epochs = f"; {plan.num_steps * plan.rows_per_step / loader.num_rows:.2f} epochs" if loader.num_rows else ""
        duplicates = corpus.describe_duplicates() if isinstance(corpus, data.TokenizedCorpus) else ""
        say(f"corpus: {corpus.describe_size()}, {entropy}{epochs}{waste}{duplicates}")
        return
    say(f"corpus: a mixture of {len(corpus.sources)} sources, {entropy}{waste}")
    exhaustion = loader.exhaustion_steps()
    for name, use in loader.source_use(plan.num_steps).items():
        source, ends = corpus.sources[name], exhaustion.get(name, plan.num_steps)
        line = (
            f"  {name}: {source.train.num_tokens:,} training and {source.validation.num_tokens:,} validation tokens, "
            f"{use.rows / (plan.num_steps * plan.rows_per_step):.2%} of the rows, {use.epochs:.2f} epochs"
        )
        if ends < plan.num_steps:
            line += f"; runs out in step {ends + 1} and begins again in a new order"
        elif ends == plan.num_steps and corpus.config.when_exhausted == "stop" and name in exhaustion:
            line += f"; would run out in step {ends + 1}: the run ends after step {ends}"
        line += source.describe_duplicates()
        say(line)
