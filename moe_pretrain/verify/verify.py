"""Does this configuration compute what it says? The training step against the oracle, quantity by quantity.

The user's configuration is shrunk in width, depth, vocabulary and sequence; router, experts, expert parallel, ZeRO
stage, precision, accumulation, clipping, recompute and packing stay. It trains a few steps on random packed batches
under DeepSpeed on the ranks it asks for, and the same batches go through ``oracle.Oracle`` in one process.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_pretrain.config.preflight import RunPlan, plan_run
from moe_pretrain.config.schema import Config
from moe_pretrain.data.rows.micro_batch import MicroBatch
from moe_pretrain.engine.deepspeed_config import Dtype
from moe_pretrain.engine.engine import TrainEngine
from moe_pretrain.engine.intervals import global_shape, pieces
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.parallel.deepspeed_moe import full_gradient, is_expert, prepare_experts
from moe_pretrain.parallel.mesh import Mesh, build_mesh
from moe_pretrain.schedule.batch_plan import BatchPlan
from moe_pretrain.verify.oracle import Oracle, StepRecord
from moe_pretrain.verify.small_twin import random_batches, shrink

SCALAR_TOLERANCE: dict[Dtype, float] = {"float32": 1e-5, "bfloat16": 0.03}
SCALE_TOLERANCE: dict[Dtype, float] = {"float32": 1e-5, "bfloat16": 0.1}
TENSOR_TOLERANCE: dict[Dtype, float] = {"float32": 1e-5, "bfloat16": 0.4}
"""Largest relative errors of a number, of a tensor along the oracle's, and of a tensor in all directions.

