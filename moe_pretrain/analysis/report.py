"""One run as one self-contained HTML page, readable while the run goes on."""

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from moe_pretrain.analysis import findings, run_charts
from moe_pretrain.analysis.compare.charts import incident_chart
from moe_pretrain.analysis.figures import column
from moe_pretrain.analysis.findings import COST_NOTE, INFORMATION_NOTE, TIME_NOTE
from moe_pretrain.analysis.html import charts, facts, folded, legend, page, section, table
from moe_pretrain.analysis.measures import INCIDENT_HEADER, at_end, incidents, not_judged
from moe_pretrain.metrics.step_rows import read_part_times
from moe_pretrain.run_folder.metrics_file import MetricsRow, read_rows
from moe_pretrain.run_folder.paths import CONFIG_FILE, METRICS_FILE, REPORT_FILE
from moe_pretrain.run_folder.provenance import read_config, read_summary
from moe_pretrain.run_folder.record import flatten, load_rows, show
from moe_pretrain.run_folder.task_results import TaskResultFiles
from moe_pretrain.system.files import write_whole
from moe_pretrain.system.words import short_duration, short_number

_MAX_EVENTS = 200
_UNKNOWN = "not recorded"


def _lookup(config: dict[str, Any], *paths: str) -> Any:
    """Return the first of several dotted paths that leads to a scalar, else None."""
    for path in paths:
        value: Any = config
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None and not isinstance(value, dict | list):
            return value
    return None


def _router(config: dict[str, Any]) -> Any:
    """The scheme, or the schemes by layer."""
    found = _lookup(config, "router", "router.name", "moe.router", "moe.router.name")
    name = show(flatten(config), "router.name")
    return name if found is not None and name.startswith(f"{found}{{") else found


def _median(rows: list[MetricsRow], key: str) -> float | None:
    values = column(rows, key)
    values = values[~np.isnan(values)]
    return float(np.median(values)) if len(values) else None


def summarise(run_dir: Path, rows: dict[str, list[MetricsRow]] | None = None) -> dict[str, Any]:
    """Collect the numbers that describe a run so far, for the page and the console.

    Args:
        run_dir: Run folder with ``metrics.jsonl``; ``config.yaml`` and ``summary.json`` add to it.
        rows: What ``load_rows`` returned, when the caller has it already.

    Returns:
        Names and values; None for what is not recorded, or was not finite. Losses are in nats per
        token, the final ones those of the last row of their kind.

    Raises:
        ValueError: The folder has no metrics, or no train rows yet.
    """
    rows = rows or load_rows(run_dir)
    config = read_config(run_dir)
    recorded = read_summary(run_dir)
    train, validation = rows["train"], rows["validation"]
    everything = [row for kind in rows.values() for row in kind]
    last, last_validation = train[-1], validation[-1] if validation else {}
    validation_losses = [row["validation/loss"] for row in validation]
    return {
        "run_name": run_dir.resolve().name,  # not the recorded one: a copy is the run where it lies
        "router": _router(config),
        "model": _lookup(config, "model", "model.name", "model.size"),
        "total_parameters": recorded.get("total_parameters"),
        "active_parameters": recorded.get("active_parameters"),
        "flops_per_token": recorded.get("flops_per_token"),
        "steps": last["step"],
        "tokens": last["tokens"],
        "final_train_loss": last["train/loss"],
        "final_validation_loss": last_validation.get("validation/loss"),
        "final_validation_step": last_validation.get("step"),
        "best_validation_loss": min((v for v in validation_losses if v is not None), default=None),
        "final_perplexity": last_validation.get("validation/perplexity"),
        "final_bits_per_byte": last_validation.get("validation/bits_per_byte"),
        "unigram_cross_entropy": recorded.get("unigram_cross_entropy"),
        "causal_in_evaluation": recorded.get("causal_in_evaluation"),
        "experts_per_token": at_end(train, "experts_per_token"),
        "validation_experts_per_token": at_end(validation[-1:], "validation_experts_per_token"),
        "zero_computation_share": at_end(train, "zero_computation_share"),
        "mean_route_cost": at_end(train, "mean_route_cost"),
        "load_max_over_even_cost": at_end(train, "load_max_over_even_cost"),
        "active_experts": at_end(train, "active_experts"),
        "tokens_per_second_median": _median(train, "train/tokens_per_second"),
        "model_flops_utilization_median": _median(train, "train/model_flops_utilization"),
        "peak_memory_bytes": max((row.get("train/peak_memory_bytes") or 0 for row in train), default=0) or None,
        "wall_seconds": max(row["seconds"] for row in everything),
        "resumes": max(row["attempt"] for row in everything),
        "device": recorded.get("device"),
        "corpus_fingerprint": recorded.get("corpus_fingerprint"),
        "versions": recorded.get("versions") or {},
        "commit": recorded.get("commit"),
    }


