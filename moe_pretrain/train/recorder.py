"""Records of a run, step by step: metrics rows, events, probes, notes on bad rows."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moe_pretrain.checkpoint.manifest import CheckpointError, complete_names, step_of
from moe_pretrain.config.preflight import RunPlan
from moe_pretrain.config.schema import Config, to_values
from moe_pretrain.engine.optimizers.base import rate_scales_by_group
from moe_pretrain.metrics.writer import MetricsWriter
from moe_pretrain.model.parameter_groups import meta_model
from moe_pretrain.parallel.mesh import Mesh
from moe_pretrain.plan.layer_cost import layer_cost
from moe_pretrain.run_folder.metrics_file import read_rows
from moe_pretrain.run_folder.paths import CHECKPOINTS, METRICS_FILE, sick_step_file
from moe_pretrain.run_folder.probe import Probe, ProbeFiles, routing_drift
from moe_pretrain.run_folder.provenance import (
    commit,
    processor,
    router_file_hash,
    versions,
    write_config,
    write_sick_step,
    write_summary,
)
from moe_pretrain.run_folder.task_results import TaskResult, TaskResultFiles
from moe_pretrain.train.corpora import RunData
from moe_pretrain.train.progress import RunProgress


class RunRecorder:
    """Metrics, probes and notes of a run folder. On every rank but the main one it does nothing."""

    def __init__(self, config: Config, plan: RunPlan, data: RunData, mesh: Mesh, progress: RunProgress):
        """Open the metrics; rows get the step and tokens of ``progress``."""
        folder, num_steps = config.run.folder, plan.batches.num_steps
        self.bad_rows = BadRowsLog(folder, plan.batches.rows_per_step, data.corpus.fingerprint, mesh.is_main)
        self._checkpoints, self._probes = folder / CHECKPOINTS, ProbeFiles(folder)
        self._tasks, self._metrics_file = TaskResultFiles(folder), folder / METRICS_FILE
        self._metrics = MetricsWriter(
            config.metrics, folder, num_steps, config.run.name, to_values(config), mesh.is_main
        )
        self._progress, self._is_main = progress, mesh.is_main

    def event(self, name: str, message: str) -> None:
        """Write an event row: short ``name``, one line of ``message``."""
        self._metrics.event(self._progress.step, self._progress.tokens, name, message)

    def write(self, row: Mapping[str, Any]) -> None:
        """Write a train or validation row of the present step."""
        self._metrics.write({"step": self._progress.step, "tokens": self._progress.tokens, **row})

    def expect(self, num_steps: int) -> None:
        """Tell the sinks that the run comes to so many steps."""
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
                    self.event("probe_changed", _other_rows(before.step))
            self._probes.write(probe)
            checkpoints = complete_names(self._checkpoints)
            self._probes.remove_before(step_of(checkpoints[-1]) or 0 if checkpoints else 0)
        except (OSError, ValueError, CheckpointError) as error:
            self.event("probe_failed", f"losses by document and routes are not complete: {error}")
        return {f"moe/layer_{layer:02d}/routing_drift": share for layer, share in drift.items()}

    def has_tasks(self) -> bool:
        """Whether the tasks of the present step have their row: a checkpoint of this step may know of it or not."""
        rows = read_rows(self._metrics_file)
        return any(row["kind"] == "tasks" and row["step"] == self._progress.step for row in rows)

    def keep_tasks(self, results: Sequence[TaskResult]) -> None:
        """Write the row of the tasks of the present step, and what each document came to."""
        if not self._is_main:
            return
        try:
            self._tasks.add(self._progress.step, results)
        except (OSError, ValueError) as error:
            self.event("tasks_failed", f"results by document are not complete: {error}")
        self.write(
            {
                f"tasks/{result.name}/{metric.name}": math.nan if metric.value is None else metric.value
                for result in results
                for metric in result.metrics
            }
        )

    def go_on(self) -> None:
        """Go on from the present step: rows and probes of later ones are removed."""
        self._metrics.resume(self._progress.step, self._progress.validation_loss is not None)
        if self._is_main:
            self._probes.remove_after(self._progress.step)
            self._tasks.remove_after(self._progress.step)

    def sync(self) -> None:
        """Wait until every row so far is on the disk."""
        self._metrics.sync()

    def close(self) -> None:
        """Close every sink."""
        self._metrics.close()


def write_facts(config: Config, plan: RunPlan, data: RunData, mesh: Mesh) -> None:
    """Write ``config.yaml`` and ``summary.json`` into the run's folder."""
    folder, size = config.run.folder, plan.size
    folder.mkdir(parents=True, exist_ok=True)
    values = json.loads(json.dumps(to_values(config)))
    device = torch.cuda.get_device_name() if mesh.device.type == "cuda" else processor()
    model = meta_model(config.model, config.router)
    routers = [layer.router for layer in model.moe_layers()]
    facts = {
        "total_parameters": size.total_parameters,
        "active_parameters": size.active_parameters,
        "flops_per_token": size.training_flops_per_token,
        "planned_steps": config.num_steps,
        # Of each group the different ones; a row's train/learning_rate times these are the rates of its step.
        "learning_rate_scales": rate_scales_by_group(model, config.optimizer),
        "causal_in_training": all(router.causal_in_training for router in routers),
        "causal_in_evaluation": all(router.causal_in_evaluation for router in routers),
        "micro_batch_size": plan.batches.micro_batch_size,
        "router_file_hash": router_file_hash(config.router_file),
        "unigram_cross_entropy": data.unigram_cross_entropy,
        "validation_text": {name: asdict(text) for name, text in data.validation_text.items()},
        "corpus_fingerprint": data.corpus.fingerprint,
        "versions": versions(),
        "commit": commit(),
        "device": device,
        "dtype": plan.dtype,
        "moe_layer_cost": layer_cost(config, plan.dtype, size),
    }
    write_config(folder, values)
    write_summary(folder, facts)


def _other_rows(step: int) -> str:
    return (
        f"the validation rows are not those of step {step} (another evaluation.max_rows, row length or text, or an "
        "earlier release, which read the first rows): losses before and after are of other tokens"
    )


@dataclass(frozen=True)
class BadRowsLog:
    """Notes in a run folder on rows whose step was skipped, not finite or a spike.

    Attributes:
        folder: Folder of the run.
        rows_per_step: Rows of one step over all ranks.
        corpus_fingerprint: Fingerprint of the corpus that the rows belong to.
        is_main: Whether this rank writes.
    """

    folder: Path
    rows_per_step: int
    corpus_fingerprint: str
    is_main: bool

    def note(self, step: int, reason: str) -> str:
        """Note the rows of ``step`` of the data; in words, the place of the note."""
        first = step * self.rows_per_step
        rows = {"first_row": first, "last_row": first + self.rows_per_step - 1}
        path = sick_step_file(self.folder, step)
        facts = {
            "step": step,
            "reason": reason,
            **rows,
            "corpus_fingerprint": self.corpus_fingerprint,
            "replay": f"resume from a checkpoint of at most {step} steps: step {step} reads these rows again",
        }
        if self.is_main:
            try:
                write_sick_step(self.folder, step, facts)
            except OSError as error:
                return f"rows {first} to {rows['last_row']} of the run's order ({path} cannot be written: {error})"
        return f"its rows are in {path}"
