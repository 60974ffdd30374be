"""A comparison as files: a page, a picture, a Markdown table and two tables of numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_pretrain.analysis.compare import charts as draws
from moe_pretrain.analysis.compare import tables
from moe_pretrain.analysis.compare.comparison import Comparison, compare
from moe_pretrain.analysis.compare.scaling import SCALING_NOTE
from moe_pretrain.analysis.compare.task_comparison import TASKS_NOTE
from moe_pretrain.analysis.figures import chart, write_png
from moe_pretrain.analysis.findings import COST_NOTE, INFORMATION_NOTE, TIME_NOTE
from moe_pretrain.analysis.html import charts, folded, legend, page, section, table, warnings
from moe_pretrain.analysis.measures import INCIDENT_HEADER, incidents, not_judged
from moe_pretrain.run_folder.paths import (
    COMPARE_PAGE,
    COMPARE_PICTURE,
    COMPARE_RUNS,
    COMPARE_TEXT,
    COMPARE_VARIANTS,
)
from moe_pretrain.run_folder.record import RunRecord, differences, show
from moe_pretrain.system.files import write_whole

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
    colors = draws.variant_colors(found.variants, [each.name for each in found.ranking.places], found.reference)
    losses = draws.loss_drawings(found.variants, colors, found.key, found.unit)
    difference = draws.difference_drawing(found.paired, found.reference, found.unit)
    text = tables.markdown(found)
    write_whole(root / COMPARE_TEXT, text)
    write_whole(root / COMPARE_VARIANTS, tables.csv_text(tables.variant_rows(found)))
    write_whole(root / COMPARE_RUNS, tables.csv_text(tables.run_rows(found)))
    height = max(4.2, 1.8 + 0.2 * len(found.variants))
    write_png(root / COMPARE_PICTURE, [losses[0], losses[1], difference], (15, height), draws.legend_colors(colors))
    write_whole(root / COMPARE_PAGE, _page(root, found, colors, losses, difference))
    return root / COMPARE_PAGE, text


def _page(
    root: Path, found: Comparison, colors: Mapping[str, str], losses: Sequence[draws.Draw], difference: draws.Draw
) -> str:
    variants = found.variants
    key = legend(draws.legend_colors(colors))
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
    wrong = {run.name: each for run in found.runs if (each := incidents(run.events))}
    band_note = (
        "Mean over seeds; dashed: runs that did not finish, one by one. Of more than "
        f"{draws.MAX_COLORED} variants the best are coloured. "
    )
    if draws.has_bands(colors):
        band_note += (
            "Bands: 95% t-intervals over seeds. They hold what the seed does to all variants alike, the paired "
            "differences above do not."
        )
    layer_note = "Means over layers and seeds" + (", with the 95% t-interval." if draws.has_bands(colors) else ".")
    drift_note = "Share of the same validation tokens whose set of experts is not that of the validation before."
    drift = draws.layer_charts(
        variants, colors, "routing_drift", "Routing drift between validations", lambda run: run.validation
    )
    certificate_note = "What moe-pretrain certify found, shrunk; of this folder it certifies one run of each variant."
    information_note = INFORMATION_NOTE + " Of this folder moe-pretrain specialise measures one run of each variant."
    sections = [
        warnings("Read this first", found.warnings),
        section("Which is better", table(*tables.answer(found)), tables.method(found)),
        section("Ranking", table(*tables.ranking(found)), tables.power(found)),
        charts(
            f"Paired differences to {found.reference}",
            [chart("differences", "Paired differences", difference, (6, 1.3 + 0.22 * len(variants)))],
            "Left of 0 is better. Grey: not distinguishable. Intervals far wider than most are cut.",
            layout="single",
        ),
        *_tuning(found, key, colors),
        *_scaling(found),
        *([section("Tasks", table(*tables.task_table(found)), TASKS_NOTE)] if found.tasks else []),
        charts("Validation loss", [key, *curves], band_note),
        charts("Experts per token", [key, *experts] if experts else [], layer_note),
        charts("Balance", [key, *balance] if balance else [], layer_note),
        charts("Routing drift", [key, *drift] if drift else [], drift_note),
        section("Measured", table(*tables.measures_table(variants)), "Means over seeds; layers over the last fifth."),
        section("Time by part of a MoE layer", table(*tables.layer_times(found)), TIME_NOTE),
        section("Cost by part of a MoE layer", table(*tables.layer_costs(found)), COST_NOTE),
        section("Specialisation", table(*tables.specialisation(found)), information_note),
        section("Certificate", table(*tables.certificates(found)), certificate_note),
        charts("Incidents", draws.incident_chart(wrong), layout="single"),
        _incident_table(found.runs),
        section("Runs", table(*tables.runs_table(found))),
        *_configurations(found),
    ]
    subtitle = f"{len(found.runs)} runs of {len(variants)} variants, compared in {found.unit}."
    return page(f"Comparison of {root.resolve().name}", subtitle, sections)


def _scaling(found: Comparison) -> list[str]:
    scaling = found.scaling
    if scaling is None:
        return []
    if scaling.laws is None:
        return [section("Does the gain survive scale", "", scaling.problem)]
    shown = [*([table(*scaling.gains)] if scaling.gains else []), table(*scaling.laws)]
    return [section("Does the gain survive scale", "".join(shown), SCALING_NOTE)]


def _tuning(found: Comparison, key: str, colors: Mapping[str, str]) -> list[str]:
    """Curves of loss over rate and what was chosen; nothing where nothing was tuned."""
    if not found.tuned:
        return []
    note = "Ring: chosen. Cross at the top: diverged. Losses far above the others are cut."
    curves = draws.rate_chart(found.tuned, colors, found.unit)
    return [
        charts("Loss over learning rate", [key, *curves], note, layout="single"),
        section("Tuned", table(*tables.tuning(found)), tables.TUNING_NOTE),
    ]


def _incident_table(runs: Sequence[RunRecord]) -> str:
    """Incidents that the runs recorded, and the runs that did not look for some."""
    lines = [
        (run.name, each.kind, f"{each.row['step']:,d}", each.row["message"])
        for run in runs
        for each in incidents(run.events)
    ]
    notes = [f"The first {_MAX_INCIDENTS} of {len(lines)}."] if len(lines) > _MAX_INCIDENTS else []
    unjudged: dict[str, list[str]] = {}
    for run in runs:
        if run.values and (missing := not_judged(run.values)):
            unjudged.setdefault(" and ".join(missing), []).append(run.name)
    notes += [
        f"Did not judge {kinds}, having no settings for that: {', '.join(names)}." for kinds, names in unjudged.items()
    ]
    if not lines and not notes:
        return ""
    body = table(("Run", *INCIDENT_HEADER), lines[:_MAX_INCIDENTS]) if lines else ""
    return section("Incidents, run by run", body, " ".join(notes))


def _configurations(found: Comparison) -> list[str]:
    values = [variant.values for variant in found.variants]
    differing = differences(values)
    lines = [[key, *(show(each, key) for each in values)] for key in differing]
    shared = "\n".join(f"{key}: {show(values[0], key)}" for key in values[0] if key not in differing)
    made_with = {
        title: "\n".join(dict.fromkeys(str(run.facts.get(fact, "not recorded")) for run in found.runs))
        for title, fact in (("Versions", "versions"), ("Commit", "commit"))
    }
    return [
        section("What differs", table(["Key", *(variant.name for variant in found.variants)], lines)),
        folded("What all variants share", shared),
        *(folded(title, text) for title, text in made_with.items()),
    ]
