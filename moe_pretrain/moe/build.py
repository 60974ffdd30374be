"""Builder of a mixture-of-experts layer from its configuration, and the widths that follow from it."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Concatenate, ParamSpec

from moe_pretrain.moe.by_layer import in_place
from moe_pretrain.moe.experts.activation import SWIGLU
from moe_pretrain.moe.experts.config import MatrixProductConfig, SwiGLUConfig, UnequalConfig
from moe_pretrain.moe.experts.factorised import FactorisedExperts, factorised_width, full_width
from moe_pretrain.moe.experts.latent import LatentMaps
from moe_pretrain.moe.experts.matrix_product import MatrixProductExperts, check_matrix_product
from moe_pretrain.moe.experts.merged import MergedExperts
from moe_pretrain.moe.experts.swiglu import SwiGLU, SwiGLUExperts
from moe_pretrain.moe.experts.unequal import UnequalExperts, class_widths
from moe_pretrain.moe.layer import MoEConfig, MoELayer, RoutedExperts
from moe_pretrain.moe.merged_layer import MergedLayer
from moe_pretrain.moe.route_list import PADDED_OVER_EXPECTED
from moe_pretrain.moe.router import Router
from moe_pretrain.moe.routers.config import LinearRouterConfig, RouterConfig
from moe_pretrain.moe.types import ExpertShard, LayerPlace

_More = ParamSpec("_More")


def build_moe_layer(
    moe: MoEConfig,
    router: RouterConfig,
    hidden_size: int,
    layer: int,
    shard: ExpertShard,
    norm_epsilon: float = 1e-6,
) -> MoELayer | SwiGLU:
    """Build layer ``layer`` with this rank's experts; parameters are empty until ``model.init`` fills them.

    ``router`` is that of the model, of which the layer gets its own.
    """
    module = None if router.dense_experts else build_router(moe, router, hidden_size, layer)
    router = router.of_layer(layer)
    if module is None:
        return SwiGLU(hidden_size, dense_width(moe, router), moe.activation_function)
    rank, width = expert_gate(moe, router), expert_width(moe, router, hidden_size)
    activation = moe.activation_function
    if router.merges_experts:
        merged = MergedExperts(moe.num_experts, hidden_size, width, shard, activation)
        return MergedLayer(moe, module, merged, hidden_size)
    experts: RoutedExperts
    latent, size = None, moe.routed_size(hidden_size)
    if moe.latent_size is not None:
        epsilon = norm_epsilon if moe.latent_norm else None
        latent = LatentMaps(hidden_size, size, epsilon, expected_ffn_experts(moe, router))
    if isinstance(moe.experts, UnequalConfig):
        widths = class_widths(moe.experts.pattern, width)
        experts = UnequalExperts(widths, moe.num_experts, size, shard, activation)
    elif isinstance(moe.experts, MatrixProductConfig):
        experts = MatrixProductExperts(moe.experts, moe.num_experts, size, width, shard, activation)
    elif rank is None:
        experts = SwiGLUExperts(moe.num_experts, size, width, shard, activation)
    else:
        owns_down = moe.gate_rank is not None
        experts = FactorisedExperts(moe.num_experts, size, width, rank, shard, owns_down, activation)
    built = MoELayer(moe, module, experts, hidden_size, latent)
    built.padded_routes_per_token = PADDED_OVER_EXPECTED * expected_ffn_experts(moe, router)
    if router.balance_level == "last_step":
        built.count_last_step()
    return built


def build_router(moe: MoEConfig, router: RouterConfig, hidden_size: int, layer: int) -> Router:
    """The module that routes in layer ``layer`` of a model with ``router``."""
    own = router.of_layer(layer)
    width = expert_width(moe, own, hidden_size)
    module = own.build_in_place(hidden_size, LayerPlace(layer, is_lowest(moe, router, layer), moe.kinds, width))
    if moe.kinds.balances_cost:
        module.balanced_costs = moe.kinds.costs
    return module


def is_lowest(moe: MoEConfig, router: RouterConfig, layer: int) -> bool:
    """Whether no MoE layer below ``layer`` carries something up to it: to the same scheme, from the nearest one."""
    below = [one for one in range(layer) if moe.is_moe_layer(one)]
    if not below:
        return True
    own, nearest = router.of_layer(layer), router.of_layer(below[-1])
    return nearest.name != own.name or not nearest.carries


def expert_gate(moe: MoEConfig, router: RouterConfig) -> int | None:
    """Rank of the experts' factorised gate, None for a full one."""
    return router.expert_gate_rank or moe.gate_rank


