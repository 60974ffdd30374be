"""The checkpoints that a run writes while it trains."""

from collections.abc import Callable

from moe_pretrain import data
from moe_pretrain.checkpoint.store import Saver
from moe_pretrain.metrics.throughput import Stopwatch
from moe_pretrain.train.recorder import Journal
from moe_pretrain.train.resume_rules import Identity
from moe_pretrain.train.train_state import Progress


class Saving:
    """Writes a checkpoint of the present step, one at a time, and says what became of each."""

    def __init__(
        self,
        saver: Saver,
        progress: Progress,
        identity: Identity,
        loader: data.TrainLoader,
        journal: Journal,
        stopwatch: Stopwatch,
        enter: Callable[[str, int], None],
    ):
        """Nothing is written yet.

        Args:
            saver: What writes weights and optimizer, and the state of the next three beside them.
            progress: How far the run has come; it is told the newest checkpoint's step.
            identity: Which run it is.
            loader: What yields its micro-batches.
            journal: Where it is said what became of a checkpoint.
            stopwatch: Paused meanwhile.
            enter: Called with the phase and step that begin.
        """
        self._saver, self._progress, self._identity, self._loader = saver, progress, identity, loader
        self._journal, self._stopwatch, self._enter = journal, stopwatch, enter

    def save(self, wait: bool) -> None:
        """Begin a checkpoint of this step, once the one before is complete; ``wait`` for this one too."""
        with self._stopwatch.paused():
            self.take_outcome(wait=True)
            if self._progress.saved_step != self._progress.step:
                self._enter("save", self._progress.step)
                stream = self._loader.state(self._progress.data_step)
                state = {**self._progress.state(), "stream": stream, **self._identity.state()}
                self._saver.save(state, before_commit=self._journal.sync)
                self.take_outcome(wait=wait)

    def take_outcome(self, wait: bool) -> None:
        """Hear what became of the last save, if that is known or is to be waited for, and say it."""
        outcome = self._saver.take(wait)
        if outcome is None:
            return
        if outcome.path is None:
            saved = self._progress.saved_step
            left = f"step {saved}" if saved is not None else "none"
            self._journal.event(
                "checkpoint_failed",
                f"step {outcome.step} is NOT saved: {outcome.problem}; last good checkpoint: {left}; training goes on",
            )
            return
        self._progress.saved_step = outcome.step
        self._journal.event(
            "checkpoint",
            f"{outcome.path.name} written in {outcome.seconds:.1f} s, of which training waited "
            f"{outcome.staging_seconds:.2f} s",
        )
        if outcome.problem is not None:
            self._journal.event("checkpoint_not_removed", outcome.problem)
