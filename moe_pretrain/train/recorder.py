"""What a run writes down of itself step by step: metrics rows, events, probes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_pretrain.checkpoint.manifest import CHECKPOINTS, complete_names, step_of
from moe_pretrain.metrics.probe_collector import Probe, ProbeFiles, routing_drift
from moe_pretrain.metrics.writer import MetricsWriter
from moe_pretrain.train.train_state import Progress


class Journal:
    """The metrics and probes of a run folder. On every rank but the main one it does nothing."""

    def __init__(self, folder: Path, metrics: MetricsWriter, progress: Progress, is_main: bool):
        """Nothing is written yet.

        Args:
            folder: The run's folder.
            metrics: Where rows go.
            progress: Says at which step a row is written.
            is_main: Whether this rank writes.
        """
        self._checkpoints, self._probes = folder / CHECKPOINTS, ProbeFiles(folder)
        self._metrics, self._progress, self._is_main = metrics, progress, is_main

    def event(self, name: str, message: str) -> None:
        """Write an event row: short ``name``, one line of ``message``."""
        self._metrics.event(self._progress.step, self._progress.tokens, name, message)

    def write(self, row: Mapping[str, Any]) -> None:
        """Write a train or validation row of the present step."""
        self._metrics.write({"step": self._progress.step, "tokens": self._progress.tokens, **row})

    def expect(self, num_steps: int) -> None:
        """The run comes to so many steps."""
        self._metrics.expect(num_steps)

    def keep_probe(self, probe: Probe) -> dict[str, float]:
        """Write the probe beside the run's others; the drift of routes since the one before, for the metrics."""
        if not self._is_main:
            return {}
        drift: dict[int, float] = {}
        try:
            before = self._probes.newest(self._progress.step - 1)
            if before is not None:
                drift = routing_drift(before, probe)
                if before.fingerprint != probe.fingerprint:
                    self.event("probe_changed", f"the validation rows are not those of step {before.step}: no drift")
            self._probes.write(probe)
            checkpoints = complete_names(self._checkpoints)
            self._probes.remove_before(step_of(checkpoints[-1]) or 0 if checkpoints else 0)
        except (OSError, ValueError) as error:
            self.event("probe_failed", f"losses by document and routes are not complete: {error}")
        return {f"moe/layer_{layer:02d}/routing_drift": share for layer, share in drift.items()}

    def go_on(self) -> None:
        """Go on from the present step: what was written down of later ones is of no use."""
        self._metrics.resume(self._progress.step)
        if self._is_main:
            self._probes.remove_after(self._progress.step)

    def sync(self) -> None:
        """Wait until every row so far is on the disk."""
        self._metrics.sync()

    def close(self) -> None:
        """Close every sink."""
        self._metrics.close()
