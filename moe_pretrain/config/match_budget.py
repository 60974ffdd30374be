"""A model of another model's size: the width, number or k of experts that brings it nearest to a reference."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from moe_pretrain.model.decoder import ModelConfig
from moe_pretrain.model.size import ModelSize, mean_ffn_experts, model_size
from moe_pretrain.moe.build import check_experts, expert_width, with_expert_width
from moe_pretrain.moe.routers.config import RouterConfig
from moe_pretrain.schedule.budget import BudgetConfig, Matched, Measure

WIDEST, MOST = 2**20, 4096
"""Largest width and number of experts that are tried."""
Choice = tuple[ModelConfig, Any]
"""A model and its router's configuration."""


def measures(size: ModelSize) -> dict[Measure, float]:
    """Everything that ``budget.match`` may ask for."""
    return {
        "total_params": size.total_parameters,
        "active_params": size.active_parameters,
        "flops_per_token": size.training_flops_per_token,
    }


def match(
    model: ModelConfig, router: RouterConfig, reference: ModelSize, budget: BudgetConfig
) -> tuple[ModelConfig, Any, Matched]:
    """Solve ``budget.solve`` so that ``budget.match`` is as near to ``reference`` as its multiple allows.

    The measures grow with what is solved for, so the nearest is one of the two beside the target; of two equally near
    the smaller is taken. A model that has the very size of the reference is left as it is.

    Args:
        model: As configured; all but what is solved for stays.
        router: Its scheme.
        reference: What to be like.
        budget: ``match`` is not None.

    Returns:
        Model and router as solved, and what they were solved for.

    Raises:
        ValueError: The scheme has nothing to solve for, or no value comes within half a multiple of the target.
    """
    assert budget.match is not None
    kind, target = budget.match, measures(reference)[budget.match]
    field, before, choices, build = _SOLVERS[budget.solve](model, router, budget)
    matched = Matched(field, before, measures(reference))
    if measures(model_size(model, router))[kind] == target:
        return model, router, matched

    def measure(value: int) -> float:
        return measures(model_size(*build(value)))[kind]

    what = f"budget.match={kind} cannot be met by budget.solve={budget.solve} with router={router.name}"
    first, last = measure(choices[0]), measure(choices[-1])
    if first == last:
        raise ValueError(f"{what}: it does not depend on {field}")
    at = bisect_left(choices, target, key=measure)
    near = choices[max(0, at - 1) : at + 1]
    if at == 0 and first - target > (measure(choices[1]) - first) / 2:
        raise ValueError(f"{what}: {field}={choices[0]} comes to {first:,.0f}, the reference to {target:,.0f}")
    if at == len(choices) and target - last > (last - measure(choices[-2])) / 2:
        raise ValueError(f"{what}: {field}={choices[-1]} comes to {last:,.0f}, the reference to {target:,.0f}")
    return *build(min(near, key=lambda value: abs(measure(value) - target))), matched


_Problem = tuple[str, int, Sequence[int], Callable[[int], Choice]]
"""The field, its value now, the values it may have in ascending order, and what a value makes."""


def _expert_width(model: ModelConfig, router: RouterConfig, budget: BudgetConfig) -> _Problem:
    def build(width: int) -> Choice:
        if width == expert_width(model.moe, router, model.hidden_size):
            return model, router  # equation 5 comes to the same width from several
        return replace(
            model, moe=with_expert_width(model.moe, router, model.hidden_size, width, budget.multiple)
        ), router

    choices = range(budget.multiple, WIDEST + 1, budget.multiple)
    return "model.moe.expert_hidden_size", model.moe.expert_hidden_size, choices, build


def _num_experts(model: ModelConfig, router: RouterConfig, budget: BudgetConfig) -> _Problem:
    if router.dense_experts:
        raise ValueError("budget.solve=num_experts must be expert_width with router=dense, which has no experts")
    schemes, total = router.parts().values(), model.moe.num_experts
    of_all = router.expert_gate_rank or any(scheme.scored_experts(total) == total for scheme in schemes)
    if budget.match != "total_params" and not of_all:
        raise ValueError(
            f"budget.solve=num_experts must be expert_width with budget.match={budget.match} and router={router.name}: "
            "what a token costs grows with the number of experts by a row of the router only"
        )

    def build(number: int) -> Choice:
        return replace(model, moe=replace(model.moe, num_experts=number)), router

    def check(number: int) -> None:
        check_experts(build(number)[0].moe, router)

    numbers = range(budget.multiple, MOST + 1, budget.multiple)
    choices = [number for number in numbers if _is_valid(check, number)]
    return "model.moe.num_experts", model.moe.num_experts, choices, build


def _top_k(model: ModelConfig, router: RouterConfig, budget: BudgetConfig) -> _Problem:
    of_router: Any = router
    if "top_k" not in vars(router):
        raise ValueError(
            f"budget.solve=top_k must be expert_width with router={router.name}, which has no router.top_k"
        )

    def build(top_k: int) -> Choice:
        return model, replace(of_router, top_k=top_k)

    def check(top_k: int) -> None:
        check_experts(model.moe, build(top_k)[1])

    numbers = range(1, model.moe.kinds.total + 1)
    choices = [number for number in numbers if _is_valid(check, number)]
    return "router.top_k", of_router.top_k, choices, build


_SOLVERS: dict[str, Callable[[ModelConfig, RouterConfig, BudgetConfig], _Problem]] = {
    "expert_width": _expert_width,
    "num_experts": _num_experts,
    "top_k": _top_k,
}


def _is_valid(check: Callable[[int], object], value: int) -> bool:
    try:
        check(value)
    except ValueError:
        return False
    return True


def describe_match(model: ModelConfig, router: RouterConfig, budget: BudgetConfig) -> list[str]:
    """Choice of ``budget.match``, and the nearness of every measure; nothing without it."""
    matched = budget.matched
    if matched is None:
        return []
    of_router, of_moe = vars(router), vars(model.moe)
    name = matched.field.rpartition(".")[2]
    now = of_router[name] if matched.field.startswith("router.") else of_moe[name]
    line = f"budget.match={budget.match}: {matched.field}={now}"
    line += f" instead of {matched.before}" if now != matched.before else ", as it was"
    if name == "expert_hidden_size" and not router.dense_experts:
        width = expert_width(model.moe, router, model.hidden_size)
        line += f", experts {width} wide by equation 5" if width != now else ""
    used = router.dense_experts or mean_ffn_experts(model, router)
    lines = [f"{line}; a token is expected to use {used:g} experts"]
    for kind, value in measures(model_size(model, router)).items():
        wanted = matched.reference[kind]
        verdict = "matched" if kind == budget.match else "not matched" if value != wanted else "equal too"
        lines.append(f"  {kind:<16}{value:>20,.0f}, reference {wanted:>20,.0f}: {value / wanted - 1:+.3%}, {verdict}")
    return lines
