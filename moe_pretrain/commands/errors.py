"""Errors of commands: which of them are the user's to mend, and going on past those of one run among several."""

import sys
from collections.abc import Callable
from pathlib import Path

from moe_pretrain.analysis.compare.variants import one_of_each_variant
from moe_pretrain.checkpoint.store import CheckpointError
from moe_pretrain.engine.engine import NonFiniteError
from moe_pretrain.engine.sanity import SanityError
from moe_pretrain.system.exit_codes import USAGE_CODE


def is_users(error: Exception) -> bool:
    """Whether the error is one that the user can mend, and so needs no traceback."""
    return isinstance(error, ValueError | CheckpointError | NonFiniteError | SanityError)


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
            if not is_users(error):
                raise
            print(" ".join(str(error).split()), file=sys.stderr)
            code = USAGE_CODE
        worst = max(worst, code)
    return worst
