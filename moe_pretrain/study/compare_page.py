"""A comparison as files: a page, a picture, a Markdown table and two tables of numbers."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moe_pretrain.metrics.console import short_number
from moe_pretrain.study import compare_charts as draws
from moe_pretrain.study.compare import MEASURES, Comparison, compare
from moe_pretrain.study.compare_measures import Incident, incidents
from moe_pretrain.study.compare_runs import MISSING, RunRecord, Variant, differences, show
from moe_pretrain.study.compare_statistics import Estimate
from moe_pretrain.study.figures import chart, write_png
from moe_pretrain.study.page import charts, folded, legend, page, section, table, warnings, write_whole

_MAX_INCIDENTS = 200


def write_comparison(root: Path, reference: str | None = None) -> tuple[Path, str]:
    """Compare the runs below ``root`` and write ``compare.html``, ``.png``, ``.md``, ``.csv`` and ``compare_runs.csv``.

    Args:
        root: Folder with run folders, at any depth.
        reference: See ``compare``.

    Returns:
        The page, which loads nothing else, and the Markdown text.

    Raises:
        ValueError: There are no runs, or no variant named ``reference``.
    """
    found = compare(root, reference)
    colors = draws.variant_colors(found.variants)
    losses = draws.loss_drawings(found.variants, colors, found.key, found.unit)
    difference = draws.difference_drawing(found.paired, found.reference, found.unit)
    text = markdown(found)
    write_whole(root / "compare.md", text)
    write_whole(root / "compare.csv", _csv(_variant_rows(found)))
    write_whole(root / "compare_runs.csv", _csv(_run_rows(found)))
    write_png(root / "compare.png", [_with_legend(losses[0]), losses[1], difference], (14, 3.8))
    write_whole(root / "compare.html", _page(root, found, colors, losses, difference))
    return root / "compare.html", text


def markdown(found: Comparison) -> str:
    """The main result as a Markdown table with what it rests on."""
    header, lines = _answer(found)
    rows = [header, ["---"] * len(header), *lines]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    cautions = "".join(f"\n- {line}" for line in found.warnings)
    return f"{text}\n\n{_method(found)}\n" + (f"\nTo be aware of:\n{cautions}\n" if cautions else "")


def _method(found: Comparison) -> str:
    pairs = len(found.ranking) * (len(found.ranking) - 1) // 2
    return (
        "Validation: at the end of the run, mean over seeds with its 95% t-interval. Difference: to "
        f"{found.reference}, seed by seed (a seed fixes data order and initial weights), with the 95% t-interval of "
        "the paired differences; not distinguishable when that holds 0. Rank: one more than the number of variants "
        f"that are better in a two-sided paired t-test at 5%, Holm-corrected for {pairs} pair{'s' * (pairs != 1)}."
    )


def _answer(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """The table of the main result: header and lines, best variant first, those without a result last."""
    header = ["Rank", "Variant", "Verdict", f"Validation, {found.unit}", f"Difference to {found.reference}", "Finished"]
    shown = ("experts_per_token", "flops_per_token", "tokens_per_second")
    header += [MEASURES[name][0] for name in shown]
    by_name = {variant.name: variant for variant in found.variants}
    ranked = {each.name: each for each in found.ranking}
    lines = []
    for name in [*ranked, *(name for name in by_name if name not in ranked)]:
        variant, place = by_name[name], ranked.get(name)
        is_reference = name == found.reference
        lines.append(
            [
                str(place.rank) if place else MISSING,
                name,
                "reference" if is_reference else found.paired[name].verdict,
                _interval(place.estimate if place else None),
                MISSING if is_reference else _interval(found.paired[name].difference, "+"),
                _finished(variant),
                *(_measured(variant, measure) for measure in shown),
            ]
        )
    return header, lines


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


def _variant_rows(found: Comparison) -> list[Record]:
    ranked = {each.name: each for each in found.ranking}
    rows: list[Record] = []
    for variant in found.variants:
        place, paired = ranked.get(variant.name), found.paired[variant.name]
        means = (("loss", place.estimate if place else None), ("difference", paired.difference))
        row: Record = {"variant": variant.name, "unit": found.unit, "runs": len(variant.runs)}
        row |= {"counted": len(found.losses[variant.name]), "rank": place.rank if place else None}
        for name, value in means:
            row |= {f"{name}_{end}": value and getattr(value, end) for end in ("mean", "low", "high")}
        row |= {"reference": found.reference, "pairs": len(paired.seeds), "p_value": paired.p_value}
        row |= {"verdict": "reference" if variant.name == found.reference else paired.verdict}
        row |= {"indistinguishable_from": "; ".join(place.equals) if place else None}
        rows.append(row | {name: _mean(variant, name) for name in MEASURES})
    return rows


def _run_rows(found: Comparison) -> list[Record]:
    differing = differences([run.values for run in found.runs if run.values])
    rows: list[Record] = []
    for run in found.runs:
        variant = found.variant_of(run)
        row: Record = {"run": run.name, "variant": variant.name if variant else None, "state": run.state}
        row |= {"counted": bool(variant and run in variant.counted), "problem": run.problem}
        row |= {name: run.last.get(name) for name in ("step", "tokens", "attempt")}
        row |= {key.replace("/", "_"): run.final(key) for key in ("validation/loss", "validation/bits_per_byte")}
        row |= {name: measure(run) for name, (_, measure, _) in MEASURES.items()}
        rows.append(row | {key: run.values.get(key) for key in differing})
    return rows


def _csv(rows: Sequence[Record]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _with_legend(draw: draws.Draw) -> draws.Draw:
    def both(axes: draws.Axes) -> None:
        draw(axes)
        if axes.get_legend_handles_labels()[1]:
            axes.legend()

    return both


def _page(
    root: Path, found: Comparison, colors: Mapping[str, str], losses: Sequence[draws.Draw], difference: draws.Draw
) -> str:
    variants = found.variants
    key = legend(colors)
    layer_titles = {
        "experts_per_token": "Experts per token",
        "load_max_over_mean": "Busiest expert over the mean (1 = even)",
        "router_entropy": "Entropy of a token's routing (nats)",
        "dead_experts": "Experts without a token",
    }
    by_layer = {name: draws.layer_charts(variants, colors, name, title) for name, title in layer_titles.items()}
    experts = [*draws.experts_by_layer_chart(variants, colors), *by_layer.pop("experts_per_token")]
    balance = [*sum(by_layer.values(), []), *draws.balance_chart(variants, colors, found.loss, found.unit)]
    curves = [
        chart(f"loss-{name}", f"Validation against {name}", draw)
        for name, draw in zip(draws.X_AXES, losses, strict=True)
    ]
    wrong = {run.name: each for run in found.runs if (each := incidents(run))}
    band_note = (
        "Mean over seeds with its 95% t-interval; dashed: runs that did not finish, one by one. The bands hold what "
        "the seed does to all variants alike, the paired differences above do not."
    )
    layer_note = "Means over layers and seeds, with the 95% t-interval over seeds."
    sections = [
        warnings("Read this first", found.warnings),
        section("Which is better", table(*_answer(found)), _method(found)),
        section("Ranking", table(("Rank", "Variant", "Not distinguishable from"), _ranking(found))),
        charts(
            f"Paired differences to {found.reference}",
            [chart("differences", "Paired differences", difference, (6, 1.3 + 0.3 * len(variants)))],
            "Left of 0 is better. Grey: not distinguishable.",
            layout="single",
        ),
        charts("Validation loss", [key, *curves], band_note),
        charts("Experts per token", [key, *experts] if experts else [], layer_note),
        charts("Balance", [key, *balance] if balance else [], layer_note),
        section("Measured", table(*_measures_table(variants)), "Means over seeds; layer numbers over the last fifth."),
        charts("Incidents", draws.incident_chart(wrong), layout="single"),
        _incident_table(wrong),
        section("Runs", table(*_runs_table(found))),
        *_configurations(found),
    ]
    subtitle = f"{len(found.runs)} runs of {len(variants)} variants, compared in {found.unit}."
    return page(f"Comparison of {root.resolve().name}", subtitle, sections)


def _ranking(found: Comparison) -> list[list[object]]:
    return [[each.rank, each.name, ", ".join(each.equals) or "none"] for each in found.ranking]


def _measures_table(variants: Sequence[Variant]) -> tuple[list[str], list[list[str]]]:
    shown = [name for name in MEASURES if any(_mean(variant, name) is not None for variant in variants)]
    lines = [[variant.name, *(_measured(variant, name) for name in shown)] for variant in variants]
    return ["Variant", *(MEASURES[name][0] for name in shown)], lines


def _incident_table(wrong: Mapping[str, Sequence[Incident]]) -> str:
    lines = [
        (name, each.kind, f"{each.first['step']:,d}", f"{each.last['step']:,d}", each.detail)
        for name, found in wrong.items()
        for each in found
    ]
    if not lines:
        return ""
    note = f"The first {_MAX_INCIDENTS} of {len(lines)}." if len(lines) > _MAX_INCIDENTS else ""
    header = ("Run", "What", "First step", "Last step", "Detail")
    return section("Incidents, run by run", table(header, lines[:_MAX_INCIDENTS]), note)


def _runs_table(found: Comparison) -> tuple[tuple[str, ...], list[list[str]]]:
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


def _configurations(found: Comparison) -> list[str]:
    values = [variant.values for variant in found.variants]
    differing = differences(values)
    lines = [[key, *(show(each, key) for each in values)] for key in differing]
    shared = "\n".join(f"{key}: {show(values[0], key)}" for key in values[0] if key not in differing)
    versions = dict.fromkeys(str(run.facts.get("versions", "not recorded")) for run in found.runs)
    return [
        section("What differs", table(["Key", *(variant.name for variant in found.variants)], lines)),
        folded("What all variants share", shared),
        folded("Versions", "\n".join(versions)),
    ]
