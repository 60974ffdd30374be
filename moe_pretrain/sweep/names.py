"""Names of sweeps and of their runs: the same command gives the same ones, so it finds its folders again. Pure."""

import hashlib
import re
from collections.abc import Iterable, Sequence

from hydra.core.override_parser.types import Quote, QuotedString

MAX_BYTES = 120
"""Longest name: file systems take 255 bytes, wandb 128 characters."""
_UNSAFE = re.compile(r"[^A-Za-z0-9_.=,@+-]+")
NOT_THE_SWEEP = ("hydra.", "hydra/", "run.", "metrics.", "fault.", "checkpoint.", "parallel.", "sweep.")
"""Beginnings of overrides that say how a sweep is run, not what it is."""


def job_name(swept: Sequence[str]) -> str:
    """Folder of one run: its swept overrides, ``router=top_k,seed=1``.

    What does not belong into a folder's name is replaced, and what is too long cut; a hash then tells such names apart.
    """
    return _folder_name(",".join(word.lstrip("+") for word in swept))


def sweep_name(swept_keys: Iterable[str], words: Iterable[str]) -> str:
    """Default name of a sweep: what is swept, and a hash of the command without what only says how to run it."""
    keys = "-".join(key.lstrip("+") for key in swept_keys)
    recipe = sorted(word for word in words if not word.lstrip("+~").startswith(NOT_THE_SWEEP))
    return _folder_name(f"sweep-{keys}-{_digest(recipe)}")


def quoted(value: str) -> str:
    """A value of an override that Hydra takes as this very text."""
    return QuotedString(value, Quote.single).with_quotes()


def _folder_name(text: str) -> str:
    name = _UNSAFE.sub("-", text)
    if name == text and len(name) <= MAX_BYTES:
        return name
    ending = f"-{_digest([text])}"
    return name[: MAX_BYTES - len(ending)] + ending


def _digest(words: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:8]
