"""Tasks on a model: the harness asks and judges, the results become the run folder's."""

import contextlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
import lm_eval.api.metrics as harness_metrics
import numpy as np
import torch
import xxhash
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks.manager import TaskDict

from moe_pretrain.config.schema import ConfigError
from moe_pretrain.inference.cached_decoder import check_generates
from moe_pretrain.inference.corpus_loss import check_likelihood
from moe_pretrain.inference.harness.language_model import HarnessModel
from moe_pretrain.inference.harness.tasks import quiet, seed_examples
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.run_folder.task_results import Kind, TaskMetric, TaskResult, standard_error
from moe_pretrain.system.words import one_line

_KINDS: dict[Any, Kind] = {
    harness_metrics.mean: "mean",
    harness_metrics.perplexity: "perplexity",
    harness_metrics.weighted_perplexity: "weighted_perplexity",
    harness_metrics.bits_per_byte: "bits_per_byte",
}
_NO_VERSION = "Yaml"
_NO_FILTER = "none"
_GENERATED = "generate_until"


def check_router(model: DecoderLM, name: str, tasks: TaskDict) -> str:
    """The rule that routing goes by where that is not the rule of training; else empty.

    Args:
        model: The model; without storage it does as well.
        name: Name of its scheme.
        tasks: Those that are to be evaluated.

    Raises:
        ConfigError: The scheme has no likelihood of a next token, or cannot generate what a task asks for.
    """
    rule = check_likelihood(model, name)
    for task in tasks["tasks"].values():
        if task.OUTPUT_TYPE == _GENERATED:
            try:
                check_generates(model, name)
            except ConfigError as error:
                raise ConfigError(f"task {task.task_name} asks for texts: {error}") from None
    return rule


def evaluate_tasks(model: HarnessModel, tasks: TaskDict, max_documents: int | None, rule: str) -> list[TaskResult]:
    """Results of every task and group, the same on every rank; nothing else of the process changes.

    Args:
        model: For the harness; every rank that shares the work must call this.
        tasks: From ``load_tasks``.
        max_documents: Questions of each task that are asked, the first ones; None for all.
        rule: From ``check_router``.

    Raises:
        ConfigError: A task does not fit its data, or this model.
    """
    seed_examples(tasks)
    with _same_random_state(), quiet():
        try:
            # Standard errors are ours: the harness forks processes for some.
            found: Any = evaluate(model, tasks, limit=max_documents, bootstrap_iters=0, log_samples=True)
        except jinja2.TemplateError as error:
            raise ConfigError(f"a task's template does not fit its data: {one_line(error)}") from error
    results = [_task_result(task, found, rule) for task in tasks["tasks"].values()]
    return results + [_group_result(name, found, results, rule) for name in tasks.get("groups", {})]


@contextlib.contextmanager
def _same_random_state() -> Iterator[None]:
    """Leave the process's random numbers as they are: tasks may draw from them, and a run must not notice."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _task_result(task: Task, found: Mapping[str, Any], rule: str) -> TaskResult:
    name = task.task_name
    samples = found["samples"][name]
    digest = xxhash.xxh3_128(name.encode())
    hashed = ("filter", "doc_id", "doc_hash", "prompt_hash", "target_hash")
    for sample in samples:
        digest.update("\n".join(str(sample[key]) for key in hashed).encode())
    counts = found["n-samples"][name]
    better = found["higher_is_better"].get(name) or {}
    metrics = []
    for key, value in found["results"][name].items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        own = [one[metric] for one in samples if one["filter"] == filter_name and metric in one]
        kind: Kind = _KINDS.get(task.aggregation().get(metric, harness_metrics.mean), "other")
        metrics.append(_metric(_label(metric, filter_name), value, better.get(metric), kind, own))
    return TaskResult(
        name=name,
        version="" if task.VERSION in (None, _NO_VERSION) else str(task.VERSION),
        num_fewshot=int(found["n-shot"].get(name) or 0),
        documents=int(counts["effective"]),
        of_documents=int(counts["original"]),
        fingerprint=digest.hexdigest(),
        rule=rule,
        metrics=metrics,
    )


def _metric(name: str, value: Any, higher_is_better: bool | None, kind: Kind, own: Sequence[Any]) -> TaskMetric:
    """One metric with the values of its documents, where they are numbers, or sums with weights."""
    values: list[float] = []
    weights: list[float] = []
    if kind in ("weighted_perplexity", "bits_per_byte"):
        values, weights = ([float(pair[side]) for pair in own] for side in (0, 1))
    elif kind != "other":
        values = [float(each) for each in own]
    if not all(map(math.isfinite, values)):
        kind, values, weights = "other", [], []
    error = standard_error(kind, values, weights)
    finite = float(value) if isinstance(value, int | float | np.number) and math.isfinite(value) else None
    return TaskMetric(name, finite, error, higher_is_better, kind, values, weights)


def _group_result(name: str, found: Mapping[str, Any], tasks: Sequence[TaskResult], rule: str) -> TaskResult:
    """A group's aggregates, without documents: those are its tasks'."""
    inside = _leaves(name, found["group_subtasks"])
    members = [task for task in tasks if task.name in inside]
    metrics = [
        _metric(_label(*key.split(",", 1)), value, None, "other", [])
        for key, value in found["results"].get(name, {}).items()
        if "," in key and "_stderr," not in key
    ]
    return TaskResult(
        name=name,
        version=str(found["versions"].get(name) or ""),
        num_fewshot=max((task.num_fewshot for task in members), default=0),
        documents=sum(task.documents for task in members),
        of_documents=sum(task.of_documents for task in members),
        fingerprint=xxhash.xxh3_128_hexdigest("".join(task.fingerprint for task in members).encode()),
        rule=rule,
        metrics=metrics,
    )


def _leaves(name: str, children: Mapping[str, Sequence[str]]) -> set[str]:
    below = children.get(name)
    return set().union(*(_leaves(child, children) for child in below)) if below else {name}


def _label(metric: str, filter_name: str) -> str:
    return metric if filter_name == _NO_FILTER else f"{metric}[{filter_name}]"
