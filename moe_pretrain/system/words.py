"""Numbers and texts in a form for one line of output."""

import difflib
from collections.abc import Iterable, Sequence

_MOST_NAMED = 5
_LEAST_LIKENESS = 0.65
"""At difflib's own 0.6 a word that has three letters of another's six is taken for it."""


def few(names: Sequence[str]) -> str:
    """Some of the names, and how many more there are."""
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that an unknown ``word`` is a misspelling of; None where none is so close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=_LEAST_LIKENESS)
    return close[0] if close else None


def one_line(reason: object) -> str:
    """The text of an error without line breaks, cut at 200 characters."""
    text = " ".join(str(reason).split()) or type(reason).__name__
    return text if len(text) <= 200 else text[:200] + "..."


def short_number(value: float) -> str:
    """Write a count with three digits and a unit: 950, 12.3k, 1.20M, 3.00B, 1.50T."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            scaled = value / size
            digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            return f"{scaled:.{digits}f}{unit}"
    return f"{value:.0f}"


def short_duration(seconds: float) -> str:
    """Write a duration as ``4:05`` (minutes), ``2:04:05`` (hours) or ``3d 02:04:05``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}:{minute:02d}:{second:02d}"
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"
