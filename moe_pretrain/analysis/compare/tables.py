"""The tables of a comparison: lines of text for the page and Markdown, and rows of numbers for CSV."""

import csv
import io
import math
from collections.abc import Sequence
from statistics import fmean

import numpy as np

from moe_pretrain.analysis import findings
from moe_pretrain.analysis.compare.bootstrap import RESAMPLES
from moe_pretrain.analysis.compare.comparison import MEASURES, Comparison
from moe_pretrain.analysis.compare.scaling import SCALING_NOTE, Scaling
from moe_pretrain.analysis.compare.statistics import Estimate, Ranked
from moe_pretrain.analysis.compare.task_comparison import TASKS_NOTE
from moe_pretrain.analysis.compare.tuning import RESAMPLES as RESAMPLED_CHOICES
from moe_pretrain.analysis.compare.variants import Variant
from moe_pretrain.analysis.ladder import Table
from moe_pretrain.analysis.measures import part_times
from moe_pretrain.moe.part_timer import PARTS, LayerPart
from moe_pretrain.run_folder.record import MISSING, RunRecord, differences
from moe_pretrain.system.words import short_number


def markdown(found: Comparison) -> str:
    """The main result as a Markdown table with what it rests on."""
    text = markdown_table(answer(found))
    tuned = f"\n{markdown_table(tuning(found))}\n\n{TUNING_NOTE}\n" if found.tuned else ""
    cautions = "".join(f"\n- {escaped(line)}" for line in found.warnings)
    tasks = f"\n{markdown_table(task_table(found))}\n\n{TASKS_NOTE}\n" if found.tasks else ""
    return f"{text}\n\n{escaped(method(found))}\n{_scaling(found.scaling)}{tuned}{tasks}" + (
        f"\nTo be aware of:\n{cautions}\n" if cautions else ""
    )


def _scaling(found: Scaling | None) -> str:
    if found is None or found.laws is None:
        return f"\nNo law of scale: {escaped(found.problem)}\n" if found else ""
    gained = f"\n{markdown_table(found.gains)}\n" if found.gains else ""
    return f"{gained}\n{markdown_table(found.laws)}\n\n{SCALING_NOTE}\n"


def markdown_table(table: Table) -> str:
    """The table in Markdown."""
    header, lines = table
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(escaped, row)) + " |" for row in rows)