def _facts(summary: dict[str, Any]) -> dict[str, str]:
    """Word the summary for the page: label to text."""

    def number(key: str, spec: str = "") -> str:
        value = summary[key]
        if value is None:
            return _UNKNOWN
        return format(value, spec) if spec else short_number(value)

    def word(key: str) -> str:
        return str(summary[key] or _UNKNOWN)

    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    validated = summary["final_validation_step"]
    when = "" if validated in (None, summary["steps"]) else f" at step {validated:,d}"
    loss = summary["final_train_loss"]  # every train row has one; null if it was NaN or infinite
    memory = summary["peak_memory_bytes"]
    leak = (
        {"Losses": "know later tokens, which no language model's do"}
        if summary["causal_in_evaluation"] is False
        else {}
    )
    of_schemes = {
        "Routes to zero-computation experts": ("zero_computation_share", ".1%"),
        "Width of a route's expert over the mean": ("mean_route_cost", ".3f"),
        "Busiest expert by routes times width over the mean": ("load_max_over_even_cost", ".3f"),
        "Experts in use per layer": ("active_experts", ".3g"),
    }
    return {
        "Run": str(summary["run_name"]),
        "Router": word("router"),
        "Model": word("model"),
        "Total parameters": number("total_parameters"),
        "Active parameters": number("active_parameters"),
        "FLOPs per token": number("flops_per_token"),
        "Tokens": number("tokens"),
        "Steps": number("steps", ",d"),
        "Final train loss": "not finite" if loss is None else f"{loss:.4f}",
        "Final validation loss": number("final_validation_loss", ".4f") + when,
        "Best validation loss": number("best_validation_loss", ".4f"),
        "Validation perplexity": number("final_perplexity", ".2f"),
        "Bits per byte": number("final_bits_per_byte", ".4f"),
        "Unigram cross-entropy of the validation text": number("unigram_cross_entropy", ".4f"),
        **leak,
        "Experts per token in training": number("experts_per_token", ".3g"),
        "Experts per token in evaluation": number("validation_experts_per_token", ".3g"),
        **{label: number(key, spec) for label, (key, spec) in of_schemes.items() if summary[key] is not None},
        "Tokens per second, median": number("tokens_per_second_median"),
        "Model FLOPs utilisation, median": number("model_flops_utilization_median", ".1%"),
        "Peak memory of one device": f"{memory / 2**30:.1f} GiB" if memory else _UNKNOWN,
        "Wall time": short_duration(summary["wall_seconds"]),
        "Resumes": number("resumes", "d"),
        "Device": word("device"),
        "Corpus fingerprint": word("corpus_fingerprint"),
        "Commit": word("commit"),
        "Versions": versions or _UNKNOWN,
    }


def _event_table(events: list[MetricsRow]) -> str:
    if not events:
        return section("Events", "<p>None so far.</p>")
    note = f"The last {_MAX_EVENTS} of {len(events)}." if len(events) > _MAX_EVENTS else ""
    lines = [
        (short_duration(row["seconds"]), f"{row['step']:,d}", row["attempt"], row["event"], row["message"])
        for row in reversed(events[-_MAX_EVENTS:])
    ]
    header = ("Wall time", "Step", "Attempt", "Event", "Message")
    return section("Events, newest first", table(header, lines), note)


def _chart_sections(rows: dict[str, list[MetricsRow]], unigram_cross_entropy: float | None) -> list[str]:
    train = rows["train"]
    loss = run_charts.loss_charts(train, rows["validation"], rows["event"], unigram_cross_entropy)
    router, colors = run_charts.router_charts(train, rows["validation"])
    load_note = (
        "Experts from top to bottom, steps from left to right. The colour is an expert's share of"
        " the routes times the number of experts: blue gets too few tokens, red too many."
    )
    if router:
        router.insert(0, legend({f"layer {int(layer)}": color for layer, color in colors.items()}))
    return [
        charts("Loss", loss, layout="single"),
        charts("Expert load", run_charts.expert_load_charts(train), load_note, layout="scroll"),
        charts("Router, one line per layer", router),
        charts("Auxiliary losses", run_charts.aux_loss_charts(train), "Unweighted, mean over layers."),
        charts("Optimiser", run_charts.optimizer_charts(train)),
        charts("Throughput", run_charts.throughput_charts(train)),
    ]


