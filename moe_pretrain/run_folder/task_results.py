"""Results of tasks in a run's folder: a file for each checkpoint or step, with the value of every document.

Axis names:
    documents  questions of a task, in its order
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moe_pretrain.run_folder.paths import TASK_RESULTS, task_result_file, task_result_step
from moe_pretrain.system.files import read_json, write_whole

Kind = Literal["mean", "perplexity", "weighted_perplexity", "bits_per_byte", "other"]
"""Function of the documents' values that a metric is; ``other`` is none that documents can be resampled for."""
_RESAMPLES = 1000


@dataclass(frozen=True)
class TaskMetric:
    """One metric of a task.

    Attributes:
        name: Of the metric, and of the harness's filter in brackets where it has one.
        value: As the harness aggregates it; None where it is not finite.
        error: Its standard error over documents; None where there is none.
        higher_is_better: None where nobody says.
        kind: Function of the documents that it is.
        values: Of each document [documents]: the metric, or its sum where documents have weights; empty for ``other``.
        weights: Of each document [documents]: words or bytes; empty where all count alike.
    """

    name: str
    value: float | None
    error: float | None
    higher_is_better: bool | None
    kind: Kind
    values: list[float]
    weights: list[float]

    def of_resampled(self, drawn: np.ndarray) -> np.ndarray:
        """The metric over resampled documents [resamples], of how often each is drawn [resamples, documents]."""
        values = np.array(self.values)
        weights = np.array(self.weights) if self.weights else np.ones(len(values))
        mean = (drawn @ values) / (drawn @ weights)
        with np.errstate(over="ignore"):
            return {"mean": mean, "bits_per_byte": -mean / math.log(2)}.get(self.kind, np.exp(-mean))


@dataclass(frozen=True)
class TaskResult:
    """One task on one checkpoint.

    Attributes:
        name: Of the task, or of a group of tasks.
        version: Of the task, as its file says; empty without one.
        num_fewshot: Examples before each question.
        documents: Questions that were asked.
        of_documents: Questions that the task has.
        fingerprint: Hash of all questions with their prompts and answers; equal where results can be paired.
        rule: What routing went by where that is not the rule of training; else empty.
        metrics: Its metrics.
    """

    name: str
    version: str
    num_fewshot: int
    documents: int
    of_documents: int
    fingerprint: str
    rule: str
    metrics: list[TaskMetric]


def standard_error(kind: Kind, values: list[float], weights: list[float]) -> float | None:
    """Standard error over documents: of a mean in closed form, as in the harness, else by bootstrap."""
    count = len(values)
    if kind == "other" or count < 2:
        return None
    if kind == "mean":
        return float(np.std(values, ddof=1) / math.sqrt(count))
    drawn = resampled_documents(count, _RESAMPLES)
    error = float(np.std(TaskMetric("", None, None, None, kind, values, weights).of_resampled(drawn), ddof=1))
    return error if math.isfinite(error) else None


def resampled_documents(count: int, resamples: int) -> np.ndarray:
    """Draws of each of ``count`` documents in each resample [resamples, documents]; the same in every call."""
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=resamples)


class TaskResultFiles:
    """The results of a run folder, by step."""

    def __init__(self, run_folder: Path):
        self._run_folder = run_folder

    def steps(self) -> list[int]:
        """Steps that have results, rising."""
        folder = self._run_folder / TASK_RESULTS
        paths = folder.iterdir() if folder.is_dir() else ()
        return sorted(step for path in paths if (step := task_result_step(path)) is not None)

    def path(self, step: int) -> Path:
        """Path of the results of ``step``."""
        return task_result_file(self._run_folder, step)

    def read(self, step: int) -> dict[str, TaskResult]:
        """Results of ``step`` by the name of the task; none where nothing was evaluated.

        Raises:
            ValueError: The file is damaged.
        """
        path = self.path(step)
        if not path.exists():
            return {}
        try:
            return {name: _result(values) for name, values in read_json(path)["tasks"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is broken ({type(error).__name__} {error}): delete it to go on") from None

    def add(self, step: int, results: Iterable[TaskResult]) -> Path:
        """Write results of ``step`` beside those of other tasks; of a task that has some they take the place.

        Raises:
            OSError: They cannot be written.
            ValueError: What is there is damaged.
        """
        path = self.path(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        found = self.read(step) | {result.name: result for result in results}
        tasks = {name: asdict(result) for name, result in sorted(found.items())}
        write_whole(path, json.dumps({"step": step, "tasks": tasks}, allow_nan=False) + "\n")  # compact: it is long
        return path

    def remove_after(self, step: int) -> None:
        """Remove the results of steps that a resumed run will do again."""
        for each in self.steps():
            if each > step:
                self.path(each).unlink()


def _result(values: Mapping[str, Any]) -> TaskResult:
    return TaskResult(**{**values, "metrics": [TaskMetric(**metric) for metric in values["metrics"]]})
