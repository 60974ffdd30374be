"""Progress of a running run: counters and meters that each step advances, and their state for checkpoints."""

import math
from typing import Any

from moe_pretrain import data
from moe_pretrain.checkpoint.store import RunIdentity, TrainState
from moe_pretrain.schedule.budget import BudgetMeter
from moe_pretrain.schedule.loss_spikes import Rewinds, SpikeConfig, SpikeDetector


class RunProgress:
    """Everything that finished steps leave to those that follow, beside the engine; the same on every rank.

    Attributes:
        step: Finished steps.
        token_hash: Sum of the hashes of all rows read, wrapped to 64 bits.
        saved_step: Steps of the newest checkpoint; None without one.
        validation_loss: At this very step, nats per token; None where it was not validated.
        rewinds: Returns so far, whose rows are left out.
        spikes: Detector of spikes in the training loss.
        meter: Budget meter: FLOPs and seconds spent; decides the last step.
        skipped: Steps that changed nothing; known at the end.
    """

    def __init__(self, spike: SpikeConfig, tokens_per_step: int, meter: BudgetMeter):
        self.step, self.token_hash = 0, 0
        self.saved_step: int | None = None
        self.validation_loss: float | None = None
        self.skipped = 0
        self.rewinds, self.spikes, self.meter = Rewinds(), SpikeDetector(spike), meter
        self._tokens_per_step = tokens_per_step

    @property
    def has_result(self) -> bool:
        """Whether the run, at its end, has anything to show: a weight that moved and a finite validation loss."""
        loss = self.validation_loss
        return self.skipped < max(1, self.step) and loss is not None and math.isfinite(loss)

    @property
    def tokens(self) -> int:
        """Tokens consumed so far."""
        return self.step * self._tokens_per_step

    @property
    def data_step(self) -> int:
        """Next step in the data's order: ahead of ``step`` by what was left out."""
        return self.rewinds.data_step(self.step)

    def advance(self, token_hash: int) -> None:
        """Count a finished step, whose rows have this hash."""
        self.step += 1
        self.token_hash = data.wrap_to_int64(self.token_hash + token_hash)
        self.validation_loss = None

    def state(self, stream: dict[str, Any] | None, identity: RunIdentity) -> TrainState:
        """State for a checkpoint of this step.

        Args:
            stream: Position in streamed data.
            identity: This run.
        """
        loss = self.validation_loss
        return TrainState(
            step=self.step,
            tokens=self.tokens,
            token_hash=self.token_hash,
            flops=self.meter.flops,
            train_seconds=self.meter.seconds,
            validation_loss=loss if loss is not None and math.isfinite(loss) else None,
            rewinds=tuple(self.rewinds.taken),
            spikes=self.spikes.state(),
            stream=stream,
            identity=identity,
        )

    def restore(self, state: TrainState) -> None:
        """Go on from a checkpoint that records its token hash; rewinds that are known already stay known."""
        assert state.token_hash is not None, "ResumeRules refuses such a checkpoint"
        if len(state.rewinds) > len(self.rewinds.taken):
            self.rewinds = Rewinds(state.rewinds)
        self.step, self.token_hash = state.step, state.token_hash
        self.saved_step, self.validation_loss = state.step, state.validation_loss
        self.spikes.restore(state.spikes)
        self.meter.restore(state.step, state.flops, state.train_seconds)

    def leave_trunk(self) -> None:
        """Forget what another run, whose checkpoint this one began with, has saved and validated."""
        self.saved_step = self.validation_loss = None