def escaped(text: str) -> str:
    """A text that Markdown shows as it is, in one line: names of runs and values of fields are anybody's."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    for special in ("\\", "|", "`"):
        line = line.replace(special, f"\\{special}")
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("](", "]\\(")


def method(found: Comparison) -> str:
    """Explanation of the numbers and of the tests for differences."""
    texts = (
        f"in {RESAMPLES} resamples of the {found.documents} documents of the validation rows, paired too where runs "
        "have the same rows"
        if found.documents
        else "over seeds alone"
    )
    prior = found.ranking.prior.degrees
    moderated = (
        ", with the variance between seeds moderated by that of all pairs, which counts as "
        f"{prior} more degree{'s' * (prior != 1)} of freedom (Smyth 2004; with one far noisier variant 5% may be 8%)"
        if prior
        else ""
    )
    return (
        "Validation: at the end of the run, mean over seeds with its 95% t-interval. Difference: to "
        f"{found.reference}, seed by seed (a seed fixes data order and initial weights), with its 95% interval: "
        f"Student's t over the seeds' differences {texts}. Not distinguishable when that holds 0. Each "
        f"verdict is a test by itself: of twenty variants equal to {found.reference} one is told from it by chance. "
        "Rank: the places it may have by the same test of all pairs at 5%, Holm-corrected for "
        f"{_count_pairs(found)}{moderated}."
        + (" Tuned variants are compared at the best of their trials." if found.tuned else "")
    )


def answer(found: Comparison) -> Table:
    """The table of the main result: header and lines, best variant first, those without a result last."""
    header = ["Rank", "Variant", "Verdict", f"Validation, {found.unit}", "Difference", "Finished"]
    shown = ("experts_per_token", "validation_experts_per_token", "flops_per_token", "tokens_per_second")
    if found.tuned:
        header.append("Tuned")
    header += [MEASURES[name][0] for name in shown]
    by_name = {variant.name: variant for variant in found.variants}
    ranked = {each.name: each for each in found.ranking.places}
    lines = []
    for name in [*ranked, *(name for name in by_name if name not in ranked)]:
        variant, place = by_name[name], ranked.get(name)
        is_reference = name == found.reference
        lines.append(
            [
                _place(place) if place else MISSING,
                name,
                "reference" if is_reference else found.paired[name].verdict,
                _interval(place.estimate if place else None),
                MISSING if is_reference else _interval(found.paired[name].difference, "+"),
                _finished(variant),
                *([_tuned(found, name)] if found.tuned else []),
                *(_measured(variant, measure) for measure in shown),
            ]
        )
    return header, lines


def _tuned(found: Comparison, name: str) -> str:
    tuning = found.tuned.get(name)
    if tuning is None:
        return "no"
    place = "best" if tuning.is_best else "NOT the best"
    return f"{tuning.setting(tuning.scheme.trials[tuning.chosen])}, {place} of {len(tuning.losses)}"


TUNING_NOTE = (
    f"Each trial is one run of the tuning seed. Chosen in: the share of {RESAMPLED_CHOICES:,} resamples in which it "
    "wins too, the trials' losses drawn with the noise that the final seeds show between variants (half of the "
    "variance of their seed-by-seed differences, moderated as for ranks, mean over the other variants). Cost: the mean "
    "loss by which the winners of resamples are worse, by these losses; its mean square is in the standard error of "
    "the differences and ranks above. What lies between trials and beyond their edges is in none of it."
)


def tuning(found: Comparison) -> Table:
    """Trials of each tuned variant, and how sure the choice is."""
    lines = []
    for name, each in found.tuned.items():
        trials = each.scheme.trials
        order = sorted(range(len(trials)), key=lambda at: (each.rate(trials[at]), at))
        curve = [f"{each.setting(trials[at])}: {_trial_loss(each.losses[at])}" for at in order]
        sure = each.choice
        lines.append(
            [
                name,
                each.setting(trials[each.chosen]) + (" (at the edge)" if each.at_edge else ""),
                MISSING if sure is None else f"{sure.shares[each.chosen]:.0%}",
                MISSING if sure is None else f"{sure.cost:.4f}",
                ", ".join(curve),
            ]
        )
    return ("Variant", "Chosen rate", "Chosen in", f"Cost of choosing, {found.unit}", "Trials"), lines


def _trial_loss(loss: float) -> str:
    return "diverged" if math.isinf(loss) else "not known" if math.isnan(loss) else f"{loss:.4f}"


def task_table(found: Comparison) -> Table:
    """Each metric of each task: every variant that has a value."""
    lines = []
    for task in found.tasks:
        for variant in found.variants:
            name = variant.name
            if task.values[name]:
                apart = MISSING if name == found.reference else _interval(task.paired[name].difference, "+")
                verdict = task.verdict(name, found.reference)
                documents = str(task.documents or MISSING)
                lines.append([task.task, task.metric, name, verdict, _interval(task.estimate(name)), apart, documents])
    return ("Task", "Metric", "Variant", "Verdict", "Value", "Difference", "Documents"), lines


def _place(ranked: Ranked) -> str:
    return f"{ranked.rank} to {ranked.last_rank}" if ranked.equals else str(ranked.rank)


def _count_pairs(found: Comparison) -> str:
    pairs = found.ranking.pairs
    return f"{pairs} tested pair{'s' * (pairs != 1)}"


def _finished(variant: Variant) -> str:
    others = [run.state for run in variant.runs if run.state != "finished"]
    text = f"{len(variant.counted)} of {len(variant.runs)}"
    return text + (f" ({', '.join(f'{others.count(s)} {s}' for s in sorted(set(others)))})" if others else "")


def _interval(value: Estimate | None, sign: str = "") -> str:
    if value is None:
        return MISSING
    text = f"{value.mean:{sign}.4f}"
    return text if math.isnan(value.low) else f"{text} [{value.low:{sign}.4f}, {value.high:{sign}.4f}]"


def _mean(variant: Variant, measure: str) -> float | None:
    values = variant.by_seed(MEASURES[measure][1])
    return float(np.mean(list(values.values()))) if values else None


def _measured(variant: Variant, measure: str) -> str:
    return _formatted(_mean(variant, measure), MEASURES[measure][2])


def _formatted(value: float | None, spec: str) -> str:
    return MISSING if value is None else format(value, spec)


Record = dict[str, object]


def variant_rows(found: Comparison) -> list[Record]:
    """``compare.csv``: a row for each variant."""
    ranked = {each.name: each for each in found.ranking.places}
    rows: list[Record] = []
    for variant in found.variants:
        place, paired = ranked.get(variant.name), found.paired[variant.name]
        means = (("loss", place.estimate if place else None), ("difference", paired.difference))
        row: Record = {"variant": variant.name, "unit": found.unit, "runs": len(variant.runs)}
        row |= {"counted": len(found.losses[variant.name]), "rank": place and place.rank}
        row |= {"last_rank": place and place.last_rank}
        for name, value in means:
            row |= {f"{name}_{end}": value and getattr(value, end) for end in ("mean", "low", "high")}
        row |= {"reference": found.reference, "pairs": len(paired.seeds) if paired.is_paired else 0}
        row |= {"p_value": paired.p_value, "over_texts": paired.over_texts}
        row |= {"verdict": "reference" if variant.name == found.reference else paired.verdict}
        row |= {"indistinguishable_from": "; ".join(place.equals) if place else None}
        row |= _tuning_columns(found, variant.name)
        row |= _task_columns(found, variant.name)
        row |= {name: _mean(variant, name) for name in MEASURES}
        rows.append(row | _part_columns(variant.counted))
    return rows


def _tuning_columns(found: Comparison, name: str) -> Record:
    """Trials of a variant, what was chosen, and how sure it is; empty of one that was not tuned."""
    tuning = found.tuned.get(name)
    sure = tuning.choice if tuning else None
    return {
        "trials": tuning and len(tuning.losses),
        "chosen": tuning and tuning.setting(tuning.scheme.trials[tuning.chosen]),
        "chosen_share": float(sure.shares[tuning.chosen]) if tuning and sure else None,
        "choice_cost": sure and sure.cost,
        "choice_error": sure and sure.mean_square**0.5,
    }


def _task_columns(found: Comparison, name: str) -> Record:
    """Mean of each metric of each task, and what can be said of it against the reference."""
    columns: Record = {}
    for task in found.tasks:
        of, apart = f"{task.task}_{task.metric}", task.paired[name].difference
        mean = task.estimate(name)
        columns |= {f"{of}_mean": mean and mean.mean, f"{of}_verdict": task.verdict(name, found.reference)}
        columns |= {f"{of}_difference_{end}": apart and getattr(apart, end) for end in ("mean", "low", "high")}
    return columns


def run_rows(found: Comparison) -> list[Record]:
    """``compare_runs.csv``: a row for each run, then for each trial of the variants that were tuned."""
    variants = {variant.name: variant for variant in found.variants}
    trials = [(run, variants[name], True) for name, tuning in found.tuned.items() for run in tuning.runs]
    runs = [*((run, found.variant_of(run), False) for run in found.runs), *trials]
    differing = differences([run.values for run, *_ in runs if run.values])
    rows: list[Record] = []
    for run, variant, is_trial in runs:
        counted = variant is not None and run in variant.counted
        row: Record = {"run": run.name, "variant": variant.name if variant else None, "state": run.state}
        row |= {"trial": is_trial, "counted": counted, "problem": run.problem}
        row |= {name: run.last.get(name) for name in ("step", "tokens", "attempt")}
        row |= {key.replace("/", "_"): run.final(key) for key in ("validation/loss", "validation/bits_per_byte")}
        row |= {name: measure(run) for name, (_, measure, _) in MEASURES.items()}
        row |= _part_columns([run])
        for task in found.tasks:
            own = task.values[variant.name] if variant and counted else {}
            row[f"{task.task}_{task.metric}"] = own.get(run.values.get("seed", -1))
        rows.append(row | {key: run.values.get(key) for key in dict.fromkeys(["seed", *differing])})
    return rows


def _measured_times(runs: Sequence[RunRecord]) -> list[dict[LayerPart, float]]:
    return [times for run in runs if (times := part_times(run))]


def _part_columns(runs: Sequence[RunRecord]) -> Record:
    """Mean microseconds of each part of a MoE layer, and of the whole."""
    found = _measured_times(runs)
    columns = {name: fmean(times[name] for times in found) if found else None for name in PARTS}
    whole = fmean(sum(times.values()) for times in found) if found else None
    return {f"{name}_microseconds_per_token": value for name, value in [*columns.items(), ("moe_layer", whole)]}


def csv_text(rows: Sequence[Record]) -> str:
    """Rows of equal keys as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def ranking(found: Comparison) -> Table:
    """Places, and what could not be told apart."""
    names = [each.name for each in found.ranking.places]

    def equals(of: Ranked) -> str:
        told = [name for name in names if name != of.name and name not in of.equals]
        if len(told) < len(of.equals) and len(of.equals) > 2:
            return "all others" + (f" but {', '.join(told)}" if told else "")
        return ", ".join(of.equals) or "none"

    return ("Rank", "Variant", "Not distinguishable from"), [
        [_place(each), each.name, equals(each)] for each in found.ranking.places
    ]


