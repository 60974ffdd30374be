"""Signals before a run can heed them: while packages are imported there is nothing to save.

Imported before torch, whose import takes seconds in which a scheduler may change its mind.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

from moe_pretrain.system.exit_codes import INTERRUPTED, STOPPED


@contextlib.contextmanager
def ending_early_on_signals() -> Iterator[None]:
    """Within the block SIGTERM and SIGUSR1 end this process with ``STOPPED``, SIGINT with ``INTERRUPTED``, in one line.

    ``StopRequest`` or a launcher take the signals over while a run trains.
    """
    before = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    text = f"moe-pretrain: {name} while nothing is trained: nothing to save; the same command goes on\n"
    os.write(2, text.encode())
    # At once: an exception could be caught in the middle of an import.
    os._exit(INTERRUPTED if number == signal.SIGINT else STOPPED)
