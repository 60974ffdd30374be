"""Ladders of planted runs: laws by scheme, gains at a larger scale, and what is refused."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.planted import STEPS, TOKENS, Planted

from moe_pretrain.analysis import ladder
from moe_pretrain.analysis.compare.comparison import compare
from moe_pretrain.analysis.compare.tables import markdown
from moe_pretrain.analysis.ladder import choose_reference, gains, read_ladders
from moe_pretrain.cli import main
from moe_pretrain.run_folder.record import find_runs

SIZES, LENGTHS = (1e6, 4e6, 16e6, 64e6), (20, 60, 180)


def loss(scheme: str, parameters: float, tokens: float) -> float:
    """``fades`` has a gain that is gone at 2e9 parameters, ``stays`` one that is a constant."""
    own = {"top_k": 40.0, "fades": 26.1, "stays": 40.0}[scheme] * parameters ** -{"fades": 0.28}.get(scheme, 0.3)
    return 1.7 - 0.1 * (scheme == "stays") + own + 60 * tokens**-0.4


def plant(root: Path, schemes: tuple[str, ...], sizes: tuple[float, ...] = SIZES, lengths: tuple = LENGTHS) -> None:
    for scheme in schemes:
        for size in sizes:
            for length in lengths:
                # What the run's curve adds at this step, taken away; and noise that is the same for all schemes.
                curve = 3 * math.exp(-6 * length / STEPS) - 3 * math.exp(-6)
                noise = 0.002 * math.sin(7 * math.log(size) + length)
                Planted(
                    f"{scheme}-{size:g}-{length}",
                    loss(scheme, size, length * TOKENS) * (1 + noise) - curve,
                    router={"name": scheme, "top_k": 2},
                    other={"model.hidden_size": int(size)},
                    steps=length,
                    facts={"active_parameters": size, "total_parameters": 4 * size},
                ).write(root)


@pytest.mark.slow
def test_laws_gains_and_what_survives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ladder, "RESAMPLES", 40)
    plant(tmp_path, ("top_k", "fades", "stays"))
    ladders = read_ladders(find_runs(tmp_path), tmp_path)
    assert {each.name: len(each.rungs) for each in ladders} == {"top_k": 12, "fades": 12, "stays": 12}
    reference = choose_reference(ladders, None)
    assert reference.name == "top_k" and reference.fit.law.alpha == pytest.approx(0.3, abs=0.05)
    found = {gain.name: gain for gain in gains(ladders, reference, scale=100.0)}
    assert found["stays"].verdict == "survives" and found["stays"].there.low > 0.05
    truth = loss("top_k", 64e8, 180e5) - loss("fades", 64e8, 180e5)
    assert found["fades"].there.low <= truth <= found["fades"].there.high
    assert found["fades"].here.sign == 1 and found["fades"].verdict in ("reverses", "cannot be told")
    # Noise that all schemes have alike cancels: far narrower than the law itself is known.
    width = found["stays"].here.high - found["stays"].here.low
    losses = [law.loss(64e6, 180e3) for law in reference.fit.resampled]
    assert width < 0.7 * (max(losses) - min(losses))
    assert all("NOT DECIDED" not in cell for line in ladder.law_table(ladders)[1] for cell in line)
    text = markdown(compare(tmp_path))
    assert "at 10 times both" in text and "| stays | +0.09" in text and "survives" in text
    assert main(["ladder", str(tmp_path), "--scale", "100", "--parameters", "total"]) == 0
    printed = capsys.readouterr().out
    assert "| stays | " in printed and "survives" in printed and "| top_k | 12 | 4 | " in printed
    written = json.loads((tmp_path / "ladder.json").read_text())
    assert {run["parameters"] for run in written["ladders"][0]["runs"]} == {4 * size for size in SIZES}


def test_what_runs_do_not_decide_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Losses that do not fall with size have no exponent of it."""
    monkeypatch.setattr(ladder, "RESAMPLES", 40)
    for size in SIZES:
        for length in (*LENGTHS, 120):
            curve = 3 * math.exp(-6 * length / STEPS) - 3 * math.exp(-6)
            value = (2 + 60 * (length * TOKENS) ** -0.4) * (1 + 0.01 * math.sin(7 * math.log(size) + length)) - curve
            facts = {"active_parameters": size}
            Planted(f"{size:g}-{length}", value, steps=length, facts=facts).write(tmp_path)
    (line,) = ladder.law_table(read_ladders(find_runs(tmp_path), tmp_path))[1]
    assert line[4].endswith("NOT DECIDED")