def power(found: Comparison) -> str:
    """Difference that is needed to win a place."""
    needed = found.ranking.needed
    if needed is None:
        return ""
    return (
        f"By the seeds alone, among {_count_pairs(found)} a place is won by a difference of {needed:.2g} {found.unit} "
        "in the median pair; more seeds or fewer variants lower that."
    )


def measures_table(variants: Sequence[Variant]) -> Table:
    """``MEASURES`` that any variant has."""
    shown = [name for name in MEASURES if any(_mean(variant, name) is not None for variant in variants)]
    lines = [[variant.name, *(_measured(variant, name) for name in shown)] for variant in variants]
    return ["Variant", *(MEASURES[name][0] for name in shown)], lines


def runs_table(found: Comparison) -> Table:
    """Every run, in any state."""
    header = ("Run", "Variant", "Seed", "State", "Steps", "Tokens", found.unit, "Resumes", "Device", "Problem")
    return header, [_run_line(found, run) for run in found.runs]


def _run_line(found: Comparison, run: RunRecord) -> list[str]:
    variant, planned = found.variant_of(run), run.planned_steps
    counted = variant is not None and run in variant.counted
    return [
        run.name,
        variant.name if variant else MISSING,
        str(run.values.get("seed", MISSING)),
        run.state + ("" if counted or not run.is_complete else ", seed repeated"),
        f"{run.last.get('step', 0):,d}" + (f" of {planned:,d}" if planned else ""),
        short_number(run.last.get("tokens", 0)),
        _formatted(found.loss(run), ".4f"),
        str(run.last.get("attempt", 0)),
        str(run.facts.get("device", MISSING)),
        run.problem,
    ]


