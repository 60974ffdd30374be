"""Errors of commands: which of them are the user's to mend, and going on past those of one run among several."""

import sys
from collections.abc import Callable
from pathlib import Path

from moe_pretrain.analysis.compare.variants import one_of_each_variant
from moe_pretrain.checkpoint.store import CheckpointError, UnreadableCheckpoint
from moe_pretrain.engine.engine import NonFiniteError
from moe_pretrain.engine.sanity import SanityError
from moe_pretrain.system.exit_codes import UNSAVED, USAGE_CODE, is_of_the_disk


def code_of(error: Exception) -> int | None:
    """Exit code of an error that the user can mend, and that so needs no traceback; None for any other."""
    if isinstance(error, UnreadableCheckpoint) or is_of_the_disk(error):
        return UNSAVED
    # A lost pipe to a process of ours has no file; it is a mistake of ours.
    is_users = isinstance(error, ValueError | CheckpointError | NonFiniteError | SanityError)
    return USAGE_CODE if is_users or (isinstance(error, OSError) and error.filename is not None) else None


def describe(error: Exception) -> str:
    """The error in one line."""
    if isinstance(error, OSError) and error.strerror is not None:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}; once that is mended the same command goes on"
    return " ".join(str(error).split())


def for_one_of_each_variant(folder: Path, command: Callable[[Path], int]) -> int:
    """Call ``command`` with the folder of a run, or of a run of each variant below it; the worst exit code.

    An error that a user can mend in one run keeps nobody from the next.
    """
    runs = one_of_each_variant(folder)
    if len(runs) == 1:
        return command(runs[0])
    worst = 0
    for run in runs:
        print(f"== {run}", flush=True)
        try:
            code = command(run)
        except Exception as error:
            if (found := code_of(error)) is None:
                raise
            print(describe(error), file=sys.stderr)
            code = found
        worst = max(worst, code)
    return worst