def _task_sections(run_dir: Path, rows: list[MetricsRow]) -> list[str]:
    """The newest results of tasks, and their course in training; nothing for a run that was never asked."""
    files = TaskResultFiles(run_dir)
    steps = files.steps()
    if not steps:
        return []
    lines = [
        (
            result.name,
            metric.name,
            "not finite" if metric.value is None else f"{metric.value:.4f}",
            "" if metric.error is None else f"{metric.error:.4f}",
            result.num_fewshot,
            f"{result.documents:,d} of {result.of_documents:,d}",
            result.rule,
        )
        for result in files.read(steps[-1]).values()
        for metric in result.metrics
    ]
    header = ("Task", "Metric", "Value", "Standard error", "Examples", "Questions", "Routing")
    note = f"lm-evaluation-harness, at step {steps[-1]:,d}; the error is over questions."
    sections = [section("Tasks", table(header, lines), note)]
    return [*sections, charts("Tasks in training", run_charts.task_charts(rows))] if rows else sections


def _incident_section(name: str, events: list[MetricsRow], config: dict[str, Any]) -> str:
    found, missing = incidents(events), not_judged(flatten(config))
    unknown = (
        f"The run did not judge {' and '.join(missing)}: its configuration has no settings for that." if missing else ""
    )
    if not found:
        return section("Incidents", "<p>The run recorded none.</p>", unknown)
    lines = [(each.kind, f"{each.row['step']:,d}", each.row["message"]) for each in found]
    body = f'<div class="single">{incident_chart({name: found})[0]}</div>{table(INCIDENT_HEADER, lines[:_MAX_EVENTS])}'
    cut = f"The first {_MAX_EVENTS} of {len(found)}." if len(found) > _MAX_EVENTS else ""
    return section("Incidents", body, " ".join(note for note in (cut, unknown) if note))


def _finding_sections(run_dir: Path, rows: dict[str, list[MetricsRow]], recorded: dict[str, Any]) -> list[str]:
    """Time and cost of the layer, and what ``specialise`` and ``certify`` have found; nothing for a dense model."""
    experts = at_end(rows["train"], "experts_per_token")
    if experts is None:
        return []
    cost = findings.cost_cells(recorded, experts)
    certificate = findings.certificate(run_dir)
    information = findings.normalised_information(run_dir)
    times = findings.time_cells([found for row in rows["validation"][-1:] if (found := read_part_times(row))])
    sections = [section("Time by part of a MoE layer", table(list(times), [list(times.values())]), TIME_NOTE)]
    if cost:
        sections.append(section("Cost by part of a MoE layer", table(list(cost), [list(cost.values())]), COST_NOTE))
    if information is None:
        sections.append(
            section("Specialisation", f"<p>Not measured: moe-pretrain specialise {escape(str(run_dir))}</p>")
        )
    else:
        lines = [[kind, findings.information_cell(pairs)] for kind, pairs in information.items()]
        sections.append(section("Specialisation", table(("By", "Normalised information"), lines), INFORMATION_NOTE))
    if certificate is None:
        sections.append(section("Certificate", f"<p>None: moe-pretrain certify {escape(str(run_dir))}</p>"))
    else:
        note = f"{certificate.outcome}. Code: {certificate.code[:12]}."
        sections.append(
            section("Certificate", table(("Does not simply pass",), [[x] for x in certificate.others]), note)
        )
    return sections


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run folder.

    Args:
        run_dir: Run folder with ``metrics.jsonl``; the run may still be going on.

    Returns:
        The page: one file that loads nothing else.

    Raises:
        ValueError: The folder has no metrics, or no train rows yet.
    """
    rows = load_rows(run_dir)
    summary = summarise(run_dir, rows)
    sections = [
        section("Key facts", facts(_facts(summary))),
        *_chart_sections(rows, summary["unigram_cross_entropy"]),
        *_task_sections(run_dir, rows["tasks"]),
        _incident_section(str(summary["run_name"]), rows["event"], read_config(run_dir)),
        *_finding_sections(run_dir, rows, read_summary(run_dir)),
        _event_table(rows["event"]),
    ]
    config_path = run_dir / CONFIG_FILE
    if config_path.exists():
        sections.append(folded("Configuration", config_path.read_text(encoding="utf-8")))
    name = str(summary["run_name"])
    text = page(name, f"Pretraining run, as of step {summary['steps']:,d}.", sections)
    path = run_dir / REPORT_FILE
    write_whole(path, text)
    return path


def write_last_report(folder: Path, say: Callable[[str], None]) -> None:
    """Write the report of a run that has just ended and say where it is; a failure is a line, not the run's."""
    if not any(row["kind"] == "train" for row in read_rows(folder / METRICS_FILE)):
        return  # stopped before the first row: there is nothing to report yet
    try:
        report = write_report(folder)
    except (OSError, ValueError) as error:
        return say(f"the report could not be written: {error}")
    say(f"report:     {report}")
