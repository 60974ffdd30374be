"""How far a run has come: what its checkpoints keep beside weights and optimizer."""

import math
from typing import Any

from moe_pretrain import data
from moe_pretrain.schedule.budget import BudgetMeter
from moe_pretrain.schedule.loss_spikes import Rewind, Rewinds, SpikeConfig, SpikeDetector


class Progress:
    """What the steps done so far leave to those that follow; the same on every rank.

    Attributes:
        step: Finished steps.
        token_hash: Sum of the hashes of all rows read, wrapped to 64 bits.
        saved_step: Steps of the newest checkpoint; None without one.
        validation_loss: At this very step, nats per token; None where it was not validated.
        rewinds: Which rows are left out.
        spikes: What judges the losses.
        meter: What counts what is spent, and says when the run is over.
    """

    def __init__(self, spike: SpikeConfig, tokens_per_step: int, meter: BudgetMeter):
        self.step, self.token_hash = 0, 0
        self.saved_step: int | None = None
        self.validation_loss: float | None = None
        self.rewinds, self.spikes, self.meter = Rewinds(), SpikeDetector(spike), meter
        self._tokens_per_step = tokens_per_step

    @property
    def tokens(self) -> int:
        """Tokens consumed so far."""
        return self.step * self._tokens_per_step

    @property
    def data_step(self) -> int:
        """Where the next step reads, in steps of the data's order: ahead of ``step`` by what was left out."""
        return self.rewinds.data_step(self.step)

    def advance(self, token_hash: int) -> None:
        """Count a finished step, whose rows have this hash."""
        self.step += 1
        self.token_hash = data.wrap_to_int64(self.token_hash + token_hash)
        self.validation_loss = None

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        loss = self.validation_loss
        return {
            "step": self.step,
            "tokens": self.tokens,
            "token_hash": self.token_hash,
            "flops": self.meter.flops,
            "train_seconds": self.meter.seconds,
            "validation_loss": loss if loss is not None and math.isfinite(loss) else None,
            "rewinds": self.rewinds.state(),
            "spikes": self.spikes.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state, which an earlier release may have written; known rewinds stay known."""
        recorded = [Rewind(**fields) for fields in state.get("rewinds", [])]
        if len(recorded) > len(self.rewinds.taken):
            self.rewinds = Rewinds(recorded)
        self.step, self.token_hash = state["step"], state["token_hash"]
        self.saved_step, self.validation_loss = self.step, state.get("validation_loss")
        self.spikes.restore(state.get("spikes"))
        self.meter.restore(self.step, state.get("flops"), state.get("train_seconds"))
