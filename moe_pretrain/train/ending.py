"""Last words of a run: the folder, the way to go on, the result."""

import math
from collections.abc import Callable

from moe_pretrain.config.schema import Config
from moe_pretrain.system.exit_codes import FINISHED, NOT_FINITE, STOPPED, UNSAVED
from moe_pretrain.train.corpora import RunData
from moe_pretrain.train.progress import RunProgress


def say_end(code: int, config: Config, data: RunData, progress: RunProgress, say: Callable[[str], None]) -> None:
    """Say how the run ended with ``code``; on the main rank, once its metrics are closed."""
    folder = config.run.folder
    say(f"run folder: {folder}")
    for name, use in data.loader.source_use(progress.data_step).items():
        tokens = use.rows * config.model.sequence_length
        say(f"source {name}: {tokens:,} tokens, {use.epochs:.2f} epochs")
    if code == STOPPED:
        say(f"stopped at step {progress.step}; the same command goes on from there")
    if code == UNSAVED:
        saved = progress.saved_step or 0
        say(f"step {progress.step} could not be saved; the same command goes on from step {saved}")
    if code in (FINISHED, NOT_FINITE):
        loss = progress.validation_loss
        is_finite = loss is not None and math.isfinite(loss)
        say(
            f"done: {progress.step} steps, {progress.tokens:,} tokens; validation loss "
            f"{f'{loss:.3f} nats/token' if is_finite else 'NOT FINITE'}, unigram cross-entropy "
            f"{data.unigram_cross_entropy:.3f} nats/token"
        )
        if code == NOT_FINITE:
            reason = "its last validation is not finite" if not is_finite else "all of its steps were skipped"
            say(f"the run has no result: {reason} (exit code {NOT_FINITE})")
        say(f"spent: {progress.meter.describe_spending()}")
        if matched := config.budget.matched:
            share = progress.meter.flops / progress.tokens / matched.reference["flops_per_token"] - 1
            say(f"measured FLOPs per token against those of the reference of budget.match: {share:+.2%}")
