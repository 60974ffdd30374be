"""Fields that several schemes share say the same of each: what planner, builder and budgets ask a configuration."""

from dataclasses import fields

import pytest

from moe_pretrain.config.load import load
from moe_pretrain.moe.routers import SHIPPED
from moe_pretrain.moe.routers.config import RouterConfig


def of(name: str, *words: str) -> RouterConfig:
    return load([f"router={name}", *words]).router


@pytest.mark.parametrize("name", SHIPPED)
def test_shared_fields_are_what_the_members_say(name: str):
    has = {field.name for field in fields(SHIPPED[name])}
    scheme = of(name)
    assert scheme.expert_gate_rank == (scheme.gate_rank if "gate_rank" in has else None)
    assert scheme.balance_level == (scheme.load_balance_level if "load_balance_level" in has else None)
    if "top_k" in has:
        assert scheme.fixed_experts_per_token == scheme.experts_per_token_limit == scheme.top_k
        assert scheme.most_experts_per_token(8) == scheme.mean_experts_per_token == scheme.top_k
    if "max_experts" in has:
        most = 3
        limited = of(name, f"router.max_experts={most}")
        assert limited.experts_per_token_limit == limited.most_experts_per_token(8) == most
        assert limited.fixed_experts_per_token is None
        unlimited = of(name, "router.max_experts=null")
        assert unlimited.experts_per_token_limit is None
        assert unlimited.most_experts_per_token(8) == 8


def test_a_number_that_no_field_has_is_said_too():
    assert of("thor").fixed_experts_per_token == 1
    by_mean = of("expert_choice", "router.capacity_factor=1")
    assert by_mean.experts_per_token_limit is None
    assert by_mean.most_experts_per_token(8) == by_mean.mean_experts_per_token == 1
