"""Shipped routers with a line changed, each with the row of the certificate that says so."""

from pathlib import Path

import pytest
from helpers.mutants import MUTANTS, Mutant

from moe_pretrain.config.load import load
from moe_pretrain.verify.certificate.certify import ask
from moe_pretrain.verify.certificate.subject import Subject

SMALL = ("engine.device=cpu", "model.num_layers=1", "model.moe.num_experts=6")


@pytest.mark.parametrize("wrong", MUTANTS)
@pytest.mark.fast("of top_p that goes away", "the wrong sign", "by the rank", "in the weights")
def test_a_changed_line_is_found_by_the_row_that_says_so(wrong: str, tmp_path: Path) -> None:
    mutant = MUTANTS[wrong]
    found = ask(mutant.row, Subject(load([mutant.write(tmp_path), *SMALL, *mutant.words])))
    assert found.verdict == "FAIL" and not found.detail.startswith("raised "), found


@pytest.mark.parametrize("scheme", ["top_k", "thor", "attentive", "autonomy", "relu", "sinkhorn", "top_p"])
def test_the_same_file_without_a_change_is_as_the_shipped_router(scheme: str, tmp_path: Path) -> None:
    rows = {mutant.row for mutant in MUTANTS.values() if mutant.scheme == scheme}
    subject = Subject(load([Mutant(scheme, "", {}).write(tmp_path), *SMALL]))
    assert not [row for row in (ask(name, subject) for name in rows) if row.verdict == "FAIL"]
