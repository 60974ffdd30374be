"""The report page: what it says, what it shows, and that it loads nothing from elsewhere."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.pages import assert_loads_nothing, needs_browser, photograph, read_page

from moe_pretrain.analysis import figures, run_charts
from moe_pretrain.analysis.report import summarise, write_report
from moe_pretrain.moe.part_timer import PARTS

STEPS, LAYERS, EXPERTS, TOKENS_PER_STEP = 300, 4, 8, 4096


def make_run(run_dir: Path, steps: int = STEPS) -> Path:
    """Write a run folder with every kind of row: 4 layers, 8 experts, one resume at step 200."""
    random = np.random.default_rng(0)
    rows = []
    for step in range(1, steps + 1):
        progress = step / steps
        base = {
            "step": step,
            "tokens": step * TOKENS_PER_STEP,
            "seconds": step * 0.5,
            "attempt": int(step > 200),
        }
        balance = 1 + 2 * math.exp(-6 * progress)
        row = {
            "kind": "train",
            **base,
            "train/loss": 4 + 6 * math.exp(-5 * progress) + random.normal(0, 0.05),
            "train/aux_loss": 0.01 * balance + 0.001 * 3,
            "aux/load_balance_loss": balance,
            "aux/load_balance_weight": 0.01,
            "aux/router_z_loss": 3 + random.normal(0, 0.1),
            "aux/router_z_weight": 0.001,
            "train/gradient_norm": 0.5 + random.exponential(0.3),
            "train/learning_rate": 3e-4 * min(step / 30, 0.5 + 0.5 * math.cos(math.pi * progress)),
            "train/tokens_per_second": 8000 + step,
            "train/step_seconds": 0.5,
            "data/token_hash": f"{step:016x}",
        }
        for layer in range(LAYERS):
            logits = np.linspace(-1, 1, EXPERTS) * 3 * math.exp(-4 * progress) * (layer + 1) / LAYERS
            share = np.exp(logits + random.normal(0, 0.1, EXPERTS))
            share /= share.sum()
            prefix = f"moe/layer_{layer:02d}/"
            row |= {
                prefix + "load_max_over_mean": share.max() * EXPERTS,
                prefix + "router_entropy": -(share * np.log(share)).sum(),
                prefix + "dead_experts": float((share < 0.01).sum()),
                prefix + "dropped_share": 0.0,
                prefix + "experts_per_token": 2.0,
                prefix + "router_weight_norm": 1.0,
                prefix + "expert_share": share.tolist(),
            }
        rows.append(row)
        if step % 50 == 0:
            loss = 4.1 + 6 * math.exp(-5 * progress)
            rows.append(
                {
                    "kind": "validation",
                    **base,
                    "validation/loss": loss,
                    "validation/perplexity": math.exp(loss),
                    "validation/bits_per_byte": loss / 4 / math.log(2),
                }
            )
        if step == 200:
            event = {"event": "resumed", "message": "from <step 200> & on 4 ranks"}
            rows.append({"kind": "event", **base, "attempt": 1, **event})
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        **{"run": {"name": "aoe-tiny"}, "router": {"name": "autonomy"}, "model": {"name": "debug"}},
        **{"spike": {"window_steps": 100}, "metrics": {"router_health_steps": 100}},
    }
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    summary = {
        "total_parameters": 1_234_567,
        "active_parameters": 456_789,
        "flops_per_token": 2.5e6,
        "unigram_cross_entropy": 6.789,
        "corpus_fingerprint": "abc123",
        "versions": {"torch": "2.13.0"},
        "device": "cpu",
    }
    (run_dir / "summary.json").write_text(json.dumps(summary))
    return run_dir


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    run_dir = make_run(tmp_path_factory.mktemp("runs") / "finished")
    write_report(run_dir)
    return run_dir


def last_row(run_dir: Path, kind: str) -> dict:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind][-1]


def test_summary_holds_the_final_numbers(finished_run):
    summary = summarise(finished_run)
    assert summary["run_name"] == "finished", "its folder's name, which a copy has of its own"
    assert summary["router"] == "autonomy"
    assert summary["final_train_loss"] == last_row(finished_run, "train")["train/loss"]
    validation = last_row(finished_run, "validation")
    assert summary["final_validation_loss"] == validation["validation/loss"]
    assert summary["final_bits_per_byte"] == validation["validation/bits_per_byte"]
    assert summary["steps"] == STEPS
    assert summary["tokens"] == STEPS * TOKENS_PER_STEP
    assert summary["tokens_per_second_median"] == 8000 + (STEPS + 1) / 2
    assert summary["wall_seconds"] == 150.0
    assert summary["resumes"] == 1
    assert summary["model_flops_utilization_median"] is None
    assert "later tokens" not in (finished_run / "report.html").read_text()


def test_page_states_the_numbers_beside_their_names(finished_run):
    text = read_page(finished_run / "report.html").text
    train_loss = last_row(finished_run, "train")["train/loss"]
    expected = {
        "Router": "autonomy",
        "Total parameters": "1.23M",
        "Active parameters": "457k",
        "Final train loss": f"{train_loss:.4f}",
        "Final validation loss": f"{last_row(finished_run, 'validation')['validation/loss']:.4f}",
        "Unigram cross-entropy of the validation text": "6.7890",
        "Tokens per second, median": "8.15k",
        "Wall time": "2:30",
        "Resumes": "1",
        "Versions": "torch 2.13.0",
        "Model FLOPs utilisation, median": "not recorded",
    }
    assert {label: text[text.index(label) + 1] for label in expected} == expected


def test_page_has_every_chart(finished_run):
    reader = read_page(finished_run / "report.html")
    assert [chart["aria-label"] for chart in reader.charts] == [
        "LM loss in nats per token, auxiliary losses not included",
        "Load of every expert over time, by layer",
        "Busiest expert over the mean (1 = even)",
        "Mean entropy of a token's routing (nats)",
        "Experts without a token",
        "Share of routes dropped",
        "Experts per token",
        "load balance, weight 0.01",
        "router z, weight 0.001",
        "weighted sum, as added to the loss",
        "Learning rate",
        "Gradient norm",
        "Tokens per second",
    ]
    assert all("viewbox" in chart and "width" not in chart for chart in reader.charts)
    for words in ("train", "validation", "unigram cross-entropy", "resumed", "Layer 0", "Layer 3"):
        assert words in reader.text
    assert "Layer 4" not in reader.text
    assert "from <step 200> & on 4 ranks" in reader.text


def test_page_loads_nothing_from_elsewhere(finished_run):
    assert_loads_nothing(finished_run / "report.html")


def test_page_is_the_same_every_time(finished_run):
    first = (finished_run / "report.html").read_bytes()
    assert write_report(finished_run).read_bytes() == first


def test_page_of_a_run_that_is_going_on(tmp_path):
    """A torn last line, no summary, no configuration, no validation yet, and a loss that is null."""
    run_dir = make_run(tmp_path / "going-on", steps=12)
    (run_dir / "summary.json").unlink()
    (run_dir / "config.yaml").unlink()
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[-1] = json.dumps({**json.loads(lines[-1]), "train/loss": None})
    path.write_text("\n".join(lines) + '\n{"kind": "train", "step": 13, "tok')
    reader = read_page(write_report(run_dir))
    assert "going-on" in reader.text
    assert reader.text[reader.text.index("Steps") + 1] == "12"
    assert reader.text[reader.text.index("Final train loss") + 1] == "not finite"
    assert "unigram cross-entropy" not in reader.text
    text = read_page(write_report(make_run(tmp_path / "later", steps=70))).text
    assert text[text.index("Final validation loss") + 1].endswith(" at step 50")


def test_page_of_a_dense_run_says_that_there_is_no_router(tmp_path):
    run_dir = make_run(tmp_path, steps=5)
    path = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    dense = [{k: v for k, v in row.items() if not k.startswith(("moe/", "aux/"))} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in dense))
    reader = read_page(write_report(run_dir))
    assert reader.text.count("None recorded.") == 3
    assert len(reader.charts) == 4


def test_page_shows_incidents_drift_and_what_other_commands_found(tmp_path):
    run_dir = make_run(tmp_path / "run")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["kind"] == "validation":
            row |= {f"moe/layer_{layer:02d}/routing_drift": 0.1 * layer for layer in range(LAYERS)}
            row |= {f"moe/{name}_microseconds_per_token": row["step"] / STEPS for name in PARTS}
        elif row["step"] == 170 and row["kind"] == "train":
            row["train/loss"] += 5  # not called a spike by the run, and so by the page
    at = {"step": 150, "tokens": 150 * TOKENS_PER_STEP, "seconds": 75, "attempt": 0}
    rows.append({"kind": "event", **at, "event": "loss_spike", "message": "step 149: loss 9.5 is 5 nats above"})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = json.loads((run_dir / "summary.json").read_text())
    facts |= {
        "commit": "c0ffee",
        "causal_in_evaluation": False,
        "moe_layer_cost": {"experts": {"flops_per_route": 2e6}},
    }
    (run_dir / "summary.json").write_text(json.dumps(facts))
    passed = [{"property": "determinism", "verdict": "PASS", "detail": "same"}]
    (run_dir / "certificate.json").write_text(json.dumps({"code": "abc", "rows": passed}))
    reader = read_page(write_report(run_dir))
    labels = [chart["aria-label"] for chart in reader.charts]
    assert {"Routing drift between validations", "Spikes, collapses and numbers that were not finite"} <= set(labels)
    table = reader.text[reader.text.index("Message of the run") + 1 :]
    assert table[:3] == ["spike", "150", "step 149: loss 9.5 is 5 nats above"] and "170" not in reader.text
    assert not any("did not judge" in text for text in reader.text)
    assert "know later tokens, which no language model's do" in reader.text
    times = reader.text[reader.text.index("Time by part of a MoE layer") + 2 :]
    parts = ["router", "permute", "exchange", "experts", "shared experts", "combine"]
    assert times[:16] == [*parts, "total", "experts' share", *["1"] * 6, "6", "33%"], "of the last validation"
    assert "4.00M FLOPs" in reader.text and "c0ffee" in reader.text
    assert "certified; 1 pass, 0 do not apply or are declared. Code: abc." in reader.text
    assert f"Not measured: moe-pretrain specialise {run_dir}" in reader.text


def test_a_run_that_did_not_judge_itself_says_so(tmp_path):
    run_dir = make_run(tmp_path / "run", steps=60)
    assert not any("did not judge" in text for text in read_page(write_report(run_dir)).text)
    (run_dir / "config.yaml").write_text(yaml.safe_dump({"run": {"name": "old"}}))
    text = " ".join(read_page(write_report(run_dir)).text)
    assert (
        "The run did not judge loss spikes and collapsed routers: its configuration has no settings for that." in text
    )


def test_missing_run_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="is not a run folder: it has no metrics.jsonl") as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no train rows yet"):
        summarise(tmp_path)


def test_thinning_keeps_spikes_and_gaps():
    x = np.arange(50_000.0)
    y = np.sin(x / 1000)
    y[31_234], y[7] = 99, -99
    y[20_000:21_000] = np.nan
    thin_x, thin_y = figures.thin(x, y)
    assert len(thin_x) <= figures.MAX_POINTS
    assert (thin_x[np.nanargmax(thin_y)], thin_x[np.nanargmin(thin_y)]) == (31_234, 7)
    assert np.isnan(thin_y[(thin_x > 20_100) & (thin_x < 20_900)]).all()
    assert (np.diff(thin_x) > 0).all()


def test_heat_map_averages_neighbouring_rows():
    key = "moe/layer_02/expert_share"
    train = [{"step": s, key: [0.5, 0.3, 0.2, 0.0] if s % 2 else [0.1, 0.3, 0.6, 0.0]} for s in range(1, 801)]
    heat_map = run_charts.load_over_time(train, "02")
    assert heat_map.values.shape == (4, run_charts.MAX_COLUMNS)
    np.testing.assert_allclose(heat_map.values[:, 0], [1.2, 1.2, 1.6, 0.0])
    assert (heat_map.first_step, heat_map.last_step) == (1, 800)


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_page_draws_in_a_browser(finished_run, tmp_path, width):
    pixels = photograph(finished_run / "report.html", tmp_path, width)
    blue = (pixels[..., 2] > 0.55) & (pixels[..., 0] < 0.25)
    assert blue.sum() > 200, "no curve was drawn"
