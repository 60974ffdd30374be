"""Results of tasks, variant against variant: by the statistics of the loss, over seeds and resampled documents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moe_pretrain.analysis.compare.bootstrap import FEW_DOCUMENTS, RESAMPLES
from moe_pretrain.analysis.compare.statistics import Difference, Estimate, Sample, Verdict, difference, estimate
from moe_pretrain.analysis.compare.variants import Variant
from moe_pretrain.run_folder.record import RunRecord
from moe_pretrain.run_folder.task_results import TaskMetric, TaskResult, TaskResultFiles, resampled_documents

TASKS_NOTE = (
    "Of each run's last step: mean over seeds with its 95% t-interval. Difference: to the reference, seed by seed, "
    "with its 95% interval by Student's t over the seeds and resampled documents, paired too where runs were asked the "
    "same questions. Each row is a test by itself: of twenty rows one is told from the reference by chance."
)


@dataclass(frozen=True)
class TaskComparison:
    """One metric of one task.

    Attributes:
        task: Name of the task.
        metric: Name of the metric.
        higher_is_better: None where nobody says, and then nothing is called better.
        documents: Questions that runs were asked; 0 where that is not the same everywhere.
        values: Variant -> seed -> value; of those that have one.
        paired: Variant -> its difference to the reference.
    """

    task: str
    metric: str
    higher_is_better: bool | None
    documents: int
    values: dict[str, dict[int, float]]
    paired: dict[str, Difference]

    def estimate(self, variant: str) -> Estimate | None:
        """Mean of a variant and its interval."""
        return estimate(list(self.values[variant].values()))

    def verdict(self, variant: str, reference: str) -> Verdict:
        """Direction of the difference, if it can be told."""
        found = self.paired[variant].verdict
        if variant == reference:
            return "reference"
        if found not in ("better", "worse"):
            return found
        if self.higher_is_better is None:
            return "not tested"
        return "better" if (found == "worse") == self.higher_is_better else "worse"


def compare_tasks(variants: Sequence[Variant], reference: str) -> tuple[list[TaskComparison], list[str]]:
    """Every metric of every task that a run was asked at its end, and what is missing or does not fit.

    Args:
        variants: Of the comparison.
        reference: Name of the one that the others are compared to.
    """
    warnings: list[str] = []
    found: dict[str, dict[int, dict[str, TaskResult]]] = {}
    for variant in variants:
        found[variant.name] = {run.seed: _results(run, warnings) for run in variant.counted}
    metrics = {
        (name, metric.name): None
        for seeds in found.values()
        for results in seeds.values()
        for name, result in results.items()
        for metric in result.metrics
    }
    compared = [_compare(found, task, metric, reference) for task, metric in metrics]
    for task in dict.fromkeys(name for name, _ in metrics):
        warnings += _warn_of(found, task)
    return compared, warnings


def _results(run: RunRecord, warnings: list[str]) -> dict[str, TaskResult]:
    """Those of the run's last step."""
    files = TaskResultFiles(run.folder)
    try:
        results = files.read(run.last["step"])
    except (OSError, ValueError) as error:
        warnings.append(f"Not used: {error}")
        return {}
    if not results and (steps := files.steps()):
        warnings.append(f"{run.name} has no results of tasks at its last step, only at step {steps[-1]}.")
    return results


def _metric(results: Mapping[str, TaskResult], task: str, metric: str) -> TaskMetric | None:
    own = results[task].metrics if task in results else []
    return next((one for one in own if one.name == metric and one.value is not None), None)


def _compare(
    found: Mapping[str, Mapping[int, Mapping[str, TaskResult]]], task: str, metric: str, reference: str
) -> TaskComparison:
    samples: dict[str, Sample] = {}
    documents: set[int] = set()
    directions: set[bool | None] = set()
    for name, seeds in found.items():
        own = {seed: one for seed, results in seeds.items() if (one := _metric(results, task, metric))}
        values = {seed: one.value for seed, one in own.items() if one.value is not None}
        asked = {seed: seeds[seed][task].fingerprint for seed in own}
        resampled = {seed: _resampled(one) for seed, one in own.items() if one.values}
        documents |= {len(one.values) for one in own.values()}
        directions |= {one.higher_is_better for one in own.values()}
        samples[name] = Sample(values, resampled, asked)
    paired = {name: difference(sample, samples[reference]) for name, sample in samples.items()}
    return TaskComparison(
        task=task,
        metric=metric,
        higher_is_better=directions.pop() if len(directions) == 1 else None,
        documents=documents.pop() if len(documents) == 1 else 0,
        values={name: dict(sample.losses) for name, sample in samples.items()},
        paired=paired,
    )


def _resampled(metric: TaskMetric) -> np.ndarray:
    """The metric over resampled documents [resamples], stretched as the losses are (``bootstrap``)."""
    count = len(metric.values)
    drawn = metric.of_resampled(resampled_documents(count, RESAMPLES))
    stretch = (count / (count - 1)) ** 0.5 if count > 1 else 0.0
    assert metric.value is not None
    return metric.value + stretch * (drawn - metric.value)


def _warn_of(found: Mapping[str, Mapping[int, Mapping[str, TaskResult]]], task: str) -> list[str]:
    """Runs that were not asked, were asked something else, or went by another rule than in training."""
    all_results = [results.get(task) for seeds in found.values() for results in seeds.values()]
    asked = [result for result in all_results if result is not None]
    warnings = []
    if len(asked) < len(all_results):
        without = [name for name, seeds in found.items() if any(task not in results for results in seeds.values())]
        missing = len(all_results) - len(asked)
        warnings.append(f"Task {task}: {missing} finished runs have no results ({', '.join(without)}).")
    if len({result.fingerprint for result in asked}) > 1:
        warnings.append(f"TASK {task} IS NOT THE SAME in all runs: its questions or examples differ.")
    fewest = min(asked, key=lambda result: result.documents)
    if fewest.documents < fewest.of_documents:
        warnings.append(f"Task {task}: only {fewest.documents:,} of {fewest.of_documents:,} questions were asked.")
    elif fewest.documents < FEW_DOCUMENTS:
        warnings.append(f"Task {task} has only {fewest.documents} questions: they tell little of what others would.")
    return warnings
