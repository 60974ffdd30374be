"""Learning-rate schedules: the factor of each step."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt

Share = Annotated[float, Field(ge=0, le=1)]
NOT_AT_ITS_END = "NOT AT ITS END"
"""What a run's last words say of a schedule that was cut off; whoever compares runs looks for it."""


@dataclass(frozen=True)
class CosineScheduleConfig:
    """Linear warm-up, then a cosine down to a floor at the last step.

    Attributes:
        name: ``cosine``.
        warmup_steps: Steps of the warm-up.
        floor: Last learning rate as a fraction of the peak, in [0, 1].
    """

    name: Literal["cosine"]
    warmup_steps: NonNegativeInt
    floor: Share

    def check(self, num_steps: int) -> str:
        """Complaint about this schedule in a run of ``num_steps``, in a line, or nothing."""
        return _long_warmup(self.warmup_steps, num_steps)

    def last(self, num_steps: int) -> float:
        """Last learning rate, as a fraction of the peak."""
        return self.floor

    def factor(self, step: int, num_steps: int) -> float:
        """Learning rate of ``step`` (from 0) as a fraction of the peak."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = min(1.0, (step + 1 - self.warmup_steps) / max(1, num_steps - self.warmup_steps))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class WarmupStableDecayScheduleConfig:
    """Linear warm-up, constant, then a linear decay (MiniCPM, arXiv:2404.06395, sec. 4, with a linear tail).

    Attributes:
        name: ``warmup_stable_decay``.
        warmup_steps: Steps of the warm-up.
        decay_fraction: Share of the run that decays, at its end, in [0, 1].
        floor: Last learning rate as a fraction of the peak, in [0, 1].
    """

    name: Literal["warmup_stable_decay"]
    warmup_steps: NonNegativeInt
    decay_fraction: Share
    floor: Share

    def check(self, num_steps: int) -> str:
        """Complaint about this schedule in a run of ``num_steps``, in a line, or nothing.

        Raises:
            ValueError: The decay would begin before the warm-up ends: the rate would fall in one step.
        """
        decay_steps = round(self.decay_fraction * num_steps)
        if decay_steps and self.warmup_steps > num_steps - decay_steps:
            raise ValueError(
                f"schedule.warmup_steps={self.warmup_steps} and schedule.decay_fraction={self.decay_fraction} "
                f"({decay_steps} steps) must fit into the run's {num_steps} steps: at most "
                f"{num_steps - decay_steps} steps of warm-up, or a smaller fraction"
            )
        return _long_warmup(self.warmup_steps, num_steps)

    def last(self, num_steps: int) -> float:
        """Last learning rate, as a fraction of the peak."""
        return self.floor if round(self.decay_fraction * num_steps) else 1.0

    def factor(self, step: int, num_steps: int) -> float:
        """Learning rate of ``step`` (from 0) as a fraction of the peak."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        decay_steps = round(self.decay_fraction * num_steps)
        into_decay = step + 1 - (num_steps - decay_steps)
        if into_decay <= 0:
            return 1.0
        return 1.0 - (1 - self.floor) * min(1.0, into_decay / decay_steps)


def describe_last_rate(schedule: "ScheduleConfig", steps: int, num_steps: int) -> str:
    """Line on the learning rate in the last of ``steps``, planned as ``num_steps``, if that is not its end."""
    factor, last = schedule.factor(steps - 1, num_steps), schedule.last(num_steps)
    if not steps or math.isclose(factor, last, rel_tol=1e-3, abs_tol=1e-6):
        return ""
    return (
        f"the learning-rate schedule was at step {steps} of {num_steps}, {NOT_AT_ITS_END}: the last rate is "
        f"{factor:.1%} of the peak, its end {last:.1%}"
    )


def _long_warmup(warmup_steps: int, num_steps: int) -> str:
    if warmup_steps <= num_steps:
        return ""
    return (
        f"schedule.warmup_steps={warmup_steps} must be at most the run's {num_steps} steps: the rate would only rise "
        f"to {num_steps / warmup_steps:.1%} of optimizer.learning_rate; a shorter warm-up, or a larger budget"
    )


ScheduleConfig = CosineScheduleConfig | WarmupStableDecayScheduleConfig
