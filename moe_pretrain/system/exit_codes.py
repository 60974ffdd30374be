"""Exit codes of runs, which schedulers and launchers act on."""

import signal

STOPPED = 75
"""Exit code of a run that a signal stopped after a checkpoint: EX_TEMPFAIL, start me again."""
UNSAVED = 74
"""Exit code of a run whose last checkpoint could not be written: EX_IOERR, mend the disk and start me again."""
INTERRUPTED = 128 + signal.SIGINT
"""Exit code after a second SIGINT, which stops at once."""


FINISHED = 0
"""Exit code of a run whose last step and its validation are done and saved."""


LOST_RANK = 69
"""Exit code of ranks that ended because another one was stuck or gone: EX_UNAVAILABLE."""
USAGE_CODE = 2
"""A command or its configuration is wrong."""
