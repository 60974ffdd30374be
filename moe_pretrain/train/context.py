"""``RunContext``: the process around a run, as its parts see it."""

from collections.abc import Callable
from dataclasses import dataclass

from moe_pretrain.parallel.heartbeat import Heartbeat
from moe_pretrain.parallel.mesh import Mesh
from moe_pretrain.system.faults import FaultConfig, Faults
from moe_pretrain.system.stop_signals import StopRequest


@dataclass(frozen=True)
class RunContext:
    """Ranks, signals, injected faults and output of one process of a run.

    Attributes:
        mesh: This rank's place among the ranks.
        stop: Signals to stop, which all ranks agree on.
        faults: Faults that tests inject.
        enter: Called with the phase and step that begin: the heartbeat of this rank, and a place for faults.
        say: Prints a line for the user; nothing on ranks other than the main one.
    """

    mesh: Mesh
    stop: StopRequest
    faults: Faults
    enter: Callable[[str, int], None]
    say: Callable[[str], None]

    def agree_to_stop(self) -> bool:
        """Whether a signal came to any rank; a collective, so every rank must ask at the same time."""
        return self.stop.agreed(self.mesh.device)


def build_context(config: FaultConfig, mesh: Mesh, stop: StopRequest, heartbeat: Heartbeat) -> RunContext:
    """The context of this process, whose phases go to ``heartbeat``."""
    faults = Faults(config, mesh.rank)

    def enter(phase: str, step: int) -> None:
        heartbeat.enter(phase, step)
        faults.reach(phase, step)

    def say(line: str) -> None:
        if mesh.is_main:
            print(line)

    return RunContext(mesh, stop, faults, enter, say)
