"""Ends of runs that are less than they seem: each is said, and a run without a result has an exit code of its own."""

import json
from pathlib import Path

import pytest
from helpers.runs import rows_of, run, train_words

from moe_pretrain.analysis.compare.courses import changed_fields

SICK = """
from dataclasses import dataclass
from typing import Literal
from moe_pretrain.moe.types import BalanceLevel
from moe_pretrain.moe.routers.top_k import TopKRouter, TopKRouterConfig

@dataclass(frozen=True, kw_only=True)
class SickConfig(TopKRouterConfig):
    name: Literal["sick"] = "sick"
    top_k: int = 2
    score: Literal["softmax"] = "softmax"
    weights: Literal["renormalised"] = "renormalised"
    weight_scale: float = 1.0
    num_groups: int = 1
    groups_per_token: int = 1
    projection_size: int | None = None
    load_balance_weight: float = 0.01
    load_balance_level: BalanceLevel = "last_step"
    router_z_weight: float = 0.0
    jitter: float = 0.0
    def build(self, hidden_size, num_experts, layer):
        return Sick(self, hidden_size, num_experts, layer)

class Sick(TopKRouter):
    def forward(self, hidden, context):
        routing = super().forward(hidden, context)
        if not self.training:
            routing.weight.mul_(float("nan"))
        return routing
"""


def ends(home: Path, name: str) -> list[tuple[str, str]]:
    return [(row["event"], row["message"]) for row in rows_of(home, name, "event")]


@pytest.mark.slow
def test_a_last_validation_that_is_not_finite_is_no_result(home: Path) -> None:
    (home / "sick.py").write_text(SICK)
    words = train_words("sick", "router_file=sick.py", "budget.tokens=4096", "schedule.warmup_steps=1")
    for _ in range(2):  # the same command again comes to the same end
        code, out, err = run(home, *words)
        assert code == 65 and "Traceback" not in err, err
        assert "validation loss NOT FINITE" in out and "no result: its last validation is not finite" in out
        event, message = ends(home, "sick")[-1]
        assert event == "finished" and message == "after 4 steps; THE LAST VALIDATION IS NOT FINITE"
    code, out, err = run(home, "compare", "outputs")
    assert code == 0 and "diverged" in out, err


def test_a_run_all_of_whose_steps_were_skipped_is_not_finished(home: Path) -> None:
    sick = ["fault.point=train.loss", "fault.action=not_finite", "fault.num_steps=99"]
    code, out, err = run(home, *train_words("skipped", "budget.tokens=3072", *sick))
    assert code == 65 and "Traceback" not in err, err
    assert "no result: all of its steps were skipped" in out
    event, message = ends(home, "skipped")[-1]
    assert event == "diverged" and "3 of 3 steps were SKIPPED" in message
    code, out, err = run(home, *train_words("some", "budget.tokens=4096", *sick[:2], "fault.step=3"))
    assert code == 0, err
    event, message = ends(home, "some")[-1]
    assert event == "finished" and message == "after 4 steps; 1 of 4 steps were SKIPPED, and changed nothing"


def test_what_an_own_router_does_and_that_its_file_changed_is_recorded(home: Path) -> None:
    file, words = home / "own.py", train_words("own", "router_file=own.py", "schedule.warmup_steps=1")
    facts = []
    for steps, later in ((1, "False"), (2, "False"), (3, "True")):
        file.write_text(
            SICK.partition("    def forward")[0] + f"    causal_in_training = causal_in_evaluation = {later}\n"
        )
        code, _, err = run(home, *words, f"budget.tokens={steps * 1024}")
        assert code == 0, err
        facts.append(json.loads((home / "outputs" / "own" / "summary.json").read_text()))
    assert [each["causal_in_evaluation"] for each in facts] == [False, False, True]
    assert [each["causal_in_training"] for each in facts] == [False, False, True]
    assert facts[0]["micro_batch_size"] == 4
    assert facts[0]["router_file_hash"] == facts[1]["router_file_hash"] != facts[2]["router_file_hash"]
    changed = [message for event, message in ends(home, "own") if "router_file" in message]
    assert len(changed) == 1 and "router_file" in changed_fields(changed[0])


def test_a_budget_below_what_is_done_is_said(home: Path) -> None:
    code, _, err = run(home, *train_words("longer", "budget.tokens=4096"))
    assert code == 0 and ends(home, "longer")[-1] == ("finished", "after 4 steps"), err
    for words, fragment in (
        (["budget.tokens=2048"], "budget.tokens=2048 is below the 4096 tokens done: nothing is trained"),
        (["budget.tokens=null", "budget.flops=1e6"], "budget.flops=1e+06 is below the "),
        (["budget.flops=null", "budget.tokens=9000", "budget.seconds=1e-6"], "budget.seconds=1e-06 is below the "),
    ):
        code, _, err = run(home, "train", "run.name=longer", *words)
        found = dict(ends(home, "longer"))
        assert code == 0 and fragment in found["budget"] and fragment in err, err


@pytest.mark.parametrize("warmup,steps,said", [(1, 4, False), (4, 4, True)])
def test_a_schedule_that_is_not_at_its_end_is_said(home: Path, warmup: int, steps: int, said: bool) -> None:
    name = f"warm-{warmup}"
    words = train_words(name, f"budget.tokens={steps * 1024}", f"schedule.warmup_steps={warmup}")
    code, _, err = run(home, *words)
    assert code == 0 and ("NOT AT ITS END" in ends(home, name)[-1][1]) == said, err
