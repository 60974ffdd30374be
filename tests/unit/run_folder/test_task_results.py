"""Results of tasks on the disk: what is added, replaced and removed, and errors by their formulas."""

import math
from pathlib import Path

import numpy as np
import pytest

from moe_pretrain.run_folder.task_results import TaskMetric, TaskResult, TaskResultFiles, standard_error


def result(name: str, values: list[float], weights: list[float] | None = None, kind: str = "mean") -> TaskResult:
    value = sum(values) / sum(weights or [1] * len(values))
    metric = TaskMetric("acc", value, 0.1, True, kind, values, weights or [])  # type: ignore[arg-type]
    return TaskResult(name, "1", 0, len(values), len(values), "hash", "", [metric])


def test_tasks_of_a_step_are_kept_beside_each_other_and_replaced_by_name(tmp_path: Path):
    files = TaskResultFiles(tmp_path)
    assert files.steps() == [] and files.read(3) == {}
    files.add(3, [result("a", [0.0, 1.0]), result("b", [1.0])])
    files.add(3, [result("a", [1.0, 1.0])])
    files.add(12, [result("a", [0.5])])
    assert files.steps() == [3, 12]
    assert files.read(3) == {"a": result("a", [1.0, 1.0]), "b": result("b", [1.0])}
    files.remove_after(3)
    assert files.steps() == [3]
    files.path(3).write_text('{"tasks": {"a": {}}}')
    with pytest.raises(ValueError, match="step_00000003.json is broken"):
        files.read(3)


def test_a_metric_of_resampled_documents_is_that_of_the_documents_drawn():
    values, weights = [-6.0, -3.0, -20.0], [2.0, 3.0, 5.0]
    drawn = np.array([[1, 1, 1], [0, 3, 0], [2, 0, 1]])
    for kind, of in (
        ("bits_per_byte", lambda mean: -mean / math.log(2)),
        ("weighted_perplexity", lambda mean: math.exp(-mean)),
    ):
        found = TaskMetric("m", None, None, None, kind, values, weights).of_resampled(drawn)
        means = [-29 / 10, -1.0, -32 / 9]
        assert found == pytest.approx([of(mean) for mean in means])
    plain = TaskMetric("m", None, None, None, "perplexity", values, []).of_resampled(drawn)
    assert plain == pytest.approx([math.exp(29 / 3), math.exp(3), math.exp(32 / 3)])


def test_standard_errors():
    random = np.random.default_rng(0)
    values, weights = random.normal(-300, 30, 400).tolist(), random.integers(80, 120, 400).tolist()
    assert standard_error("mean", values, []) == pytest.approx(np.std(values, ddof=1) / 20)
    # Of a ratio by the delta method.
    ratio = sum(values) / sum(weights)
    residuals = np.array(values) - ratio * np.array(weights)
    expected = np.std(residuals, ddof=1) / 20 / np.mean(weights) / math.log(2)
    assert standard_error("bits_per_byte", values, weights) == pytest.approx(expected, rel=0.1)
    assert standard_error("mean", [1.0], []) is None and standard_error("other", [], []) is None