def certificates(found: Comparison) -> Table:
    """The certificate of each variant: of its first run that has one."""

    def line(variant: Variant) -> list[str]:
        if variant.values.get("router.name") == "dense":
            return [variant.name, "no routing", MISSING, MISSING]
        try:
            known = next((each for run in variant.runs if (each := findings.certificate(run.folder))), None)
        except ValueError as error:
            return [variant.name, MISSING, MISSING, str(error)]
        if known is None:
            return [variant.name, "not certified", MISSING, f"run: moe-pretrain certify {variant.runs[0].folder}"]
        return [variant.name, known.outcome, known.code[:12], "; ".join(known.others) or "everything passes"]

    return ("Variant", "Outcome", "Code", "What does not simply pass"), [line(variant) for variant in found.variants]


def specialisation(found: Comparison) -> Table:
    """Normalised information between experts and classes of tokens, mean over layers and the seeds that have it."""
    measured: dict[str, dict[str, list[tuple[float, float]]]] = {}
    problems: dict[str, str] = {}
    for variant in found.variants:
        kinds: dict[str, list[tuple[float, float]]] = {}
        for run in variant.counted:
            try:
                known = findings.normalised_information(run.folder) or {}
            except ValueError as error:
                problems[variant.name] = str(error)
                continue
            for kind, layers in known.items():
                kinds.setdefault(kind, []).extend(layers)
        measured[variant.name] = kinds
    names = list(dict.fromkeys(kind for kinds in measured.values() for kind in kinds))
    lines = []
    for variant in found.variants:
        cells = [
            findings.information_cell(pairs) if (pairs := measured[variant.name].get(name)) else MISSING
            for name in names
        ]
        remark = problems.get(variant.name, "")
        if variant.values.get("router.name") == "dense":
            remark = "no routing"
        elif not measured[variant.name] and not remark:
            remark = f"run: moe-pretrain specialise {variant.runs[0].folder}"
        lines.append([variant.name, *cells, remark])
    return ("Variant", *(f"By {name}" for name in names), "Remark"), lines


def layer_times(found: Comparison) -> Table:
    """Measured times of the parts of one MoE layer per token; the last cell says so where runs have no times."""
    lines = []
    for variant in found.variants:
        times = _measured_times(variant.counted)
        *cells, share = findings.time_cells(times).values()
        if variant.values.get("router.name") == "dense":
            share = "no routing"
        elif len(times) < max(1, len(variant.counted)):
            share += f" ({len(times)} of {len(variant.counted)} finished runs have times)"
        lines.append([variant.name, *cells, share])
    return ("Variant", *findings.time_cells([])), lines


def layer_costs(found: Comparison) -> Table:
    """Costs of the parts of one MoE layer per token, at the experts per token that were measured."""
    cells: dict[str, dict[str, str]] = {}
    for variant in found.variants:
        facts: dict[str, object] = next((run.facts for run in variant.counted if "moe_layer_cost" in run.facts), {})
        cells[variant.name] = findings.cost_cells(facts, _mean(variant, "experts_per_token"))
    parts = list(dict.fromkeys(part for each in cells.values() for part in each))
    lines = [[name, *(each.get(part, MISSING) for part in parts)] for name, each in cells.items()]
    return ("Variant", *parts), lines if parts else []
