"""Spikes of the training loss: noticed, and on request undone by going back and leaving out the rows that were read.

The recipe is PaLM's (arXiv:2204.02311, sec. 5.1): go on from a checkpoint before the spike and skip the data around it.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

MOST_SKIPPED_STEPS = 100_000
"""Largest number of steps whose rows one rewind leaves out: they are read and thrown away one by one."""


@dataclass(frozen=True)
class SpikeConfig:
    """Detection of loss spikes, and the response to them.

    Attributes:
        window_steps: Steps before a step by whose losses it is judged; nothing is judged before so many are done.
        deviations: A spike is this many robust standard deviations (1.4826 times the median absolute deviation) above
            the window's median, > 0 ...
        nats: ... and this many nats per token, > 0.
        rewind: Go back to the newest checkpoint before the rows to be skipped, and go on without these rows. False:
            only say it.
        skip_steps: Steps whose rows are skipped, the spike's the last of them; at most ``MOST_SKIPPED_STEPS``.
        max_rewinds: Rewinds of one run; later spikes are only said.
    """

    window_steps: Annotated[int, Field(ge=2)]
    deviations: PositiveFloat
    nats: PositiveFloat
    rewind: bool
    skip_steps: Annotated[int, Field(ge=1, le=MOST_SKIPPED_STEPS)]
    max_rewinds: PositiveInt


@dataclass(frozen=True)
class SpikeState:
    """Memory of a ``SpikeDetector``, which a checkpoint keeps so that a resumed run judges as one that never stopped.

    Attributes:
        losses: Finite losses of the steps in the window, oldest first.
        is_high: Whether the last of them belongs to a spike that was said already.
    """

    losses: tuple[float, ...] = ()
    is_high: bool = False


class SpikeDetector:
    """Judges each step's loss by those before it. Every rank has the same losses, so all judge alike."""

    def __init__(self, config: SpikeConfig):
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.window_steps)
        self._is_high = False

    def judge(self, loss: float) -> str | None:
        """Take in the loss of the next step; in words, the spike that begins with it.

        One that is not finite is left to ``engine.max_skipped_steps``.
        """
        if not math.isfinite(loss):
            return None
        window = list(self._losses)
        self._losses.append(loss)
        if len(window) < self._config.window_steps:
            return None
        middle = statistics.median(window)
        deviation = 1.4826 * statistics.median(abs(one - middle) for one in window)
        was_high, self._is_high = (
            self._is_high,
            loss - middle > max(self._config.nats, self._config.deviations * deviation),
        )
        if was_high or not self._is_high:
            return None
        return f"loss {loss:.3f} is {loss - middle:.3f} nats above the median of the {len(window)} steps before"

    def state(self) -> SpikeState:
        """Memory for a checkpoint."""
        return SpikeState(tuple(self._losses), self._is_high)

    def restore(self, state: SpikeState | None) -> None:
        """Go on from a checkpoint's memory; from nothing if it has none."""
        state = state or SpikeState()
        self._losses.clear()
        self._losses.extend(state.losses)
        self._is_high = state.is_high


@dataclass(frozen=True)
class Rewind:
    """One return of a run.

    Attributes:
        step: Finished steps of the checkpoint it went back to.
        first: First step, in the order of the data, whose rows are left out.
        stop: The step after the last of them.
    """

    step: int
    first: int
    stop: int


class Rewinds:
    """The returns of a run: which rows it leaves out, and which of its checkpoints are of a course that was left.

    Steps of the run and of its data are the same until rows are left out; then the data is ahead.
    """

    def __init__(self, taken: Iterable[Rewind] = ()):
        self.taken = list(taken)

    def state(self) -> list[dict[str, int]]:
        """Plain values for the record in the run's folder."""
        return [asdict(one) for one in self.taken]

    def skips(self, data_step: int) -> bool:
        """Whether the rows of this step of the data are left out."""
        return any(one.first <= data_step < one.stop for one in self.taken)

    def data_step(self, step: int) -> int:
        """The step of the data that step ``step`` of the run reads."""
        reached = 0  # end of the data that was looked at
        for one in sorted(self.taken, key=lambda one: one.first):
            first = max(one.first, reached)
            if first < one.stop and first <= step:
                step += one.stop - first
            reached = max(reached, one.stop)
        return step

    def accept(self, step: int, num_rewinds: int) -> bool:
        """Whether a checkpoint of ``step``, made after so many rewinds, lies on the run's present course."""
        return all(step <= one.step for one in self.taken[num_rewinds:])
