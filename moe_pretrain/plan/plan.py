"""Plan of a run, before anything is started: parameters, FLOPs, memory, traffic, time; and what fits where."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moe_pretrain import data
from moe_pretrain.config.compose import choices
from moe_pretrain.config.load import load
from moe_pretrain.config.match_budget import describe_match
from moe_pretrain.config.preflight import RunPlan, plan_run
from moe_pretrain.config.schema import Config
from moe_pretrain.engine.deepspeed_config import Dtype
from moe_pretrain.engine.optimizers.base import check_optimizer, describe_rates, rate_scales_by_group
from moe_pretrain.model.block import Recompute
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.parameter_groups import meta_model, parameter_roles
from moe_pretrain.model.size import ModelSize
from moe_pretrain.moe.build import build_router, sharded, width_problems
from moe_pretrain.plan.memory import (
    BYTES,
    Memory,
    local_parameters,
    memory_per_rank,
    routes_of_rank,
)
from moe_pretrain.schedule.batch_plan import BatchPlan
from moe_pretrain.system.words import short_duration, short_number

GIB = 2**30
FROZEN, MEASURED = "routers that nothing trains", "attention that a router measures"
"""Parts without a backward."""
MERGED, REBUILT = "merging of experts", "rebuilding of experts"
COMPARED = "expert outputs that are compared"
"""Part whose backward costs as much as its forward."""
USABLE = 0.92
"""Share of a GPU's memory that training may fill; the rest goes to the driver, NCCL and fragmentation."""
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Assumptions:
    """Assumptions on what the configuration does not say.

    Attributes:
        mfu: Share of the peak that model FLOPs reach, in (0, 1].
        peak: FLOP/s of one device; 989e12 is the H100's dense bfloat16.
        gpu_memory: GiB of one device.
        worst_load: Rows on the busiest rank over the mean, under expert parallelism, >= 1.
    """

    mfu: float = 0.35
    peak: float = 989e12
    gpu_memory: float = 79.0
    worst_load: float = 1.5

    def __post_init__(self) -> None:
        for name, ok, constraint in (
            ("mfu", 0 < self.mfu <= 1, "in (0, 1]"),
            ("peak", self.peak > 0, "positive"),
            ("gpu_memory", self.gpu_memory > 0, "positive"),
            ("worst_load", self.worst_load >= 1, "at least 1"),
        ):
            if not ok:
                raise ValueError(f"--{name.replace('_', '-')}={getattr(self, name)} must be {constraint}")


def target(config: Config) -> tuple[str, Dtype]:
    """Device and dtype planned for: a GPU in bfloat16 unless the configuration says otherwise, whatever is here."""
    device = "cpu" if config.engine.device == "cpu" else "cuda"
    if config.engine.dtype != "auto":
        return device, config.engine.dtype
    return device, "float32" if device == "cpu" else "bfloat16"


def planned(config: Config) -> RunPlan:
    """The plan of a run of ``config`` on the machines that it is for.

    Raises:
        ValueError: The global batch does not divide.
    """
    return plan_run(config, config.parallel.processes, target(config))


def problems(config: Config) -> list[str]:
    """Every way in which batch, experts and widths do not divide, each with the nearest values that work."""
    ranks = config.parallel.processes
    checks: list[Callable[[], object]] = [
        lambda: planned(config),
        lambda: config.parallel.check(ranks, *sharded(config.model.moe, config.router)),
    ]
    found = []
    for check in checks:
        try:
            check()
        except ValueError as error:
            found.append(str(error))
    if target(config) == ("cuda", "bfloat16"):
        found += width_problems(config.model.moe, config.router, config.model.hidden_size)
    return found


def epochs(config: Config, tokens: int) -> str:
    """Number of passes that ``tokens`` tokens make through the corpus, if that is in the cache."""
    known = None
    if not isinstance(config.data, data.MixtureConfig) and not config.streaming.applies_to(config.data):
        cache = Path(config.run.cache_dir)
        known = data.prepared_tokens(config.data, config.tokenizer, cache, config.num_tokens)
    if known is None:
        return "epochs: unknown until the corpus is prepared"
    return f"{tokens / known:.2f} epochs over {known:,} training tokens"


def flops_by_part(size: ModelSize) -> dict[str, float]:
    """Forward FLOPs of one token by part; they sum to ``forward_flops_per_token``."""
    parts = {
        "attention projections": 2.0 * size.attention,
        "attention scores": size.attention_score_flops,
        "dense networks and shared experts": 2.0 * size.dense_ffn,
        "routers": 2.0 * size.router_matmul,
        MERGED: size.merging_flops_per_token,
        REBUILT: size.rebuilding_flops_per_token,
        FROZEN: 2.0 * size.frozen_routers,
        "routed experts": 2.0 * size.active_experts,
        "constant experts": 2.0 * size.constant_experts,
        "experts that are only asked": 2.0 * size.scoring,
        MEASURED: size.attention_statistic_flops,
        COMPARED: size.combine_flops,
        "output head": 2.0 * size.head_matmul,
    }
    assert math.isclose(sum(parts.values()), size.forward_flops_per_token)
    return parts


