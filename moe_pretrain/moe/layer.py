"""The mixture-of-experts layer: route, send to the experts, combine, add the shared experts."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_pretrain.moe.combine import CombineConfig, SumConfig, build_combine
from moe_pretrain.moe.dispatch import run_experts, score_routes
from moe_pretrain.moe.experts.activation import Activation
from moe_pretrain.moe.experts.config import ExpertsConfig, SwiGLUConfig, ZeroComputationConfig
from moe_pretrain.moe.experts.factorised import FactorisedExperts
from moe_pretrain.moe.experts.latent import LatentMaps
from moe_pretrain.moe.experts.matrix_product import MatrixProductExperts
from moe_pretrain.moe.experts.merged import MergedExperts
from moe_pretrain.moe.experts.swiglu import SwiGLU, SwiGLUExperts
from moe_pretrain.moe.experts.unequal import UnequalExperts
from moe_pretrain.moe.experts.zero_computation import ZeroComputationExperts
from moe_pretrain.moe.part_timer import part
from moe_pretrain.moe.ranks import route_by_rank
from moe_pretrain.moe.router import Router
from moe_pretrain.moe.types import Exchange, ExpertKinds, Experts, MoEOutput, Routing, RoutingContext, ScoreRoutes

RoutedExperts = SwiGLUExperts | FactorisedExperts | UnequalExperts | MatrixProductExperts
"""What holds the networks that routes go to."""


@dataclass(frozen=True)
class MoEConfig:
    """The experts of every MoE layer.

    Attributes:
        num_experts: Routed experts per layer that are feed-forward networks, over all ranks, >= 1.
        expert_hidden_size: Inner width of a routed expert.
        num_shared_experts: Experts that every token uses beside the routed ones, >= 0. They are one SwiGLU of
            ``num_shared_experts * shared_expert_hidden_size``.
        shared_expert_hidden_size: Inner width of a shared expert.
        every_k_layers: Every k-th layer is MoE, counted from the first layer after the leading dense ones, >= 1.
        num_leading_dense_layers: Layers at the bottom that stay dense.
        gate_rank: Rank of a factorised gate in every routed expert, or None for a full gate. It is the control of
            Autonomy-of-Experts with a router kept; that scheme itself has ``router.gate_rank``.
        expert_width_multiple: With a factorised gate the experts' width, solved from equation 5 so that parameters stay
            the same, is rounded to a multiple of this.
        shared_expert_gate: Whether the shared experts' output is multiplied with the sigmoid of a linear map of the
            token (Qwen2-MoE, Qwen3-Next).
        activation: Inside routed and shared experts, and the dense network in their place; leading dense layers have
            SwiGLU. ``swiglu``: ``silu(g) * u``; ``gpt_oss``: ``(u + 1) * g * sigmoid(1.702 g)``.
        activation_limit: Bound of ``g`` from above and of ``u`` on both sides, > 0 (gpt-oss: 7, DeepSeek-V4: 10); None
            for none.
        combine: How a token's expert outputs become one: the group ``combine``.
        latent_size: Width of the routed experts' inputs and outputs, below the model's, with a map to it before tokens
            are sent and one back after outputs are combined (Nemotron-H, Kimi K3); None for the model's width. Router
            and shared experts have the model's.
        latent_norm: Whether combined outputs of that width are normalised before they are mapped back (Kimi K3).
    """

    num_experts: PositiveInt
    expert_hidden_size: PositiveInt
    num_shared_experts: NonNegativeInt
    shared_expert_hidden_size: PositiveInt
    every_k_layers: PositiveInt
    num_leading_dense_layers: NonNegativeInt
    gate_rank: PositiveInt | None
    expert_width_multiple: PositiveInt
    combine: Annotated[CombineConfig, Field(discriminator="name")] = SumConfig("sum")
    experts: ExpertsConfig = SwiGLUConfig()
    shared_expert_gate: bool = False
    activation: Literal["swiglu", "gpt_oss"] = "swiglu"
    activation_limit: PositiveFloat | None = None
    latent_size: PositiveInt | None = None
    latent_norm: bool = False

    def routed_size(self, hidden_size: int) -> int:
        """Width of what routed experts read and return in a model of width ``hidden_size``."""
        return self.latent_size or hidden_size

    @property
    def kinds(self) -> ExpertKinds:
        """The experts among which a router chooses."""
        return self.experts.kinds(self.num_experts)

    @property
    def activation_function(self) -> Activation:
        """Function that ``activation`` and ``activation_limit`` name."""
        alpha, offset = (1.0, 0.0) if self.activation == "swiglu" else (1.702, 1.0)
        return Activation(alpha, offset, self.activation_limit or math.inf)

    @property
    def activation_name(self) -> str:
        """Both fields and their values, for messages."""
        return f"model.moe.activation={self.activation} with model.moe.activation_limit={self.activation_limit}"

    @property
    def expert_input_scale(self) -> float:
        """Factor of the routed experts' input."""
        return self.experts.input_scale if isinstance(self.experts, ZeroComputationConfig) else 1.0

    @property
    def shared_width(self) -> int:
        """Inner width of the shared experts together."""
        return self.num_shared_experts * self.shared_expert_hidden_size

    def is_moe_layer(self, layer: int) -> bool:
        """Whether ``layer`` (from 0) has experts."""
        after = layer - self.num_leading_dense_layers
        return after >= 0 and after % self.every_k_layers == 0


