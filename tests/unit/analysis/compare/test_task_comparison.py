"""Tasks in a comparison: planted differences over documents are found with the right sign, and gaps are said."""

from pathlib import Path

import numpy as np
import pytest
from helpers.pages import read_page
from helpers.planted import BASE, STEPS, plant_sweep

from moe_pretrain.analysis.compare.comparison import Comparison, compare
from moe_pretrain.analysis.compare.page import write_comparison
from moe_pretrain.analysis.compare.task_comparison import TaskComparison
from moe_pretrain.run_folder.task_results import TaskMetric, TaskResult, TaskResultFiles

DOCUMENTS = 200
HARD = np.random.default_rng(5).normal(size=DOCUMENTS)


def plant(folder: Path, seed: int, better: float, step: int = STEPS, asked: str = "same") -> None:
    """Accuracy and loss per document: what is hard is so for every run, the rest is noise of the run's own."""
    noise = np.random.default_rng([seed, round(100 * abs(better))]).normal(scale=0.1, size=DOCUMENTS)
    right = (HARD + noise < better).astype(float).tolist()
    nats, size = (-3 + better + 0.2 * HARD + noise).tolist(), [2.0] * DOCUMENTS
    metrics = [
        TaskMetric("acc", sum(right) / DOCUMENTS, 0.03, True, "mean", right, []),
        TaskMetric("bits", -sum(nats) / sum(size) / np.log(2), 0.1, False, "bits_per_byte", nats, size),
        TaskMetric("unknown", better + seed / 1000, None, None, "other", [], []),
    ]
    result = TaskResult("facts", "1", 0, DOCUMENTS, DOCUMENTS, asked, "", metrics)
    TaskResultFiles(folder).add(step, [result])


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    root = plant_sweep(tmp_path / "sweep")
    for seed in BASE:
        plant(root / f"top_k-{seed}", seed, 0.0)
        plant(root / f"top_p-{seed}", seed, -0.6)
        plant(root / "deep" / f"autonomy-{seed}", seed + 10, 0.0)
    return root


def of(found: Comparison, metric: str) -> TaskComparison:
    return next(task for task in found.tasks if task.metric == metric)


def test_a_worse_variant_is_worse_in_what_should_be_high_and_in_what_should_be_low(sweep: Path):
    found = compare(sweep)
    for metric, sign in (("acc", -1), ("bits", 1)):
        task = of(found, metric)
        verdicts = {name: task.verdict(name, found.reference) for name in task.values}
        assert verdicts == {"top_k": "reference", "top_p": "worse", "autonomy": "not distinguishable"}
        apart = task.paired["top_p"]
        assert apart.over_texts and apart.is_paired and apart.difference.mean * sign > 0.1
        backwards = compare(sweep, "top_p")
        assert of(backwards, metric).verdict("top_k", "top_p") == "better"
    assert of(found, "bits").paired["top_p"].difference.mean == pytest.approx(0.6 / 2 / np.log(2), abs=0.02)
    assert of(found, "unknown").verdict("top_p", "top_k") == "not tested", "nobody says which way is better"
    assert not of(found, "unknown").paired["top_p"].over_texts and found.warnings == []


def test_pairing_by_document_tells_more_than_the_documents_alone(sweep: Path):
    """The spread of one value over documents is far wider than that of the difference, which pairs them."""
    task = of(compare(sweep), "bits")
    difference = task.paired["autonomy"].difference
    alone = 2 * 1.96 * 0.2 / np.sqrt(DOCUMENTS) / 2 / np.log(2)
    assert difference.high - difference.low < alone


def test_the_pages_and_tables_have_them(sweep: Path):
    page, text = write_comparison(sweep)
    assert "| facts | acc | top_p | worse |" in text and "Each row is a test by itself" in text
    shown = read_page(page).text
    assert shown[shown.index("Tasks") :][2:9] == [
        "Task",
        "Metric",
        "Variant",
        "Verdict",
        "Value",
        "Difference",
        "Documents",
    ]
    for file in ("compare.csv", "compare_runs.csv"):
        header = (sweep / file).read_text().splitlines()[0].split(",")
        assert ("facts_acc_mean" if file == "compare.csv" else "facts_acc") in header


def test_what_was_not_asked_or_asked_otherwise_is_said(sweep: Path):
    plant(sweep / "top_p-2", 2, -0.6, asked="other examples")
    TaskResultFiles(sweep / "top_k-3").path(STEPS).unlink()
    plant(sweep / "top_k-3", 3, 0.0, step=STEPS - 20)
    found = compare(sweep)
    assert found.warnings == [
        "top_k-3 has no results of tasks at its last step, only at step 80.",
        "Task facts: 1 finished runs have no results (top_k).",
        "TASK facts IS NOT THE SAME in all runs: its questions or examples differ.",
    ]
    apart = of(found, "acc").paired["top_p"]
    assert apart.seeds == [1, 2] and apart.over_texts