def extra_forward(config: Config, size: ModelSize, plan: BatchPlan) -> float:
    """FLOPs per token beyond the model's: recomputation, and the pass that counts routes ahead under accumulation."""
    parts = flops_by_part(size)
    attention = parts["attention projections"] + parts["attention scores"]
    names = ("routed experts", "constant experts", "experts that are only asked", "dense networks and shared experts")
    networks = sum(parts[name] for name in (*names, COMPARED, REBUILT))
    again = {"none": 0.0, "selective": attention, "full": attention + networks}[config.model.recompute]
    ahead = size.forward_flops_per_token - parts["output head"] if _counts_ahead(config, plan) else 0.0
    # The logits of two passes are made again in backward.
    logits = parts["output head"] if size.num_passes > 1 else 0.0
    merged_again = parts[MERGED] * (2 if config.model.recompute == "full" else 1)
    return size.num_passes * (again + logits) + merged_again + ahead


def _counts_ahead(config: Config, plan: BatchPlan) -> bool:
    if plan.accumulation == 1 or config.router.dense_experts or config.router.balance_level == "last_step":
        return False
    with torch.device("meta"):
        router = build_router(config.model.moe, config.router, config.model.hidden_size, layer=0)
    return router.needs_global_routes


def traffic(config: Config, dtype: Dtype, plan: BatchPlan) -> dict[str, float]:
    """Bytes that one rank sends in a step, with ring algorithms and an even load."""
    ranks, expert_parallel = config.parallel.processes, config.parallel.expert_parallel_size
    parameters = local_parameters(config)
    copies = ranks // expert_parallel  # of each expert
    dense = parameters.dense + parameters.kept
    shared = {ranks: dense, copies: 0}
    shared[copies] += parameters.expert
    ring = {count: (count - 1) / count * elements for count, elements in shared.items()}
    weights = BYTES[dtype] * sum(ring.values()) if config.engine.zero_stage else 0.0
    routed = routes_of_rank(config, dtype, plan.micro_batch_size)
    passes = config.router.num_passes * (2 + (config.model.recompute == "full")) + _counts_ahead(config, plan)
    layers = 0 if config.router.dense_experts else len(config.model.moe_layers)
    one_way = (expert_parallel - 1) / expert_parallel * (routed.sent_bytes + routed.returned_bytes)
    return {
        "gradients, all-reduce in float32": 2 * 4 * sum(ring.values()),
        "weights, all-gather": weights,
        "tokens to experts and back": passes * layers * plan.accumulation * one_way,
    }


def describe(overrides: Sequence[str], assumed: Assumptions, say: Callable[[str], None]) -> int:
    """Print the plan of a configuration; starts nothing.

    Returns:
        Exit code: 0, or 1 when the configuration does not divide and only the model could be described.

    Raises:
        ValueError: The configuration is wrong.
    """
    config = load(overrides)
    check_optimizer(config.optimizer, config.model, config.router)
    found = problems(config)
    size = config.size if found else planned(config).size
    model = meta_model(config.model, config.router)
    ranks, expert_parallel = config.parallel.processes, config.parallel.expert_parallel_size
    say(
        f"{config.model.name}, {' '.join(_chosen(config))}: {short_number(size.total_parameters)} parameters, "
        f"{short_number(size.active_parameters)} active; checkpoint "
        f"{_gib(_checkpoint_bytes(config, model))}, {config.checkpoint.keep_last} kept"
    )
    for line in describe_match(config.model, config.router, config.budget):
        say(line)
    if rates := describe_rates(rate_scales_by_group(model, config.optimizer)):
        say(rates)
    _say_flops(size, say)
    for problem in found:
        say(f"DOES NOT DIVIDE: {problem}")
    if found:
        return 1
    run = planned(config)
    plan, device, dtype = run.batches, run.device, run.dtype
    extra = extra_forward(config, size, plan)
    if extra:
        say(f"  beside those, recomputed or run ahead: {short_number(extra)} FLOPs per token")
    tokens = plan.num_steps * plan.tokens_per_step
    say(
        f"{plan.num_steps:,} steps of {plan.tokens_per_step:,} tokens ({plan.accumulation} micro-batches of "
        f"{plan.micro_batch_size} rows on each of {ranks} ranks), {short_number(tokens)} tokens"
        f"{config.budget.describe()}; {epochs(config, tokens)}"
    )
    memory = memory_per_rank(config, device, dtype, plan, ranks, assumed.worst_load)
    stage, recompute = config.engine.zero_stage, config.model.recompute
    say(
        f"memory per rank, {device} {dtype}, {ranks} ranks, expert parallel {expert_parallel}, ZeRO {stage}, "
        f"recompute {recompute}, exchange at {assumed.worst_load:g} times the mean load:"
    )
    for name, value in vars(memory).items():
        say(f"  {name:<14}{_gib(value):>12}")
    say(f"  {'peak':<14}{_gib(memory.total):>12}  {_verdict(memory, assumed)}; carried becomes gradients and copies")
    say("bytes that a rank sends per step:")
    for name, value in traffic(config, dtype, plan).items():
        say(f"  {name:<34}{_gib(value):>12}")
    seconds = tokens * size.training_flops_per_token / (ranks * assumed.peak * assumed.mfu)
    say(
        f"time at {assumed.mfu:.0%} of {assumed.peak:.3g} FLOP/s on each of {ranks} ranks: {short_duration(seconds)}, "
        f"{seconds / plan.num_steps:.3g} s a step"
    )
    _say_sizes(overrides, assumed, say)
    return 0


