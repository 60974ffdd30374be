"""Stop requests: a signal asks, all ranks agree at a boundary, a checkpoint is written, the exit code tells."""

import os
import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from moe_pretrain.system.exit_codes import INTERRUPTED
from moe_pretrain.system.threads import start_thread

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Context in which SIGTERM, SIGINT and SIGUSR1 only ask; a second SIGINT ends the process at once.

    A thread receives the signals: the main one may be deep in a collective that waits for a rank that is gone, and
    Python would not run a handler there before it returns.
    """

    def __init__(self) -> None:
        self._received = 0
        self._before: dict[int, object] = {}

    @property
    def name(self) -> str:
        """Name of the signal that was agreed on."""
        return signal.Signals(self._received).name if self._received else "no signal"

    @property
    def received(self) -> int:
        """Number of the last signal that this rank has received, or has heard of in ``agreed``; else 0."""
        return self._received

    def __enter__(self) -> "StopRequest":
        read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._thread = start_thread(lambda: self._listen(read_end), "signals")
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in HANDLED:
            self._before[number] = signal.signal(number, _ignore)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write_end)
        self._thread.join()

    def _listen(self, read_end: int) -> None:
        interrupts = 0
        while number := os.read(read_end, 1):
            if number[0] not in HANDLED:
                continue
            interrupts += number[0] == signal.SIGINT
            if interrupts > 1:
                os._exit(INTERRUPTED)
            self._received = number[0]
        os.close(read_end)

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop; collective, so all ranks stop at the same place."""
        flag = torch.tensor(self._received, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        # Not less than before: a signal may have come since the flag was read.
        self._received = int(flag) or self._received
        return int(flag) > 0


def _ignore(number: int, frame: FrameType | None) -> None:
    """The thread hears of it; this only replaces Python's and the kernel's own reaction."""
