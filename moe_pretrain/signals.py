"""Stop requests: a signal asks, all ranks agree at a step boundary, a checkpoint is written, the exit code tells."""

import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from moe_pretrain.parallel.mesh import Mesh

STOPPED = 75
"""Exit code of a run that a signal stopped after a checkpoint: EX_TEMPFAIL, start me again."""

_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Context in which SIGTERM, SIGINT and SIGUSR1 only set a flag; a second SIGINT stops at once."""

    exit_code = STOPPED

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._received = 0
        self._before: dict[int, object] = {}

    @property
    def name(self) -> str:
        """Name of the signal that was agreed on."""
        return signal.Signals(self._received).name if self._received else "no signal"

    def __enter__(self) -> "StopRequest":
        for number in _HANDLED:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; collective, so all ranks stop at the same step."""
        flag = torch.tensor(self._received, device=self._mesh.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self._received = int(flag)
        return self._received > 0
