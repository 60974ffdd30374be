"""Faults on request: what a disk, a kernel or bad data do to a run, made to happen at a chosen place and step.

The program names the places as it passes them, ``faults.reach("save.renamed")``; nothing happens unless the
configuration asks for it. Tests use it to show that every such fault is survived, and a user can do the same on
a cluster before trusting it with a month of training.
"""

import ctypes
import difflib
import errno
import os
import signal
import threading
import time
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

SAVE_POINTS = (
    "save.begin",
    "save.staged",
    "save.cleared",
    "save.folder_made",
    "save.file_opened",
    "save.file_header",
    "save.file_half",
    "save.file_written",
    "save.file_flushed",
    "save.reported",
    "save.manifest_opened",
    "save.manifest_half",
    "save.manifest_written",
    "save.manifest_flushed",
    "save.folder_flushed",
    "save.replaced_moved",
    "save.renamed",
    "save.committed",
    "retain.chosen",
    "retain.renamed",
    "retain.half_deleted",
    "retain.deleted",
    "retain.done",
    "save.announced",
)
"""Places in the save path, in the order in which they are passed; ``save.replaced_moved`` only when a damaged
checkpoint of the same step is replaced, ``retain.renamed`` to ``retain.deleted`` only when one is removed."""

RUN_POINTS = ("train.step", "train.backward", "train.update", "evaluate.batch", "evaluate.tasks", "report")
"""Places in the run where a rank may die or stop."""

SICK_POINTS = {
    "train.loss": "not_finite",
    "train.gradient": "not_finite",
    "train.router": "collapse",
    "train.rows": "poison",
}
"""What can be made sick, and the one action that each knows."""

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
_HANGS = ("hang", "hold")
_ERRORS = ("ENOSPC", "EROFS", "EIO", "EDQUOT", "ENOENT", "ESTALE", "ENOTCONN")
ALL_RANKS = -1


@dataclass(frozen=True)
class FaultConfig:
    """A fault to inject; ``point: null`` injects none.

    Attributes:
        point: Where: one of ``SAVE_POINTS``, ``RUN_POINTS`` or ``SICK_POINTS``.
        action: ``kill`` (SIGKILL) or ``stop`` (SIGSTOP) the process, ``hang``: stay alive in an endless loop, or
            ``hold``: the same in C code that keeps the interpreter's lock; an error of the disk by its errno name
            (ENOSPC, EROFS, EIO, EDQUOT, ENOENT, ESTALE, ENOTCONN) in the save path; ``not_finite`` for the loss or the
            gradient; ``collapse`` for the router, which then sends every token to the same experts; ``poison`` for the
            data, whose targets become wrong ones.
        step: First step at which it happens: for saving the number of finished steps, for the data the step in its
            own order, else the step's own number.
        num_steps: How many steps in succession it happens at.
        rank: The rank it happens on; -1 for all.
        parameter: Name, or part of the name, of the parameter whose gradient becomes NaN.
    """

    point: str | None
    action: str
    step: NonNegativeInt
    num_steps: PositiveInt
    rank: Annotated[int, Field(ge=ALL_RANKS)]
    parameter: str

    def __post_init__(self) -> None:
        if self.point is None:
            return
        valid = self._actions()
        if not valid:
            known = (*SAVE_POINTS, *RUN_POINTS, *SICK_POINTS)
            near = difflib.get_close_matches(self.point, known, cutoff=0.0)
            raise ValueError(
                f"fault.point={self.point} must be null or one of the {len(known)} places in "
                f"moe_pretrain/system/faults.py; "
                f"nearest: {', '.join(near)}"
            )
        if self.action not in valid:
            raise ValueError(f"fault.action={self.action} must be one of {', '.join(valid)} at {self.point}")

    def _actions(self) -> tuple[str, ...]:
        if self.point in SAVE_POINTS:
            return (*_SIGNALS, *_ERRORS)
        if self.point in RUN_POINTS:
            return (*_SIGNALS, *_HANGS)
        return (SICK_POINTS[self.point],) if self.point in SICK_POINTS else ()


class Faults:
    """One rank's view of the fault: whether it is due at a place and step, and making it happen."""

    def __init__(self, config: FaultConfig, rank: int):
        self.parameter = config.parameter
        self._config = config
        self._here = config.point is not None and config.rank in (rank, ALL_RANKS)

    def due(self, point: str, step: int) -> bool:
        """Whether the configured fault belongs to this place, step and rank."""
        config = self._config
        return self._here and point == config.point and config.step <= step < config.step + config.num_steps

    def reach(self, point: str, step: int) -> None:
        """Pass ``point`` at ``step``: die, stop or fail there if that is configured.

        Raises:
            OSError: The configured error.
        """
        if not self.due(point, step):
            return
        action = self._config.action
        if action in _SIGNALS:
            # To this thread: a SIGSTOP to the process lets it go on until another thread has been woken to take it.
            signal.pthread_kill(threading.get_ident(), _SIGNALS[action])
        elif action == "hang":
            while True:
                time.sleep(1.0)
        elif action == "hold":
            while True:
                ctypes.PyDLL(None).sleep(3600)
        else:
            raise OSError(getattr(errno, action), f"{os.strerror(getattr(errno, action))} (fault.point={point})")


NO_FAULTS = Faults(FaultConfig(point=None, action="kill", step=0, num_steps=1, rank=0, parameter=""), 0)
