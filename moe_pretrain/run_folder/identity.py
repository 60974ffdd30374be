"""Fields of a configuration that decide what comes out of a run, and those that do not, each with the reason.

Two jobs of a sweep are one if these fields are equal; runs that are equal in them but for the seed are one variant of a
comparison. A field that stands in neither list decides: a run too many is found out, a mixed-up average is not.
"""

from collections.abc import Mapping
from typing import Any

from moe_pretrain.system.faults import SICK_POINTS

DECIDING = (
    *("seed", "router_file", "model", "router", "data", "streaming", "tokenizer", "packing", "budget", "batch"),
    *("optimizer", "schedule", "engine", "spike", "evaluation", "checkpoint.warm_start"),
    "checkpoint.branch_from",
)
"""Parts of the configuration, with everything below them that is not in ``NOT_DECIDING``, and single fields."""

_PLACE = "where the run lives, not what it is"
_SPEED = "speed and memory; the order of sums and roundings at most"
_WHEN = "when shards of a stream are written, not what is in them"
_SAVING = "what is saved and how long it stays; with spike.rewind=true it decides where the run goes back to"
_WATCHING = "how long ranks wait for each other"
_LOGGING = "what is logged, and where"
_ASKING = "questions asked of the model, from which it learns nothing"
_FAULT = "breaks a run on purpose, and the same run goes on without; a sick step decides"

NOT_DECIDING = {
    "run.name": _PLACE,
    "run.output_dir": _PLACE,
    "run.cache_dir": _PLACE,
    "run.prepare_workers": "shards do not depend on how many processes write them",
    "run.report": "a page about the run",
    "sweep.name": _PLACE,
    "sweep.parallel": "how many jobs run side by side",
    "sweep.retry": "which jobs are started again",
    "model.recompute": _SPEED,
    "model.cross_entropy_chunk_tokens": _SPEED,
    "engine.kernels": _SPEED,
    "streaming.shards_ahead": _WHEN,
    "streaming.cache_shards": _WHEN,
    "streaming.retry_seconds": _WHEN,
    "streaming.stall_seconds": _WHEN,
    "parallel.processes": _SPEED,
    "parallel.expert_parallel_size": _SPEED,
    "parallel.overlap_exchange": _SPEED,
    "parallel.timeout_seconds": _WATCHING,
    "parallel.heartbeat_seconds": _WATCHING,
    "checkpoint.every_steps": _SAVING,
    "checkpoint.keep_last": _SAVING,
    "checkpoint.keep_every_steps": _SAVING,
    "checkpoint.keep_best": _SAVING,
    "checkpoint.asynchronous": "whether training waits for the disk",
    "checkpoint.resume": "whether a start may go on from what is there",
    "metrics.log_every_steps": _LOGGING,
    "metrics.router_health_steps": _LOGGING,
    "metrics.collapse_ratio": _LOGGING,
    "metrics.progress": _LOGGING,
    "metrics.wandb": _LOGGING,
    "metrics.wandb_project": _LOGGING,
    "metrics.wandb_group": _LOGGING,
    "evaluation.tasks.names": _ASKING,
    "evaluation.tasks.every_steps": _ASKING,
    "evaluation.tasks.max_documents": _ASKING,
    "fault.point": _FAULT,
    "fault.action": _FAULT,
    "fault.step": _FAULT,
    "fault.num_steps": _FAULT,
    "fault.rank": _FAULT,
    "fault.parameter": _FAULT,
}
"""Every other field, with the reason."""
SPEED = frozenset(field for field, reason in NOT_DECIDING.items() if reason is _SPEED)
"""Fields that decide how fast a run is."""


def decides(field: str) -> bool:
    """Whether a field, by its dotted name, may decide what comes out of a run, whatever the others are."""
    return not any(field == other or field.startswith(f"{other}.") for other in NOT_DECIDING)


def deciding(values: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration with dotted keys that decides what comes out of a run."""
    decided_too = {_SAVING: values.get("spike.rewind") is True, _FAULT: values.get("fault.point") in SICK_POINTS}
    return {
        key: value
        for key, value in values.items()
        # Runs from before there were warm starts and branches have no such fields.
        if (decides(key) or decided_too.get(NOT_DECIDING.get(key, ""), False))
        and not (key in ("checkpoint.warm_start", "checkpoint.branch_from") and value is None)
    }
