"""Checkpoints that a run writes while it trains."""

from moe_pretrain.checkpoint.store import Saver, TrainState
from moe_pretrain.config.schema import Config
from moe_pretrain.engine.engine import TrainEngine
from moe_pretrain.run_folder.paths import CHECKPOINTS
from moe_pretrain.train.context import RunContext
from moe_pretrain.train.progress import RunProgress
from moe_pretrain.train.recorder import RunRecorder


class CheckpointSaving:
    """Writes one checkpoint at a time, and records what became of each."""

    def __init__(
        self, config: Config, engine: TrainEngine, context: RunContext, progress: RunProgress, recorder: RunRecorder
    ):
        """Nothing is written yet; every rank makes one, at the same time."""
        folder, timeout = config.run.folder / CHECKPOINTS, config.parallel.collective_seconds
        self._saver = Saver(engine, folder, config.checkpoint, timeout, context.faults)
        self._progress, self._recorder = progress, recorder

    def went_on_from(self, step: int) -> None:
        """Learn which checkpoint the run went on from."""
        self._saver.went_on_from(step)

    def leave(self, step: int) -> None:
        """Take checkpoints of later steps out of the way: the run goes on from ``step`` on another course."""
        self._saver.leave(step)

    def begin(self, state: TrainState) -> None:
        """Begin a checkpoint of the engine and ``state``; the outcome of the one before was taken."""
        self._saver.save(state, before_commit=self._recorder.sync)

    def take_outcome(self, wait: bool) -> None:
        """Record the outcome of the last checkpoint, if it is known or is to be waited for."""
        outcome = self._saver.take(wait)
        if outcome is None:
            return
        if outcome.path is None:
            saved = self._progress.saved_step
            left = f"step {saved}" if saved is not None else "none"
            self._recorder.event(
                "checkpoint_failed",
                f"step {outcome.step} is NOT saved: {outcome.problem}; last good checkpoint: {left}; training goes on",
            )
            return
        self._progress.saved_step = outcome.step
        self._recorder.event(
            "checkpoint",
            f"{outcome.path.name} written in {outcome.seconds:.1f} s, of which training waited "
            f"{outcome.staging_seconds:.2f} s",
        )
        if outcome.problem is not None:
            self._recorder.event("checkpoint_not_removed", outcome.problem)
