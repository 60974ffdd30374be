"""Warnings of what happened to runs on their way to a number, so that it is less than it seems.

A run's configuration is that of its last start. What was another one before, and steps that changed nothing, stand in
its event rows alone.
"""

import re
from collections.abc import Iterable, Sequence

from moe_pretrain.analysis.compare.variants import Variant
from moe_pretrain.run_folder.identity import SPEED, decides
from moe_pretrain.run_folder.record import RunRecord, show
from moe_pretrain.schedule.learning_rate import NOT_AT_ITS_END
from moe_pretrain.system.words import few

_CHANGE = re.compile(r"(?:: |, )([a-z_]\w*(?:\.\w+)*)=.*?\((was|not known then)")
"""One field in the message of an event ``changed``: see ``resume_rules.changes``."""
_BEGINNINGS = ("checkpoint.warm_start", "checkpoint.branch_from")


def warn_of_courses(variants: Sequence[Variant]) -> list[str]:
    """Counted runs whose course was not that of the others."""
    counted = [run for variant in variants for run in variant.counted]
    return [
        *_warn_of_beginnings(variants),
        *_warn_of_changes(counted),
        *_warn_of_schedules(counted),
        *_warn_of_skipped_steps(counted),
        *_warn_of_speeds(variants, counted),
    ]


def _warn_of_beginnings(variants: Sequence[Variant]) -> list[str]:
    """Variants that began with what others had to learn, and seeds that only their beginnings keep apart."""
    found = []
    counted = [variant for variant in variants if variant.counted]
    for field, cost in zip(
        _BEGINNINGS,
        (
            "BEGAN WITH TRAINED WEIGHTS: {}. The tokens and FLOPs behind those are in none of their numbers.",
            "BRANCHED OFF: {}. Up to there they had the settings of the run that they left.",
        ),
        strict=True,
    ):
        began = {variant.name: show(variant.values, field) for variant in counted if variant.values.get(field)}
        if len({began.get(variant.name) for variant in counted}) > 1:
            found.append(cost.format("; ".join(f"{name} ({field}={where})" for name, where in began.items())))
    for field in _BEGINNINGS:
        kin: dict[str, list[Variant]] = {}
        for variant in counted:
            rest = {key: value for key, value in variant.values.items() if key != field}
            if variant.values.get(field):
                kin.setdefault(str(sorted(rest.items())), []).append(variant)
        for own in kin.values():
            seeds = [run.seed for variant in own for run in variant.counted]
            if len(own) > 1 and len(set(seeds)) == len(seeds):
                found.append(
                    f"NOT PUT TOGETHER: {', '.join(variant.name for variant in own)} differ in {field} alone and share "
                    "no seed. If they are seeds of one scheme, nothing here is tested over them."
                )
    return found


def _warn_of_changes(runs: Iterable[RunRecord]) -> list[str]:
    """Runs that were resumed with other settings of what decides the result."""
    told = []
    for run in runs:
        for event in run.events:
            if event["event"] == "changed" and (fields := sorted(filter(decides, changed_fields(event["message"])))):
                told.append(f"{run.name} ({', '.join(fields)} at step {event['step']:,})")
    if not told:
        return []
    return [f"CHANGED MIDWAY: {few(told)}. They are counted as if they had their last settings from the start."]


def changed_fields(message: str) -> list[str]:
    """Fields that an event ``changed`` names, without those that an earlier release did not know."""
    return [name for name, how in _CHANGE.findall(message) if how == "was"]


def _warn_of_schedules(runs: Sequence[RunRecord]) -> list[str]:
    """Runs whose learning rate had not come down at their end."""
    last_words = {run.name: [event["message"] for event in run.events if event["event"] == "finished"] for run in runs}
    cut = [name for name, messages in last_words.items() if NOT_AT_ITS_END in "".join(messages[-1:])]
    if not cut:
        return []
    return [
        f"THE LEARNING RATE HAD NOT COME DOWN at the end of {len(cut)} of {len(runs)} runs ({few(cut)}): their "
        "schedules were cut off, and losses fall at the end of one."
    ]


def _warn_of_skipped_steps(runs: Iterable[RunRecord]) -> list[str]:
    """Runs with steps whose loss or gradient was not finite: they changed nothing, and count as steps."""
    told = []
    for run in runs:
        skipped = sum(event["event"] == "step_skipped" for event in run.events)
        if skipped:
            told.append(f"{run.name}: {skipped:,} of {run.last.get('step', 0):,}")
    if not told:
        return []
    return [f"SKIPPED STEPS, which changed nothing and count as read: {few(told)}."]


def _warn_of_speeds(variants: Sequence[Variant], runs: Iterable[RunRecord]) -> list[str]:
    """Variants and runs whose speed is of several settings."""
    told = []
    for variant in variants:
        for field in sorted(SPEED):
            values = dict.fromkeys(show(run.values, field) for run in variant.counted)
            if len(values) > 1:
                told.append(f"{variant.name} ({field}={' and '.join(values)})")
    for run in runs:
        fields = {
            name
            for event in run.events
            if event["event"] == "changed"
            for name in changed_fields(event["message"])
            if name in SPEED
        }
        told += [f"{run.name} ({', '.join(sorted(fields))} changed on the way)"] if fields else []
    if not told:
        return []
    return [f"Speeds are over several settings and do not compare: {few(told)}."]