class MoELayer(nn.Module):
    """Routed experts plus shared experts; replaces the feed-forward network of a block.

    The router chooses among ``kinds``: networks, which ``experts`` holds in part and the exchange reaches, and others,
    which ``zero_computation`` holds.

    ``exchange`` is None while this process holds all experts; ``parallel`` sets it for expert parallelism.
    ``overlaps_exchange`` says whether each half of the tokens is exchanged while experts run the other.
    ``experts_of_sender`` is None unless the rows of each sending rank are to run by themselves (``engine.elastic``).
    ``padded_routes_per_token`` is the length up to which lists of routes go to this rank's experts with their padding.
    """

    def __init__(
        self,
        config: MoEConfig,
        router: Router,
        experts: RoutedExperts | MergedExperts,
        hidden_size: int,
        latent: LatentMaps | None = None,
    ):
        super().__init__()
        self.kinds = config.kinds
        self.last_routes: Tensor | None
        self.register_buffer("last_routes", None)
        self.router = router
        self.experts = experts
        self.latent = latent
        others = self.kinds.zero_computation
        self.zero_computation = ZeroComputationExperts(self.kinds, hidden_size) if others else None
        self.input_scale = config.expert_input_scale
        shared = (hidden_size, config.shared_width, config.activation_function, config.shared_expert_gate)
        self.shared_experts = SwiGLU(*shared) if config.shared_width else None
        self.combine = build_combine(config.combine)
        self.exchange: Exchange | None = None
        self.overlaps_exchange = False
        self.experts_of_sender: Callable[[int], Experts] | None = None
        self.padded_routes_per_token = 0.0

    def count_last_step(self) -> None:
        """Keep the routes to each expert in the last step for the balance loss of the next; checkpoints save them."""
        self.last_routes = torch.zeros(self.kinds.total, dtype=torch.float64)

    def forward(
        self, hidden: Float[Tensor, "tokens hidden"], context: RoutingContext, recompute_experts: bool
    ) -> MoEOutput:
        """Apply the layer.

        Args:
            hidden: Output of the block's norm.
            context: What the router may know.
            recompute_experts: Keep no activations of the experts but run them (and the exchange) again in
                backward. The router's decision is always kept, never made twice.
        """
        if self.router.needs_expert_scores:
            context = replace(context, score_routes=self._score_routes(recompute_experts))
        if self.router.needs_proxy_norms and self.training:
            context = replace(context, proxy_norms=self._proxy_norms)
        with part("router"):
            routing: Routing = (
                self.router(hidden, context) if context.ranks is None else route_by_rank(self.router, hidden, context)
            )
        if self.zero_computation is None:
            routing = self._without_much_padding(routing, hidden)
        options: dict[str, bool] = {}
        if isinstance(self.experts, MatrixProductExperts) and self.training:
            options = self.experts.options(context, self.router.layer)
        arguments = hidden, routing.weight, routing.payload, routing, options
        if recompute_experts:
            output = checkpoint(self._experts_of, *arguments, use_reentrant=False)
        else:
            output = self._experts_of(*arguments)
        return MoEOutput(output, routing.aux, routing.use, routing.carried)

    @property
    def stacks(self) -> list[SwiGLUExperts | FactorisedExperts | MatrixProductExperts | MergedExperts]:
        """The modules that hold this rank's networks, each those of one width."""
        if isinstance(self.experts, UnequalExperts):
            return list(self.experts.stacks)
        return [self.experts]

    def _without_much_padding(self, routing: Routing, hidden: Tensor) -> Routing:
        """``routing`` as experts take it: with its padding where that is little, else cut by a wait for its length.

        An exchange cuts it by itself, where it learns the sizes of its blocks. Only products of all experts' rows at
        once pass over padding (``experts.grouped``), and a comparison of outputs would compare it.
        """
        fits = len(routing.expert_index) <= self.padded_routes_per_token * len(hidden)
        is_one_block = (
            hidden.is_cuda and hidden.dtype == torch.bfloat16 and not isinstance(self.experts, UnequalExperts)
        )
        if self.exchange is not None or (fits and is_one_block and self.combine is None):
            return routing
        return routing.exact()

    def _score_routes(self, recompute_experts: bool) -> ScoreRoutes:
        """Function by which the router asks experts for scores; ``recompute_experts`` keeps none of their activations.

        Recomputation leaves out the exchange: what was received is kept.
        """
        assert isinstance(self.experts, SwiGLUExperts), "moe.check_gate has refused experts of another kind"
        scores = self.experts.scores
        score = partial(checkpoint, scores, use_reentrant=False) if recompute_experts else scores
        return partial(score_routes, num_experts=self.kinds.ffn, score=score, exchange=self.exchange)

    def _proxy_norms(self, proxies: Float[Tensor, "experts hidden"]) -> Float[Tensor, "experts experts"]:
        """Norm of each expert's gate (columns) for each row; experts of other ranks say theirs, with gradient."""
        assert isinstance(self.experts, SwiGLUExperts), "moe.check_coupling has refused experts of another kind"
        if self.latent is not None:
            proxies = self.latent.narrow(proxies.to(self.latent.in_weight.dtype))
        norms = self.experts.gate_norms(proxies)
        if self.exchange is not None:
            size = self.exchange.size
            everywhere = [len(norms)] * size
            (norms,) = self.exchange.start([norms.repeat(size, 1)], everywhere, everywhere).wait()
        return norms.T

    def _experts_of(
        self,
        hidden: Tensor,
        weight: Tensor,
        payload: Tensor | None,
        routing: Routing,
        options: dict[str, bool],
    ) -> Tensor:
        """Routed plus shared experts. What carries gradient is passed by itself, so that recomputation sees it."""
        arguments: dict[str, Any] = self.router.expert_arguments(self.experts.expert_ids) | options
        routed = replace(routing, weight=weight, payload=payload)
        inputs = hidden if self.input_scale == 1 else hidden * self.input_scale
        if self.latent is not None:
            with part("experts"):
                inputs = self.latent.narrow(inputs)
        meanwhile = None if self.shared_experts is None else partial(self._run_shared, self.shared_experts, hidden)
        if self.zero_computation is not None:
            meanwhile = partial(self._run_zero_computation, self.zero_computation, inputs, routed, meanwhile)
            routed = self._without_much_padding(routed.networks(self.kinds.ffn), inputs)
        experts: Experts = partial(self.experts, **arguments)
        if self.overlaps_exchange and isinstance(self.experts, MatrixProductExperts):  # else each half would rebuild
            with part("experts"):
                experts = self.experts.rebuilt(**arguments)
        output, beside = run_experts(
            inputs,
            routed,
            self.kinds.ffn,
            experts,
            self.exchange,
            meanwhile=meanwhile,
            experts_of_sender=self.experts_of_sender,
            combine=self.combine,
            in_halves=self.overlaps_exchange,
        )
        if self.latent is not None:
            with part("experts"):
                output = self.latent.widen(output)
        if beside is None:
            return output
        with part("combine"):
            return output + beside

    def _run_shared(self, shared_experts: SwiGLU, hidden: Tensor) -> Tensor:
        with part("shared_experts"):
            return shared_experts(hidden)

    def _run_zero_computation(
        self,
        experts: ZeroComputationExperts,
        inputs: Tensor,
        routed: Routing,
        shared: Callable[[], Tensor] | None,
    ) -> Tensor:
        with part("experts"):
            output = experts(inputs, routed.token_index, routed.expert_index, routed.weight)
        return output if shared is None else output + shared()