In float32 only the order of sums differs. In bfloat16 the run rounds and the oracle does not; a router's gradient is a
small difference of large terms, and a rounded hidden state now and then goes to another expert. That noise has no
direction, a wrong factor has one: so there the scale is what tells.
"""


@dataclass(frozen=True)
class QuantityCheck:
    """One quantity of the run beside the oracle's.

    Attributes:
        quantity: What was compared.
        worst: Name of the tensor, or step, that differs most.
        error: Its relative error, Euclidean norm over Euclidean norm.
        tolerance: The largest error that counts as the same.
    """

    quantity: str
    worst: str
    error: float
    tolerance: float

    @property
    def is_same(self) -> bool:
        """Whether the run agrees with the oracle here."""
        return self.error <= self.tolerance


class _RecordedEngine(TrainEngine):
    """Keeps the gradients that an update is about to use."""

    gradients: dict[str, Tensor]

    def _update(self, step: int) -> float:
        self.gradients = {
            name: self.over_all_experts(parameter, full_gradient(parameter).float())
            for name, parameter in self.model.named_parameters()
        }
        return super()._update(step)

    def over_all_experts(self, parameter: Tensor, own: Tensor) -> Tensor:
        """``own``, or for an expert parameter the experts of the whole group, on every rank."""
        if not is_expert(parameter):
            return own.clone()
        parts = [torch.empty_like(own) for _ in range(self.mesh.shard.size)]
        dist.all_gather(parts, own.contiguous(), group=self.mesh.expert_group)
        return torch.cat(parts)

    def master_weights(self) -> dict[str, Tensor]:
        """float32 weights over all experts, put together from the intervals that a checkpoint would hold."""
        weights = {
            name: torch.zeros(global_shape(self, parameter), device=self.mesh.device)
            for name, parameter in self.model.named_parameters()
        }
        for piece in pieces(self):
            if piece.is_saved_here:
                flat = weights[piece.name].view(-1)
                flat[piece.start : piece.start + piece.master.numel()] += piece.master.detach()
        for name in weights:
            dist.all_reduce(weights[name])
        return weights


def build_engine(
    config: Config, plan: RunPlan, mesh: Mesh, change_model: Callable[[DecoderLM], None] | None = None
) -> _RecordedEngine:
    """The engine as ``train.build_trainer`` builds it; ``change_model`` may edit the initial weights."""
    model = DecoderLM(config.model, config.router, mesh.shard)
    initialise(model, config.seed)
    if change_model is not None:
        change_model(model)
    parallel = config.parallel
    prepare_experts(model, parallel.expert_parallel_size, parallel.overlaps_exchange(mesh.device.type))

    def factor(step: int) -> float:
        return config.schedule.factor(step, plan.batches.num_steps)

    return _RecordedEngine(model, config.engine, plan.dtype, config.optimizer, factor, plan.batches, mesh, config.seed)


def own_micro_batches(batches: Sequence[MicroBatch], plan: BatchPlan, rank: int) -> list[MicroBatch]:
    """This rank's share of a step's micro-batches."""
    return list(batches[rank * plan.accumulation : (rank + 1) * plan.accumulation])


def record(engine: _RecordedEngine, step: int, micro_batches: list[MicroBatch]) -> StepRecord:
    """Train one step and collect what the oracle also returns; every rank must call it."""
    result = engine.step(step, micro_batches)
    return StepRecord(
        loss=result.loss,
        aux=result.aux,
        gradients={name: gradient.cpu() for name, gradient in engine.gradients.items()},
        gradient_norm=result.gradient_norm,
        gradient_norms=result.gradient_norms,
        weights={name: weight.cpu() for name, weight in engine.master_weights().items()},
        tokens_per_expert=result.tokens_per_expert,
    )


def compare(run: Sequence[StepRecord], oracle: Sequence[StepRecord], dtype: Dtype) -> list[QuantityCheck]:
    """One row per quantity, over the steps that both made."""
    scalar, tensor = SCALAR_TOLERANCE[dtype], TENSOR_TOLERANCE[dtype]
    rows = []
    pairs = list(zip(run, oracle, strict=True))

    def add(quantity: str, errors: dict[str, float], allowed: float) -> None:
        # A NaN compares as smaller than everything; it must be the worst.
        worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
        rows.append(QuantityCheck(quantity, worst, errors[worst], allowed))

    add("loss", {f"step {i}": _relative(a.loss, b.loss) for i, (a, b) in enumerate(pairs)}, scalar)
    for name in oracle[0].aux:
        errors = {f"step {i}": _relative(a.aux[name], b.aux[name]) for i, (a, b) in enumerate(pairs)}
        add(f"aux {name}", errors, scalar)
    norms = {f"step {i}": _relative(a.gradient_norm, b.gradient_norm) for i, (a, b) in enumerate(pairs)}
    add("gradient norm", norms, scalar)
    parts = {
        f"{part}, step {i}": _relative(a.gradient_norms.get(part, 0.0), norm)
        for i, (a, b) in enumerate(pairs)
        for part, norm in b.gradient_norms.items()
    }
    # A part's norm is that of some of the tensors, whose noise in bfloat16 does not average out.
    add("gradient norm by part", parts, SCALE_TOLERANCE[dtype])
    ours, theirs = pairs[0][0].gradients, pairs[0][1].gradients
    scales = {name: _relative_scale(ours[name], gradient) for name, gradient in theirs.items()}
    add("gradient scale", scales, SCALE_TOLERANCE[dtype])
    # In bfloat16 the weights have drifted apart by rounding after the first update, and the gradients with them.
    for step in sorted({0, len(pairs) - 1}) if dtype == "float32" else [0]:
        ours, theirs = pairs[step][0].gradients, pairs[step][1].gradients
        errors = {name: _relative(ours[name], gradient) for name, gradient in theirs.items()}
        add(f"gradients of {step + 1}", errors, tensor)
    for step in sorted({0, len(pairs) - 1}):
        ours, theirs = pairs[step][0].weights, pairs[step][1].weights
        add(f"weights after {step + 1}", {n: _relative(ours[n], w) for n, w in theirs.items()}, tensor)
    counts = {f"step {i}": _relative(a.tokens_per_expert, b.tokens_per_expert) for i, (a, b) in enumerate(pairs)}
    # Whole numbers, of two passes halves: in float32 not one route may differ. Shares of merged experts are sums.
    whole = all(bool((2 * one.tokens_per_expert % 1 == 0).all()) for one in oracle)
    add("tokens per expert", counts, tensor if dtype != "float32" else 0.0 if whole else scalar)
    return rows


def _relative(ours: Tensor | float, theirs: Tensor | float) -> float:
    """``|ours - theirs| / |theirs|``; what is zero must be exactly zero."""
    ours, theirs = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    difference, size = float((ours - theirs).norm()), float(theirs.norm())
    if size == 0:
        return 0.0 if difference == 0 else float("inf")
    return difference / size


def _relative_scale(ours: Tensor, theirs: Tensor) -> float:
    """Distance from 1 of ``ours`` along ``theirs``; what is zero must be exactly zero."""
    ours, theirs = ours.double(), theirs.double()
    size = float(theirs.square().sum())
    return abs(float((ours * theirs).sum()) / size - 1) if size else _relative(ours, theirs)


def verify(config: Config, plan: RunPlan, say: Callable[[str], None]) -> int:
    """Compare ``config`` on this process group with the oracle and print one row per quantity; the exit code."""
    mesh = build_mesh(config.parallel, plan.device)
    small = shrink(config, plan)
    small_plan = plan_run(small, plan.world_size, (plan.device, plan.dtype))
    cut, dtype = small_plan.batches, plan.dtype
    steps = random_batches(small, cut)
    engine = build_engine(small, small_plan, mesh)
    run = [record(engine, i, own_micro_batches(batches, cut, mesh.rank)) for i, batches in enumerate(steps)]
    # Computed once, compared on every rank: a rank whose numbers differ from the others' says so too.
    rows = compare(run, mesh.on_main(lambda: Oracle(small, cut.num_steps, dtype).run(steps)), dtype)
    clipped = sum(small.engine.gradient_clipping < record_.gradient_norm for record_ in run)
    say(
        f"{mesh.world_size} ranks, expert parallel {mesh.shard.size}, ZeRO {engine.config.zero_stage}, {dtype}, "
        f"{cut.accumulation} micro-batches, recompute {small.model.recompute}; "
        + (f"clipping bit in {clipped} of {len(run)} steps" if small.engine.gradient_clipping else "no clipping")
    )
    for row in rows:
        verdict = "same" if row.is_same else f"DIFFERS most in {row.worst}"
        say(f"  {row.quantity:<22} error {row.error:8.1e}  (at most {row.tolerance:.0e})  {verdict}")
    different = sum(not row.is_same for row in rows)
    say("the same as the oracle" if not different else f"{different} of {len(rows)} quantities differ")
    return int(different > 0)
