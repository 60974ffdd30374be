"""Tiny configurations, composed from the shipped YAML files, in sizes that all differ from each other."""

import torch

from moe_pretrain.config.compose import config_folder
from moe_pretrain.config.load import load
from moe_pretrain.config.preflight import plan_run
from moe_pretrain.config.schema import Config
from moe_pretrain.data.rows.micro_batch import MicroBatch
from moe_pretrain.engine.micro_batch import routing_context
from moe_pretrain.moe.types import RoutingContext, StepUse
from moe_pretrain.verify import small_twin

SEQUENCE = 12
NUM_STEPS = 3

_TINY = (
    *(
        "model.vocab_size=64",
        f"model.sequence_length={SEQUENCE}",
        "model.num_layers=2",
        "model.hidden_size=16",
    ),
    *(
        "model.num_heads=2",
        "model.ffn_hidden_size=28",
        "model.cross_entropy_chunk_tokens=7",
        "model.init=normal",
        "model.init_std=0.2",
    ),
    *("model.moe.num_experts=4", "model.moe.expert_hidden_size=20"),
    # AdamW's quotient of a gradient that is almost zero is its sign, which rounding decides; with a larger epsilon the
    # update is a smooth function of the gradient, so a tight tolerance on weights is fair.
    "optimizer.epsilon=1e-4",
    *("optimizer.learning_rate=0.01", "schedule.warmup_steps=1"),
    *("engine.device=cpu", "engine.dtype=float32", "engine.check_every_steps=1"),
    *("engine.reduce_bucket_elements=2000", "parallel.timeout_seconds=100", "metrics.wandb=off"),
    *("tokenizer=pretrained", "tokenizer.path=unused"),
)

OF_LAYERS = "router.layers={0:hash,rest:loss_free}"
"""With ``router=by_layer``, which needs it."""
SCHEME_WORDS = sorted(path.stem for path in (config_folder() / "router").glob("*.yaml") if path.stem != "by_layer")
"""Choices of the group ``router`` that are one scheme."""

_LOSSES = {"load_balance_weight": 0.1, "router_z_weight": 0.05}
"""Coefficients of the schemes that have these losses."""


def tiny(*overrides: str, rows: int = 16, micro_batch_size: int = 2) -> Config:
    """Two MoE layers of four experts; ``rows`` sequences per step; ``overrides`` win."""
    scheme = next((word.partition("=")[2] for word in overrides if word.startswith("router=")), "top_k")
    fields = (config_folder() / "router" / f"{scheme}.yaml").read_text()
    losses = [f"router.{name}={weight}" for name, weight in _LOSSES.items() if f"\n{name}:" in fields]
    tokens = rows * SEQUENCE
    batch = (
        f"batch.global_batch_tokens={tokens}",
        f"budget.tokens={tokens * NUM_STEPS}",
        f"batch.micro_batch_size={micro_batch_size}",
    )
    return load([*_TINY, *batch, *losses, *overrides])


WITH_ALL_PARTS = (
    *("model.num_layers=3", "model.hidden_size=24", "model.num_heads=4", "model.num_key_value_heads=2"),
    *("model.moe.num_experts=8", "model.moe.num_leading_dense_layers=1", "model.moe.num_shared_experts=2"),
    *("model.moe.shared_expert_hidden_size=10", "model.tie_embeddings=false"),
)
"""A leading dense layer, shared experts, grouped-query attention, its own output head."""


def context_of(batch: MicroBatch, seed: int = 0, step: int = 0) -> RoutingContext:
    """What the engine hands to the routers for ``batch``."""
    return routing_context(batch, seed, step)


def step_use(tokens_per_expert: list[float] | torch.Tensor, tokens: int, sums: torch.Tensor | None = None) -> StepUse:
    """What ``after_step`` gets in a model of one MoE layer."""
    routes = torch.as_tensor(tokens_per_expert, dtype=torch.float64)
    return StepUse(routes, tokens, float(routes.sum()) / max(1, tokens), routes.new_zeros(0) if sums is None else sums)


def random_batches(config: Config, ranks: int, seed: int = 0) -> list[list[MicroBatch]]:
    """``small_twin.random_batches`` of the batches that the plan has on so many ranks."""
    return small_twin.random_batches(config, plan_run(config, ranks).batches, seed)
