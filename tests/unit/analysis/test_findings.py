"""The comparison over texts as well as seeds, of many variants, and with what other commands have found."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from helpers.pages import read_page
from helpers.planted import AUTONOMY, BASE, DOCUMENT_LOSSES, TOP_P, Planted, plant_sweep

from moe_pretrain import cli
from moe_pretrain.analysis.compare.charts import MAX_COLORED, OTHERS, legend_colors, variant_colors
from moe_pretrain.analysis.compare.comparison import compare
from moe_pretrain.analysis.compare.page import write_comparison
from moe_pretrain.analysis.compare.tables import layer_times, power
from moe_pretrain.commands import certify
from moe_pretrain.run_folder.probe import ProbeFiles

DENSE = {"name": "dense"}
ROUTER_NAMES = ["top_k", "top_p", "autonomy", "quantile", "loss_free", "hash"]


def test_what_rests_on_a_few_documents_is_not_distinguishable(tmp_path: Path):
    """Worse by the same in all seeds, and all of it in one document of 20; the same loss spread out is worse."""
    one = tuple(np.array(DOCUMENT_LOSSES) + 2.0 * (np.arange(20) == 7))
    for seed, loss in BASE.items():
        Planted(f"a-{seed}", loss, seed).write(tmp_path)
        Planted(f"b-{seed}", loss + 0.1 + seed / 1e4, seed, TOP_P, by_document=one).write(tmp_path)
        Planted(f"c-{seed}", loss + 0.1 + seed / 1e4, seed, AUTONOMY).write(tmp_path)
    found = compare(tmp_path)
    assert found.documents == 20 and found.warnings == []
    assert (found.paired["top_p"].verdict, found.paired["autonomy"].verdict) == ("not distinguishable", "worse")
    assert all(each.over_texts for each in found.paired.values())
    places = {each.name: (each.rank, each.equals) for each in found.ranking.places}
    assert places["autonomy"] == (2, ["top_p"]) and places["top_p"] == (1, ["top_k", "autonomy"])
    assert found.paired["top_p"].difference.mean == pytest.approx(0.1002), "the raw difference of the validations"


def test_identical_settings_with_other_seeds_are_not_distinguishable(tmp_path: Path):
    for seed, loss in BASE.items():
        Planted(f"a-{seed}", loss, seed).write(tmp_path)
        other = loss + 0.02 * (seed - 2)
        Planted(f"b-{seed}", other, seed + 3, other={"engine.check_every_steps": 9}).write(tmp_path)
    found = compare(tmp_path)
    (name,) = set(found.losses) - {found.reference}
    assert (found.paired[name].is_paired, found.paired[name].verdict) == (False, "not distinguishable")
    assert any(line.startswith("NOT PAIRED") and "fewer than two seeds" in line for line in found.warnings)


@pytest.mark.parametrize("damage", ["missing", "cut", "other step's"])
def test_runs_without_losses_by_document_are_said_and_compared_over_seeds(tmp_path: Path, damage: str):
    plant_sweep(tmp_path)
    path = ProbeFiles(tmp_path / "top_p-2").path(100)
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    else:
        other = Planted("x", 2.0, 2, TOP_P).write(tmp_path / "elsewhere")
        path.write_bytes(ProbeFiles(other).path(100).read_bytes())
        (other / "config.yaml").unlink()
        (other / "metrics.jsonl").unlink()
    found = compare(tmp_path)
    assert found.paired["autonomy"].over_texts and not found.paired["top_p"].over_texts
    assert found.paired["top_p"].verdict == "worse"
    assert any("1 runs have no losses by document (top_p-2)" in line for line in found.warnings)
    told = {"missing": "", "cut": "damaged", "other step's": "the probe of step 100 has loss 2.0000, not 3.1500"}
    assert any(told[damage] in line for line in found.warnings)


def test_few_documents_and_other_rows_are_said(tmp_path: Path):
    for seed, loss in BASE.items():
        Planted(f"a-{seed}", loss, seed, by_document=(0.1, -0.1)).write(tmp_path)
        Planted(f"b-{seed}", loss, seed, TOP_P, by_document=DOCUMENT_LOSSES).write(tmp_path)
        for name, rows in (("a", "these"), ("b", "those")):
            files = ProbeFiles(tmp_path / f"{name}-{seed}")
            probe = files.read(100)
            assert probe is not None
            files.write(type(probe)(**{**vars(probe), "fingerprint": rows}))
    found = compare(tmp_path)
    assert any(line.startswith("Only 2 documents") for line in found.warnings)
    assert any(line.startswith("VALIDATION ROWS DIFFER") for line in found.warnings)
    assert found.paired["top_p"].over_texts and found.paired["top_p"].verdict == "not distinguishable"


def test_texts_of_other_tokenizers_are_not_paired(tmp_path: Path):
    for seed, loss in BASE.items():
        Planted(f"a-{seed}", loss, seed).write(tmp_path)
        Planted(f"b-{seed}", loss, seed, TOP_P, {"tokenizer.vocab_size": 99}).write(tmp_path)
    found = compare(tmp_path)
    assert any(line.startswith("NO TEXTS ARE PAIRED") for line in found.warnings)
    assert not any(each.over_texts for each in found.paired.values())


def test_of_many_variants_the_best_and_the_reference_are_coloured(tmp_path: Path):
    for number in range(12):
        for seed in (1, 2):
            width = {"name": "top_k", "top_k": 2, "width": number}
            Planted(f"{number}-{seed}", 3.0 + number / 10, seed, width).write(tmp_path)
    found = compare(tmp_path, "width=11")
    ordered = [each.name for each in found.ranking.places]
    colors = variant_colors(found.variants, ordered, found.reference)
    coloured = [name for name, color in colors.items() if color != OTHERS]
    assert coloured == [*ordered[: MAX_COLORED - 1], "width=11"]
    assert len({colors[name] for name in coloured}) == MAX_COLORED
    assert legend_colors(colors)["4 others"] == OTHERS
    page, _ = write_comparison(tmp_path, "width=11")
    assert "4 others" in read_page(page).text


CERTIFICATE = {
    "code": "0123456789abcdef",
    "rows": [
        {"property": "determinism", "verdict": "PASS", "detail": "same"},
        {"property": "padding ignored", "verdict": "FAIL", "detail": "<3 routes>"},
        {"property": "float32 routing", "verdict": "not applicable", "detail": "none"},
    ],
}
SPECIALISATION = {
    "classes": {
        "next token": [
            {"hard": {"mutual": 0.5, "experts": 1.5, "classes": 2.5}, "hard_shuffled": 0.1},
            {"hard": {"mutual": 0.0, "experts": 0.0, "classes": 0.0}, "hard_shuffled": 0.0},
        ]
    }
}
COST = {"router": {"flops_per_token": 1000.0}, "experts": {"flops_per_route": 2e6}, "combine": {"bytes_per_token": 8.0}}


def test_what_other_commands_found_is_on_the_page(tmp_path: Path):
    facts = {"moe_layer_cost": COST, "commit": "c0ffee"}
    for seed, loss in BASE.items():
        Planted(f"a-{seed}", loss, seed, facts=facts).write(tmp_path)
        Planted(f"b-{seed}", loss, seed, TOP_P).write(tmp_path)
        Planted(f"c-{seed}", loss, seed, DENSE).write(tmp_path)
    (tmp_path / "a-2" / "certificate.json").write_text(json.dumps(CERTIFICATE))
    (tmp_path / "a-1" / "specialisation.json").write_text(json.dumps(SPECIALISATION))
    (tmp_path / "b-1" / "specialisation.json").write_text("[")
    text = read_page(write_comparison(tmp_path)[0]).text
    certificate = text[text.index("Certificate") :]
    assert "NOT certified: 1 fail; 1 pass, 1 do not apply or are declared" in certificate
    assert "padding ignored: FAIL, <3 routes>; float32 routing: not applicable, none" in certificate
    assert f"run: moe-pretrain certify {tmp_path / 'b-1'}" in certificate and "no routing" in certificate
    # 2 I / (H(E) + H(Y)) is 0.25 and 0 in the two layers.
    assert "0.125 (shuffled 0.025)" in text
    assert any("specialisation.json: damaged" in cell for cell in text)
    # 2 experts per token in layer 0 and 3 in layer 1.
    cost = text[text.index("Cost by part of a MoE layer") :]
    assert "1.00k FLOPs" in cost and "5.00M FLOPs" in cost and "8 bytes" in cost
    assert any("c0ffee" in cell for cell in text)


def test_the_time_of_the_parts_is_on_the_page_and_in_the_tables_of_numbers(tmp_path: Path):
    """Of the last validation; mean and standard deviation over the seeds 1, 2 and 3."""
    for seed, loss in BASE.items():
        times = {
            "router": 1.0,
            "permute": 0.5,
            "exchange": 0.0,
            "experts": 5.0 + seed,
            "shared_experts": 0.5,
            "combine": 1.0,
        }
        Planted(f"a-{seed}", loss, seed, microseconds=times).write(tmp_path)
        Planted(f"b-{seed}", loss, seed, TOP_P, microseconds=times if seed == 2 else {}).write(tmp_path)
        Planted(f"c-{seed}", loss, seed, AUTONOMY).write(tmp_path)
        Planted(f"d-{seed}", loss, seed, DENSE).write(tmp_path)
    header, lines = layer_times(compare(tmp_path))
    assert header == (
        *("Variant", "router", "permute", "exchange", "experts", "shared experts", "combine", "total"),
        "experts' share",
    )
    share = f"{(6.5 / 9 + 7.5 / 10 + 8.5 / 11) / 3:.0%}"
    of_seeds = ["1 (sd 0)", "0.5 (sd 0)", "none", "7 (sd 1)", "0.5 (sd 0)", "1 (sd 0)", "10 (sd 1)", share]
    of_one = ["1", "0.5", "none", "7", "0.5", "1", "10", "75% (1 of 3 finished runs have times)"]
    assert lines == [
        ["top_k", *of_seeds],
        ["top_p", *of_one],
        ["autonomy", *["-"] * 7, "- (0 of 3 finished runs have times)"],
        ["dense", *["-"] * 7, "no routing"],
    ]
    page, _ = write_comparison(tmp_path)
    text = read_page(page).text
    at = text.index("Time by part of a MoE layer") + 2  # after the note
    shown = text[at : text.index("Cost by part of a MoE layer")]
    assert shown == [cell for line in (header, *lines) for cell in line]
    rows = {row["variant"]: row for row in csv.DictReader((tmp_path / "compare.csv").open())}
    assert (
        float(rows["top_k"]["experts_microseconds_per_token"]),
        float(rows["top_k"]["exchange_microseconds_per_token"]),
    ) == (7, 0)
    assert (
        float(rows["top_k"]["moe_layer_microseconds_per_token"]),
        rows["dense"]["moe_layer_microseconds_per_token"],
    ) == (10, "")
    runs = {row["run"]: row for row in csv.DictReader((tmp_path / "compare_runs.csv").open())}
    assert [float(runs[f"a-{seed}"]["moe_layer_microseconds_per_token"]) for seed in BASE] == [9, 10, 11]
    assert runs["b-1"]["router_microseconds_per_token"] == ""


def test_csv_says_what_the_intervals_are_over(tmp_path: Path):
    plant_sweep(tmp_path)
    write_comparison(tmp_path)
    rows = {row["variant"]: row for row in csv.DictReader((tmp_path / "compare.csv").open())}
    assert {row["over_texts"] for row in rows.values()} == {"True"}


def test_commands_of_a_sweep_take_one_complete_run_of_each_variant_that_routes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """A folder of runs is certified variant by variant; the exit code is the worst."""
    names = ["router=a,seed=1", "router=a,seed=2", "b-1", "b-2", "c-1", "d-1"]
    routers = [{}, {}, {"router": TOP_P}, {"router": TOP_P}, {"router": DENSE}, {"router": AUTONOMY}]
    runs = dict(zip(names, routers, strict=True))
    for place, (name, fields) in enumerate(runs.items()):
        Planted(name, 3.0, 1 + place % 2, **fields, end=None if name == "b-1" else ("finished", "")).write(tmp_path)
        (tmp_path / name / "overrides.txt").write_text(f"run.name={name}\n")
    certified = []

    def certify_one(overrides: list[str], write: Path | None) -> int:
        certified.append((overrides, write))
        if overrides == ["run.name=b-2"]:
            raise ValueError("b-2 is broken")
        return 0

    monkeypatch.setattr(certify, "certify_one", certify_one)
    monkeypatch.setattr(certify, "earlier_words", lambda folder, recorded, more: [*recorded, *more])
    assert cli.main(["certify", str(tmp_path)]) == 2
    tried = ["b-2", "d-1", "router=a,seed=1"]
    assert certified == [([f"run.name={name}"], tmp_path / name / "certificate.json") for name in tried]
    told = capsys.readouterr()
    assert told.out.splitlines() == [f"== {tmp_path / name}" for name in tried]
    assert told.err.splitlines() == ["b-2 is broken"]
    assert cli.main(["certify", str(tmp_path / tried[2])]) == 0 and certified[-1][0] == ["run.name=router=a,seed=1"]
    assert cli.main(["certify", str(tmp_path / "b-1")]) == 0 and certified[-1][0] == ["run.name=b-1"], "a run itself"
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        assert cli.main(["specialise", str(folder)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"FOLDER={folder} must" in line


def test_places_are_won_with_what_all_pairs_tell_and_verdicts_without(tmp_path: Path):
    """Six variants of three seeds, of which only the worse one has a place of its own; a noisy one is as it was."""
    noise = np.random.default_rng(3).normal(0, 0.01, (6, 3))
    for place, name in enumerate(ROUTER_NAMES):
        for seed, loss in BASE.items():
            own = loss + float(noise[place, seed - 1]) + 0.15 * (name == "hash")
            Planted(f"{name}-{seed}", own, seed, {"name": name}).write(tmp_path)
    _, text = write_comparison(tmp_path)
    found = compare(tmp_path)
    prior, places = found.ranking.prior, {each.name: (each.rank, each.last_rank) for each in found.ranking.places}
    assert prior.degrees > 0 and all(each.over_texts for each in found.paired.values())
    assert places == {name: (6, 6) if name == "hash" else (1, 5) for name in ROUTER_NAMES}
    assert "| 6 | hash | worse |" in text and "| 1 to 5 | top_p |" in text
    moderated = f"moderated by that of all pairs, which counts as {prior.degrees} more degree"
    assert f"Holm-corrected for 15 tested pairs, with the variance between seeds {moderated}" in text
    needed = found.ranking.needed
    assert needed is not None and 0.02 < needed < 0.15
    assert f"among 15 tested pairs a place is won by a difference of {needed:.2g} nats per token" in power(found)
    apart = [found.losses["hash"][seed] - found.losses["top_k"][seed] for seed in BASE]
    half = 4.302653 * float(np.std(apart, ddof=1)) / 3**0.5  # t of two degrees of freedom
    worse = found.paired["hash"].difference
    assert worse is not None and (worse.low, worse.high) == pytest.approx(
        (np.mean(apart) - half, np.mean(apart) + half)
    )
