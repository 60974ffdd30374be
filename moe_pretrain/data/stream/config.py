"""Settings of streaming a corpus."""

from dataclasses import dataclass
from typing import Literal

from pydantic import NonNegativeFloat, PositiveInt

from moe_pretrain.data.documents.config import HubCorpusConfig


@dataclass(frozen=True)
class StreamingConfig:
    """Training on a corpus while it is tokenised.

    Attributes:
        mode: ``auto`` streams what comes from the hub and prepares the rest whole before training; ``always`` streams
            any corpus; ``never`` prepares any.
        shard_bytes: About how much text makes a shard.
        window_shards: Shards whose rows are shuffled together; training starts when the first so many are written.
        shards_ahead: The writer pauses when it is so many shards ahead of the window that is read.
        cache_shards: Training shards on the disk at a time: those that the run is past make room for new ones, and are
            written again, the same, if a resumed run or another epoch needs them. None keeps all.
        validation_shards: The documents held out of the first so many shards are the validation set; those held out of
            later ones are not used.
        at_end: When the source ends: ``repeat`` goes on with its next epoch, ``stop`` ends the run.
        retry_seconds: How long to wait in all, in growing steps, while the network fails.
        stall_seconds: Say what is waited for after so long.
    """

    mode: Literal["auto", "always", "never"]
    shard_bytes: PositiveInt
    window_shards: PositiveInt
    shards_ahead: PositiveInt
    cache_shards: int | None
    validation_shards: PositiveInt
    at_end: Literal["repeat", "stop"]
    retry_seconds: NonNegativeFloat
    stall_seconds: NonNegativeFloat

    def __post_init__(self) -> None:
        least = max(2 * self.window_shards + 1, self.validation_shards)
        if self.cache_shards is not None and self.cache_shards < least:
            raise ValueError(
                f"streaming.cache_shards={self.cache_shards} must be at least {least}, two windows and one shard "
                "(streaming.window_shards) or streaming.validation_shards, or null for all"
            )

    def applies_to(self, corpus: object) -> bool:
        """Whether the corpus is streamed."""
        return self.mode == "always" or (self.mode == "auto" and isinstance(corpus, HubCorpusConfig))
