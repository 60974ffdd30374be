"""Search for a scheme's learning rate, and for further fields of its own, in a fixed number of trials.

The rule is a pure function of the losses so far, so a search that was killed goes on where it was, and anybody can
replay it from the runs. A loss that is not finite is worse than every other; of equal losses the lower rate is better.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

FEWEST_RATES = 3
"""A best rate between two worse ones needs three."""
MOST_TRIALS = 30
"""With more the halved gaps come to the last digits of a rate."""
_DIGITS = 6
"""Significant digits of a rate, so that its word in a job's name is short and the same on every machine."""

Setting = tuple[tuple[str, str], ...]
"""Overrides of a trial: fields and values in the words of an override, the searched rate first."""


def rule(factor: float) -> str:
    """The rule in words."""
    return (
        f"three rates a factor of {factor:g} apart around the configuration's own; while the best is at an edge, "
        "one beyond it; else the middle, in log space, of the wider gap beside the best (of equal gaps the one to the "
        "better neighbour); then at the best rate each stated value of further fields. The lowest loss wins; that of a "
        "run that diverged is infinite"
    )


def next_rates(losses: Mapping[float, float], start: float, factor: float) -> list[float]:
    """Rates to try next: those of the first three that are missing, else one.

    Args:
        losses: Rate -> loss of those tried so far, infinite or NaN where the run diverged.
        start: The rate to begin around, positive.
        factor: Step of the first three, above 1.
    """
    first = [_rounded(start * factor**exponent) for exponent in (-1, 0, 1)]
    if missing := [rate for rate in first if rate not in losses]:
        return missing
    rates = sorted(losses)
    best = best_rate(losses)
    if best == rates[0]:
        return [_rounded(best / factor)]
    if best == rates[-1]:
        return [_rounded(best * factor)]
    at = rates.index(best)
    below, above = rates[at - 1], rates[at + 1]
    gap_below, gap_above = math.log(best / below), math.log(above / best)
    is_even = math.isclose(gap_below, gap_above, rel_tol=10.0 ** (2 - _DIGITS))
    takes_below = _badness(losses[below]) <= _badness(losses[above]) if is_even else gap_below > gap_above
    return [_rounded(math.sqrt(best * (below if takes_below else above)))]


def best_rate(losses: Mapping[float, float]) -> float:
    """The rate with the lowest loss; of equal ones the lower rate."""
    return min(losses, key=lambda rate: (_badness(losses[rate]), rate))


def _badness(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _rounded(rate: float) -> float:
    return float(f"{rate:.{_DIGITS}g}")


@dataclass(frozen=True)
class Search:
    """The trials of one scheme.

    Attributes:
        field: The field whose rates are searched.
        start: The configuration's own value of it.
        factor: Step of the grid that the search begins on.
        trials: Trials in all.
        also: Further fields with values to try, in words; the configuration's own value is tried by the rates.
    """

    field: str
    start: float
    factor: float
    trials: int
    also: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def rate_trials(self) -> int:
        """Trials that are left for the rate."""
        return self.trials - sum(len(values) for _, values in self.also)

    def at(self, rate: float) -> Setting:
        """The setting of a rate alone."""
        return ((self.field, repr(rate)),)

    def next(self, losses: Mapping[Setting, float]) -> list[Setting]:
        """Settings to try next; none when the trials are spent.

        Args:
            losses: Loss of each setting that this search asked for, in that order.
        """
        rates = {float(setting[0][1]): loss for setting, loss in losses.items() if len(setting) == 1}
        left = self.trials - len(losses)
        # Further fields at a rate that diverges tell nothing: their trials go on looking for one that does not.
        if len(rates) < self.rate_trials or not any(map(math.isfinite, rates.values())):
            return [self.at(rate) for rate in next_rates(rates, self.start, self.factor)][:left]
        made = len(rates)
        for field, values in self.also:
            if len(losses) < made + len(values):
                base = self._best(dict(list(losses.items())[:made]))
                return [(*base, (field, value)) for value in values[len(losses) - made :]][:left]
            made += len(values)
        return []

    def choose(self, losses: Mapping[Setting, float]) -> Setting | None:
        """The setting of the lowest loss; None where all diverged."""
        if not any(map(math.isfinite, losses.values())):
            return None
        return self._best(losses)

    def is_at_edge(self, losses: Mapping[Setting, float]) -> bool:
        """Whether the best rate is the lowest or the highest that was tried."""
        rates = {float(setting[0][1]): loss for setting, loss in losses.items() if len(setting) == 1}
        return best_rate(rates) in (min(rates), max(rates))

    def _best(self, losses: Mapping[Setting, float]) -> Setting:
        order = list(losses)
        return min(order, key=lambda each: (_badness(losses[each]), float(each[0][1]), order.index(each)))
