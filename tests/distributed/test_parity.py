"""The gate: for any topology and any way to take the step, the numbers are the oracle's.

Here a part of the product in which every pair of choices meets, and as the fast set a part of that with every choice;
``scripts/parity.sh`` runs all of it.
"""

import functools
import itertools
from typing import Any

import pytest
from helpers.parity import TOPOLOGIES, Case, covering_cases, fast_cases, run_cases

from moe_pretrain.model.parameter_groups import meta_model
from moe_pretrain.verify.verify import QuantityCheck

pytestmark = pytest.mark.timeout(1200)  # the first test makes the results of them all
Results = dict[Case, list[QuantityCheck]]


@functools.cache
def _num_losses(variant: str) -> int:
    config = Case(1, 1, 0, 1, 1, "none", 0.0, "float32", variant).config()
    return len(meta_model(config.model, config.router).aux_weights)


@pytest.fixture(scope="module", params=["fast", pytest.param("others", marks=pytest.mark.slow)])
def results(request: pytest.FixtureRequest) -> Results:
    fast = fast_cases()
    return run_cases(fast if request.param == "fast" else [case for case in covering_cases() if case not in fast])


def test_the_fast_set_has_every_choice():
    def choices(cases: list[Case]) -> set[Any]:
        fields = set(itertools.chain.from_iterable(vars(case).items() for case in cases))
        return fields | {(case.ranks, case.expert_parallel_size, case.dtype) for case in cases}

    assert choices(fast_cases()) == choices(covering_cases())


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda topology: "dp{}_ep{}".format(*topology))
def test_every_quantity_equals_the_oracle(results: Results, topology: tuple[int, int]) -> None:
    own = {case: rows for case, rows in results.items() if (case.ranks, case.expert_parallel_size) == topology}
    assert own
    different = [f"{case}: {row}" for case, rows in own.items() for row in rows if not row.is_same]
    assert not different, "\n".join(different)


def test_the_oracle_would_notice(results: Results) -> None:
    """Every case compared every quantity, and the errors are those of another order of sums, not zero by accident."""
    for case, rows in results.items():
        losses = sum(row.quantity.startswith("aux ") for row in rows)
        assert losses == _num_losses(case.variant)
        assert len(rows) - losses == (9 if case.dtype == "float32" else 8)
    assert max(row.error for rows in results.values() for row in rows if "gradients" in row.quantity) > 0