def no_fused_products(moe: MoEConfig, router: RouterConfig) -> str | None:
    """Reason why experts cannot run as ``experts/fused_products.py``, which is for SwiGLU with full matrices."""
    if router.dense_experts or router.merges_experts:
        return f"router={router.name} sends no token to an expert"
    if expert_gate(moe, router) is not None:
        return f"experts of router={router.name} have factorised gates"
    if isinstance(moe.experts, MatrixProductConfig):
        return f"experts={moe.experts.name} rebuilds its matrices"
    if moe.activation_function != SWIGLU:
        return f"{moe.activation_name} is not SwiGLU"
    return None


def expert_width(moe: MoEConfig, router: RouterConfig, hidden_size: int) -> int:
    """Inner width of one expert."""
    rank = expert_gate(moe, router)
    if rank is None:
        return moe.expert_hidden_size
    return factorised_width(hidden_size, moe.expert_hidden_size, rank, moe.expert_width_multiple)


def with_expert_width(moe: MoEConfig, router: RouterConfig, hidden_size: int, width: int, multiple: int) -> MoEConfig:
    """``moe`` with routed experts of inner width ``width``, a multiple of ``multiple``, however their gate is made."""
    rank = expert_gate(moe, router)
    if rank is None:
        return replace(moe, expert_hidden_size=width)
    return replace(moe, expert_hidden_size=full_width(hidden_size, width, rank), expert_width_multiple=multiple)