def _checkpoint_bytes(config: Config, model: DecoderLM) -> int:
    """float32 weights and moments."""
    roles = parameter_roles(model)
    return sum(
        (4 + config.optimizer.state(roles[name]).bytes_per_element) * parameter.numel()
        for name, parameter in model.named_parameters()
    )


def _chosen(config: Config) -> list[str]:
    """The scheme, and the parts of it that are not the usual ones."""
    moe = config.model.moe
    parts = {
        "experts": (moe.experts.name, "swiglu"),
        "combine": (moe.combine.name, "sum"),
        "optimizer": (config.optimizer.name, "adamw"),
    }
    others = [f"{group}={name}" for group, (name, usual) in parts.items() if name != usual]
    return [f"router={config.router.name}", *others]


def _say_flops(size: ModelSize, say: Callable[[str], None]) -> None:
    twice = "" if size.num_passes == 1 else f"; {size.num_passes} passes over every token, each"
    say(f"FLOPs per token: {short_number(size.training_flops_per_token)} (forward, and backward twice that{twice})")
    for name, value in flops_by_part(size).items():
        if value:
            share = value / size.forward_flops_per_token
            backward = {FROZEN: 0.0, MEASURED: 0.0, COMPARED: value}.get(name, 2 * value)
            say(f"  {name:<34}{short_number(value):>8} forward{short_number(backward):>8} backward{share:>7.1%}")
    if size.update_flops_per_token:
        share = size.update_flops_per_token / size.training_flops_per_token
        say(f"  {'updates of the optimizer':<34}{short_number(size.update_flops_per_token):>8}, {share:.2%} of all")


def _say_sizes(overrides: Sequence[str], assumed: Assumptions, say: Callable[[str], None]) -> None:
    """Total memory of every size with the same other overrides, by recomputation."""
    say(f"sizes on {assumed.gpu_memory:g} GiB, of which {USABLE:.0%} are counted on; recompute:")
    say(f"  {'model':<8}" + "".join(f"{name:>22}" for name in RECOMPUTE))
    others = [word for word in overrides if not word.startswith("model=")]
    for name in choices(overrides)["model"]:
        try:
            config = load([*others, f"model={name}"])
            plan = planned(config).batches
        except ValueError as error:
            say(f"  {name:<8}  {error}")
            continue
        cells = []
        for recompute in RECOMPUTE:
            changed = replace(config, model=replace(config.model, recompute=recompute))
            memory = memory_per_rank(changed, *target(changed), plan, config.parallel.processes, assumed.worst_load)
            cells.append(f"{_gib(memory.total)} {'fits' if _fits(memory, assumed) else 'no':>4}")
        say(f"  {name:<8}" + "".join(f"{cell:>22}" for cell in cells))


def _fits(memory: Memory, assumed: Assumptions) -> bool:
    return memory.total <= USABLE * assumed.gpu_memory * GIB


def _verdict(memory: Memory, assumed: Assumptions) -> str:
    room = f"{USABLE:.0%} of {assumed.gpu_memory:g} GiB"
    return f"fits in {room}" if _fits(memory, assumed) else f"DOES NOT FIT in {room}"


def _gib(value: float) -> str:
    if value < 0.01 * GIB:
        return f"{value / 2**20:.2f} MiB"
    return f"{value / GIB:.2f} GiB"
