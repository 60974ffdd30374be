"""The last words of a run: where things are, how to go on, what came out of it."""

from collections.abc import Callable

from moe_pretrain import data
from moe_pretrain.config.schema import Config
from moe_pretrain.system.exit_codes import FINISHED, STOPPED, UNSAVED
from moe_pretrain.train.corpora import Corpus
from moe_pretrain.train.train_state import Progress


def say_end(
    code: int,
    config: Config,
    corpus: Corpus,
    loader: data.TrainLoader,
    progress: Progress,
    say: Callable[[str], None],
) -> None:
    """Say how the run ended; on the main rank, once its metrics are closed.

    Args:
        code: FINISHED, STOPPED or UNSAVED.
        config: The run's configuration.
        corpus: What it trained on.
        loader: What yielded its micro-batches.
        progress: How far it came.
        say: Prints a line.
    """
    folder = config.run.folder
    say(f"run folder: {folder}")
    for name, use in loader.source_use(progress.data_step).items():
        tokens = use.rows * config.model.sequence_length
        say(f"source {name}: {tokens:,} tokens, {use.epochs:.2f} epochs")
    if code == STOPPED:
        say(f"stopped at step {progress.step}; the same command goes on from there")
    if code == UNSAVED:
        saved = progress.saved_step or 0
        say(f"step {progress.step} could not be saved; the same command goes on from step {saved}")
    if code == FINISHED:
        say(
            f"done: {progress.step} steps, {progress.tokens:,} tokens; validation loss "
            f"{progress.validation_loss:.3f} nats/token, unigram entropy "
            f"{corpus.unigram_entropy:.3f} nats/token"
        )
        say(f"spent: {progress.meter.describe_spending()}")
        if matched := config.budget.matched:
            share = progress.meter.flops / progress.tokens / matched.reference["flops_per_token"] - 1
            say(f"measured FLOPs per token against those of the reference of budget.match: {share:+.2%}")