def diverge(root: Path) -> None:
    plant(root, ("top_k",))
    Planted("sick", 9.0, end=("diverged", "loss=nan"), facts={"active_parameters": 1e6}).write(root)


def other_text(root: Path) -> None:
    plant(root, ("top_k",))
    Planted("elsewhere", 2.0, facts={"active_parameters": 1e6}, fingerprint="another").write(root)


def other_rows(root: Path) -> None:
    plant(root, ("top_k",))
    text = {"corpus": {"rows": 9}}
    for seed, rows in enumerate((text, text | {"code": {"rows": 8}})):
        Planted(f"{seed}", 2.0, seed, facts={"active_parameters": 1e6, "validation_text": rows}).write(root)


def warm(root: Path) -> None:
    plant(root, ("top_k",))
    Planted("warm", 2.0, other={"checkpoint.warm_start": "x"}, facts={"active_parameters": 1e6}).write(root)


@pytest.mark.parametrize(
    "make,line",
    [
        (lambda root: plant(root, ("top_k",), SIZES[:3]), r"top_k has 3 sizes \(1.00M, 4.00M, 16.0M parameters\).* 4"),
        (lambda root: plant(root, ("top_k",), lengths=(20, 60)), "runs of 2 lengths and must have at least 3"),
        (diverge, r"1 runs diverged \(sick\).*--without-diverged"),
        (other_text, "runs read different corpora"),
        (other_rows, "runs were validated on different rows"),
        (warm, r"warm_start=x has 1 size "),
    ],
    ids=["sizes", "lengths", "diverged", "corpora", "rows", "warm"],
)
def test_no_ladder_is_one_line(
    tmp_path: Path, make: Callable[[Path], None], line: str, capsys: pytest.CaptureFixture[str]
):
    make(tmp_path)
    with pytest.raises(ValueError, match=line) as error:
        read_ladders(find_runs(tmp_path), tmp_path)
    assert "\n" not in str(error.value)
    assert main(["ladder", str(tmp_path)]) == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_tokens_that_follow_sizes_are_refused(tmp_path: Path):
    for size, length in zip(SIZES, (20, 80, 320, 1280), strict=True):
        for seed in (1, 2):
            facts = {"active_parameters": size}
            Planted(f"{size:g}-{seed}", 2.0, seed=seed, steps=length, facts=facts).write(tmp_path)
    with pytest.raises(ValueError, match="tokens that follow sizes"):
        read_ladders(find_runs(tmp_path), tmp_path)


def test_runs_that_diverged_can_be_left_out(tmp_path: Path):
    diverge(tmp_path)
    (only,) = read_ladders(find_runs(tmp_path), tmp_path, leave_out=True)
    assert len(only.rungs) == 12


def test_a_copied_run_is_no_further_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ladder, "RESAMPLES", 2)
    plant(tmp_path, ("top_k",))
    shutil.copytree(tmp_path / "top_k-1e+06-20", tmp_path / "copy")
    (only,) = read_ladders(find_runs(tmp_path), tmp_path)
    assert len(only.rungs) == 12


def test_a_gain_by_knowing_later_tokens_has_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ladder, "RESAMPLES", 2)
    plant(tmp_path, ("top_k", "stays"))
    for path in tmp_path.glob("stays*/summary.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"causal_in_evaluation": False}))
    ladders = read_ladders(find_runs(tmp_path), tmp_path)
    (gain,) = gains(ladders, choose_reference(ladders, "top_k"), 10.0)
    assert gain.here.low > 0 and gain.verdict == "not tested: one loss knows later tokens"