def width_problems(moe: MoEConfig, router: RouterConfig, hidden_size: int) -> list[str]:
    """Widths that grouped products in bfloat16 on a GPU refuse, each with the nearest that they take."""
    widths = {"model.hidden_size": hidden_size}
    if moe.latent_size is not None:
        widths["model.moe.latent_size"] = moe.latent_size
    rank = expert_gate(moe, router)
    if rank is None:
        widths["model.moe.expert_hidden_size"] = moe.expert_hidden_size
    else:
        name = "model.moe.gate_rank" if moe.gate_rank else "router.gate_rank"
        widths |= {name: rank, "model.moe.expert_width_multiple": moe.expert_width_multiple}
    narrow = []
    if isinstance(moe.experts, UnequalConfig):
        made = sorted(set(class_widths(moe.experts.pattern, widths.pop("model.moe.expert_hidden_size"))))
        if any(width % 8 for width in made):
            narrow = [
                f"model.moe.expert_hidden_size={moe.expert_hidden_size} with model.moe.experts.pattern="
                f"{list(moe.experts.pattern)} makes widths {', '.join(map(str, made))}, which must be multiples of 8 "
                "on a GPU in bfloat16: grouped_mm needs 16 bytes"
            ]
    return narrow + [
        f"{name}={width} must be a multiple of 8 on a GPU in bfloat16: grouped_mm needs 16 bytes; nearest: "
        + " or ".join(str(value) for value in (width // 8 * 8, width // 8 * 8 + 8) if value)
        for name, width in widths.items()
        if width % 8
    ]


def _of_each_part(
    check: Callable[Concatenate[MoEConfig, RouterConfig, _More], None],
) -> Callable[Concatenate[MoEConfig, RouterConfig, _More], None]:
    """``check`` of one scheme made one of all schemes that a model has, each complaint about the one that it is of."""

    @functools.wraps(check)
    def of_all(moe: MoEConfig, router: RouterConfig, *more: _More.args, **named: _More.kwargs) -> None:
        for place, scheme in router.parts().items():
            try:
                check(moe, scheme, *more, **named)
            except ValueError as error:
                raise ValueError(in_place(str(error), place)) from error

    return of_all


@_of_each_part
def check_experts(moe: MoEConfig, router: RouterConfig) -> None:
    """Raise ``ValueError`` unless ``router`` can choose among all experts that ``moe`` has."""
    kinds, name = moe.kinds, moe.experts.name
    if moe.shared_expert_gate and (router.dense_experts or not moe.shared_width):
        has_none = f"router={router.name}" if router.dense_experts else "model.moe.num_shared_experts=0"
        raise ValueError(
            f"model.moe.shared_expert_gate=true must be false with {has_none}: there are no shared experts"
        )
    if isinstance(moe.experts, UnequalConfig):
        _check_unequal(moe, moe.experts, router)
    if not kinds.zero_computation:
        router.check_num_experts(kinds.total)
        return
    reason = _reason_against(
        router,
        kinds.ffn,
        merging="merges parameters, and these have none",
        asking="asks the experts themselves how well a token fits, and these have nothing to answer with",
    )
    if reason is not None:
        raise ValueError(f"experts={name} must be another with router={router.name}, {reason}: experts=swiglu")
    try:
        router.check_num_experts(kinds.total)
    except ValueError as error:
        more = f"model.moe.num_experts={kinds.ffn} and {kinds.zero_computation} zero-computation experts"
        raise ValueError(str(error).replace(f"model.moe.num_experts={kinds.total}", more)) from None


def _reason_against(router: RouterConfig, num_ffn: int, merging: str, asking: str) -> str | None:
    """Reason why ``router`` cannot have experts of an odd kind, if it merges experts or asks them for scores."""
    if router.dense_experts:
        return "which has no routed experts"
    if router.merges_experts:
        return f"which {merging}"
    if router.expert_gate_rank is not None or router.scored_experts(num_ffn):
        return f"which {asking}"
    return None


def _check_unequal(moe: MoEConfig, experts: UnequalConfig, router: RouterConfig) -> None:
    reason = _reason_against(
        router,
        moe.num_experts,
        merging="merges parameters of one shape",
        asking="asks the experts themselves how well a token fits, by inner activations of one width",
    )
    if reason is None and router.starts_experts:
        reason = "which begins an expert with the mean of others, of one width"
    if reason is not None:
        raise ValueError(f"experts=unequal must be another with router={router.name}, {reason}: experts=swiglu")
    if moe.gate_rank is not None:
        raise ValueError(f"model.moe.gate_rank={moe.gate_rank} must be null with experts=unequal")
    if moe.num_experts % len(experts.pattern):
        raise ValueError(
            f"model.moe.num_experts={moe.num_experts} must be a multiple of the {len(experts.pattern)} numbers of "
            f"model.moe.experts.pattern={list(experts.pattern)}"
        )
    class_widths(experts.pattern, moe.expert_hidden_size)
    if not moe.kinds.balances_cost:
        return
    if router.evens_load is None:
        raise ValueError(
            f"model.moe.experts.balance=cost must be routes with router={router.name} as it is configured: nothing in "
            "it evens what experts of several widths cost"
        )
    cheapness = [1 / cost for cost in moe.kinds.costs]
    most = router.mean_experts_per_token * max(cheapness) / sum(cheapness)
    if router.evens_load == "quotas" and most > 1:
        raise ValueError(
            f"model.moe.experts.balance=cost must be routes with router={router.name}, "
            f"{router.mean_experts_per_token:g} experts per token and model.moe.experts.pattern="
            f"{list(experts.pattern)}: the quota of each of the narrowest experts is {most:.2f} times as many tokens "
            "as there are"
        )


@_of_each_part
def check_gate(moe: MoEConfig, router: RouterConfig, hidden_size: int) -> None:
    """Raise ``ValueError`` if the gate of the experts cannot be factorised as asked; a dense network has none."""
    if isinstance(moe.experts, MatrixProductConfig):
        reason = None
        if router.dense_experts:
            reason = "which has no routed experts"
        elif router.merges_experts:
            reason = "which merges full experts"
        elif router.scored_experts(moe.num_experts):
            reason = "which scores full experts"
        elif router.starts_experts:
            reason = "which starts experts anew: they share what it would write"
        elif expert_gate(moe, router) is not None:
            reason = "whose experts have a factorised gate"
        if reason is not None:
            raise ValueError(f"experts=matrix_product must be swiglu with router={router.name}, {reason}")
        check_matrix_product(moe.experts, moe.routed_size(hidden_size), moe.expert_hidden_size)
    if router.dense_experts:
        return
    if router.merges_experts and moe.gate_rank is not None:
        raise ValueError(
            f"model.moe.gate_rank={moe.gate_rank} must be null with router={router.name}, which merges full experts"
        )
    of_router = router.expert_gate_rank
    if of_router is not None and moe.gate_rank is not None:
        raise ValueError(
            f"model.moe.gate_rank={moe.gate_rank} must be null with router={router.name}, which has router.gate_rank"
        )
    if router.scored_experts(moe.num_experts) and moe.gate_rank is not None:
        raise ValueError(
            f"model.moe.gate_rank={moe.gate_rank} must be null with router={router.name}, which scores full experts"
        )
    rank = expert_gate(moe, router)
    if rank is not None and rank >= hidden_size:
        name = "router.gate_rank" if of_router is not None else "model.moe.gate_rank"
        raise ValueError(f"{name}={rank} must be below model.hidden_size={hidden_size}")


@_of_each_part
def check_coupling(moe: MoEConfig, router: RouterConfig) -> None:
    """Raise ``ValueError`` if the rows of the router cannot be run through the gates of the experts as tokens are."""
    if not couples_experts(router):
        return
    asked = f"router.expert_router_coupling_weight={vars(router)['expert_router_coupling_weight']:g}"
    if size := vars(router).get("projection_size"):
        raise ValueError(f"{asked} must be 0 with router.projection_size={size}: its rows are no tokens")
    if moe.gate_rank is not None:
        raise ValueError(f"{asked} must be 0 with model.moe.gate_rank={moe.gate_rank}: it is of full gates")
    if not isinstance(moe.experts, SwiGLUConfig):
        raise ValueError(f"{asked} must be 0 with experts={moe.experts.name}: it compares gates of one width")
    if moe.num_experts < 2:
        raise ValueError(f"{asked} must be 0 with model.moe.num_experts=1: there is no other expert")


@_of_each_part
def check_latent(moe: MoEConfig, router: RouterConfig, hidden_size: int) -> None:
    """Raise ``ValueError`` unless routed experts can read and return rows of another width than the router reads."""
    if moe.latent_size is None:
        if moe.latent_norm:
            raise ValueError("model.moe.latent_norm=true must be false with model.moe.latent_size=null")
        return
    asked = f"model.moe.latent_size={moe.latent_size}"
    reason = _reason_against(
        router,
        moe.num_experts,
        merging="sends no token to an expert and merges them at the model's width",
        asking="ranks experts by their own activations, and they would be those of a narrower token",
    )
    if reason is not None:
        raise ValueError(f"{asked} must be null with router={router.name}, {reason}")
    if moe.kinds.zero_computation:
        raise ValueError(f"{asked} must be null with experts={moe.experts.name}, which has copies of the token itself")
    if moe.gate_rank is not None:
        raise ValueError(f"{asked} must be null with model.moe.gate_rank={moe.gate_rank}: both narrow an expert")
    if moe.latent_size >= hidden_size:
        raise ValueError(f"{asked} must be below model.hidden_size={hidden_size}")


@_of_each_part
def check_combine(moe: MoEConfig, router: RouterConfig) -> None:
    """Raise ``ValueError`` if a combination that compares a token's expert outputs never gets two of them."""
    if moe.combine.name == "sum":
        return
    reason = None
    if router.dense_experts:
        reason = "which has no experts"
    elif router.merges_experts:
        reason = "which merges experts instead of their outputs"
    elif router.experts_per_token_limit == 1:
        reason = "in which every token has one expert"
    elif moe.kinds.zero_computation:
        raise ValueError(
            f"combine={moe.combine.name} must be sum with experts={moe.experts.name}, whose cheap experts have no "
            "outputs of their own: they are added up with the token"
        )
    elif moe.num_experts < 2:
        reason = "of model.moe.num_experts=1"
    if reason is not None:
        raise ValueError(
            f"combine={moe.combine.name} must be sum with router={router.name}, {reason}: it acts on two or more "
            "expert outputs of a token"
        )


def dense_width(moe: MoEConfig, router: RouterConfig) -> int:
    """Inner width of the dense twin: the active routed experts' and the shared experts' together."""
    return router.dense_experts * moe.expert_hidden_size + moe.shared_width


def couples_experts(router: RouterConfig) -> bool:
    """Whether training runs rows of the router through the gates of all experts."""
    return isinstance(router, LinearRouterConfig) and router.couples_experts


def num_sharded_experts(moe: MoEConfig, router: RouterConfig) -> int:
    """Experts per MoE layer that are spread over ranks; 0 when the model has no routing."""
    return 0 if router.dense_experts else moe.num_experts


def sharded(moe: MoEConfig, router: RouterConfig) -> tuple[str, int]:
    """Field and number of what expert parallelism spreads over ranks: experts, or the inner width of merged ones."""
    if router.merges_experts:
        return "model.moe.expert_hidden_size", moe.expert_hidden_size
    if isinstance(moe.experts, UnequalConfig):
        repeats = moe.num_experts // len(moe.experts.pattern)
        return "model.moe.num_experts / len(model.moe.experts.pattern)", repeats
    return "model.moe.num_experts", num_sharded_experts(moe, router)


def padded_ffn_experts(moe: MoEConfig, router: RouterConfig) -> float:
    """Rows per token that experts of this rank get on a GPU in bfloat16, with the padding of ``moe.route_list``."""
    expected = expected_ffn_experts(moe, router)
    most = router.most_experts_per_token(moe.kinds.total)
    takes_padding = moe.combine.name == "sum" and not isinstance(moe.experts, UnequalConfig)
    return most if takes_padding and expected < most <= PADDED_OVER_EXPECTED * expected else expected


def expected_ffn_experts(moe: MoEConfig, router: RouterConfig) -> float:
    """Feed-forward experts that a token is expected to use: all of its routes, but for those to cheaper experts."""
    kinds = moe.kinds
    others = kinds.zero_computation * router.zero_computation_load
    return router.mean_experts_per_token * kinds.ffn / (kinds.ffn + others)
