"""Exit codes of runs, which schedulers and launchers act on."""

import errno
import signal

STOPPED = 75
"""Exit code of a run that a signal stopped after a checkpoint: EX_TEMPFAIL, start me again."""
UNSAVED = 74
"""Exit code of a command whose disk refuses, a run whose last checkpoint could not be written among them.

EX_IOERR: mend the disk and start me again.
"""
_OF_THE_DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS),
    # A server that is gone, or a mount that has lost it.
    *(errno.ESTALE, errno.ENOLCK, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN, errno.ESHUTDOWN),
}


def is_of_the_disk(error: BaseException | None) -> bool:
    """Whether an error, or one that it was made of, is that the disk or the network behind it refuses."""
    while error is not None:
        if getattr(error, "errno", None) in _OF_THE_DISK:
            return True
        error = error.__cause__ or error.__context__
    return False


READER_GONE = 128 + signal.SIGPIPE
"""Exit code of a command whose reader, ``head`` for example, has closed the pipe."""
INTERRUPTED = 128 + signal.SIGINT
"""Exit code after a second SIGINT, which stops at once."""


FINISHED = 0
"""Exit code of a run whose last step and its validation are done and saved."""


NOT_FINITE = 65
"""Exit code of a run that has come to its end without a result: EX_DATAERR.

Its last validation is not finite, or all of its steps were skipped.
"""
LOST_RANK = 69
"""Exit code of ranks that ended because another one was stuck or gone: EX_UNAVAILABLE."""
USAGE_CODE = 2
"""A command or its configuration is wrong."""
