"""One training step under DeepSpeed, and evaluation."""

import io
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from typing import Any, Literal

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_pretrain.data.rows.micro_batch import IGNORE_INDEX, MicroBatch, wrap_to_int64
from moe_pretrain.engine.deepspeed_config import Dtype, EngineConfig, clips_itself, deepspeed_config
from moe_pretrain.engine.elastic import ElasticGradients, GradientCarrier, clip_scale, exact_sum
from moe_pretrain.engine.expert_start import start_expert
from moe_pretrain.engine.gradient_norms import GradientNorms
from moe_pretrain.engine.intervals import fragments
from moe_pretrain.engine.micro_batch import GlobalCounts, micro_batch_loss, routing_context
from moe_pretrain.engine.optimizers import OptimizerConfig, build_optimizer, set_learning_rate
from moe_pretrain.engine.sanity import (
    check_optimizer_covers,
    check_replicas,
    every_parameter_gets_gradient,
    first_non_finite,
    inject_sickness,
)
from moe_pretrain.engine.step_result import Evaluation, StepResult, StepSums
from moe_pretrain.model.decoder import DecoderLM, recorded_routings
from moe_pretrain.moe.experts.swiglu import check_fused_experts
from moe_pretrain.moe.host_values import on_device_of
from moe_pretrain.moe.kernels import resolve_kernels
from moe_pretrain.moe.types import ExpertKinds, Routing
from moe_pretrain.parallel.deepspeed_moe import is_expert
from moe_pretrain.parallel.mesh import Mesh
from moe_pretrain.schedule.batch_plan import BatchPlan
from moe_pretrain.system.faults import NO_FAULTS, Faults

_LARGEST_SQUARE = torch.finfo(torch.float32).max


class NonFiniteError(RuntimeError):
    """More steps in succession than allowed had a loss or gradient that is not finite; none changed a weight."""


class TrainEngine:
    """A model under DeepSpeed with one method per optimizer step.

    DeepSpeed divides gradients by the accumulation and averages them over ranks; the loss given to it is multiplied by
    both, so that gradients are those of the global batch's loss.
    """

    def __init__(
        self,
        model: DecoderLM,
        config: EngineConfig,
        dtype: Dtype,
        optimizer: OptimizerConfig,
        learning_rate_factor: Callable[[int], float],
        plan: BatchPlan,
        mesh: Mesh,
        seed: int,
        faults: Faults = NO_FAULTS,
        enter: Callable[[str, int], None] = lambda phase, step: None,
    ):
        """Put ``model`` (tagged by ``parallel.prepare_experts``) on the device and build its optimizer.

        ``enter`` is called with the phase and step that begin.
        """
        model.to(mesh.device)
        device: Literal["cpu", "cuda"] = "cuda" if mesh.device.type == "cuda" else "cpu"
        stage = config.stage(dtype, mesh.world_size)
        kernels = resolve_kernels(config.kernels, device)
        model.use_kernels(kernels)
        if kernels == "quack":
            check_fused_experts(model, mesh.device)
        self.config = config = replace(config, zero_stage=stage, dtype=dtype, device=device, kernels=kernels)
        self.mesh, self.seed = mesh, seed
        self.model = model
        self._plan = plan
        self._faults, self._enter = faults, enter
        self._skipped = 0
        self._learning_rate_factor = learning_rate_factor
        layers = model.moe_layers()
        self._layer_row = {layer.router.layer: row for row, layer in enumerate(layers)}
        self._kinds = layers[0].kinds if layers else ExpertKinds(0)
        self._num_sums = [layer.router.num_sums for layer in layers]
        self._elastic = ElasticGradients(model, mesh) if config.determinism == "elastic" else None
        self.optimizer_config = optimizer
        self.client_optimizer = build_optimizer(model, optimizer, is_exact=self._elastic is not None)
        check_optimizer_covers(model, [p for group in self.client_optimizer.param_groups for p in group["params"]])
        # DeepSpeed keeps the order of groups.
        self.group_of = {
            parameter: index
            for index, group in enumerate(self.client_optimizer.param_groups)
            for parameter in group["params"]
        }
        module: nn.Module = model
        rows, accumulation = plan.micro_batch_size, plan.accumulation
        if self._elastic is not None:  # DeepSpeed only gets finished gradients
            module, rows, accumulation = GradientCarrier(model), rows * accumulation, 1
        settings = deepspeed_config(config, dtype, rows, accumulation, mesh.world_size)
        with redirect_stdout(io.StringIO()):  # in bfloat16 it prints its memory use a dozen times
            initialised = deepspeed.initialize(model=module, optimizer=self.client_optimizer, config=settings)
        self.deepspeed, self.optimizer, _, _ = initialised
        owned = fragments(self)
        self.client_optimizer.own(owned)
        self._norms = GradientNorms(owned)
        if self._elastic is None:
            self.client_optimizer.watch = self._norms.note

    def learning_rate(self, step: int) -> float:
        """Learning rate of ``step``, of which each group of parameters has its multiple."""
        return self.optimizer_config.learning_rate * self._learning_rate_factor(step)

    def step(self, step: int, micro_batches: list[MicroBatch]) -> StepResult:
        """One optimizer step.

        Args:
            step: Number of the step, from 0; sets the learning rate and the noise.
            micro_batches: This rank's micro-batches, ``accumulation`` of them, on any device.

        Returns:
            What the step did; if its loss or gradient is not finite, it changed no weight and no state, and says so.

        Raises:
            NonFiniteError: That was so in more than ``engine.max_skipped_steps`` steps in succession.
        """
        assert len(micro_batches) == self._plan.accumulation
        self._enter("train.step", step)
        self.model.train()
        # Counted before the copy to the device, so that counting does not synchronise with it.
        text_tokens = [int((batch.document_ids >= 0).sum()) for batch in micro_batches]
        global_counts, token_hash = self._count(micro_batches, text_tokens)
        batches = [batch.to(self.mesh.device) for batch in micro_batches]
        is_check_step = self.config.check_every_steps > 0 and step % self.config.check_every_steps == 0
        watch = every_parameter_gets_gradient(self.model, step) if is_check_step else nullcontext()
        with inject_sickness(self.model, self._faults, step):
            with watch:
                sums = self._accumulate(step, batches, text_tokens, global_counts)
            self.client_optimizer.withheld = not math.isfinite(sums.loss_sum)
            gradient_norm = self._update(step)
            sickness = None
            if not (math.isfinite(sums.loss_sum) and math.isfinite(gradient_norm)):
                sickness = self._diagnose(step, batches, text_tokens, global_counts, gradient_norm)
        norms: dict[str, float] = {}
        if sickness is None:
            norms = self._norms.take(gradient_norm, self.mesh.device) if self._elastic is None else self._elastic.norms
        result = sums.result(global_counts, self.model.aux_weights, gradient_norm, norms, token_hash, sickness)
        if sickness is not None:
            self._skipped += 1
            if self._skipped > self.config.max_skipped_steps:
                raise NonFiniteError(
                    f"step {step}: {sickness}; this is more than engine.max_skipped_steps="
                    f"{self.config.max_skipped_steps} such steps in succession, no weight was changed by them; lower "
                    "optimizer.learning_rate or look at the data of this step"
                )
            return result
        self._skipped = 0
        for layer, use in zip(self.model.moe_layers(), result.layer_uses(), strict=True):
            if layer.last_routes is not None:
                layer.last_routes.copy_(use.tokens_per_expert)
            started = layer.router.after_step(use)
            if started is not None:
                start_expert(self, layer, started)
        if is_check_step:
            check_replicas(self.model, self.mesh, step)
        return result

    def _accumulate(
        self, step: int, batches: list[MicroBatch], text_tokens: list[int], global_counts: GlobalCounts
    ) -> StepSums:
        """Forward and backward of all micro-batches; their sums, over all ranks."""
        aux_weights = self.model.aux_weights
        sums = self._no_sums()
        forward = self.deepspeed if self._elastic is None else self.model
        ahead = self._count_routes_ahead(step, batches) if self._needs_routes_ahead(step) else None
        for batch, tokens in zip(batches, text_tokens, strict=True):
            context = routing_context(batch, self.seed, step, self._global_routes(step, ahead), global_counts.tokens)
            output = forward(batch.input_ids, batch.labels, batch.document_ids, batch.position_ids, context)
            if self._faults.due("train.loss", step):
                output = output._replace(loss_sum=output.loss_sum * math.nan)
            loss = micro_batch_loss(output, aux_weights, tokens, global_counts)
            share = tokens / max(global_counts.tokens, 1)
            if self._elastic is not None:
                own = self._no_sums()
                own.add(output, share)
                self._enter("train.backward", step)
                self._elastic.backward(loss, own.stacked())
                continue
            sums.add(output, share)
            self._enter("train.backward", step)
            # DeepSpeed divides by the accumulation and averages over ranks.
            self.deepspeed.backward(loss * (self._plan.accumulation * self.mesh.world_size))
            if batch is not batches[-1]:
                self.deepspeed.step()  # not a boundary: counts the micro-batch, updates nothing
        if self._elastic is None:
            sums.reduce()
            return sums
        gradients, stacked = self._elastic.finish(self.config.gradient_clipping)
        sums.set(stacked)
        self.deepspeed.backward(self.deepspeed(gradients))
        return sums

    def _no_sums(self) -> StepSums:
        names = list(self.model.aux_weights)
        return StepSums(names, self._kinds, self._num_sums, self.mesh.device)

    def _diagnose(
        self,
        step: int,
        batches: list[MicroBatch],
        text_tokens: list[int],
        global_counts: GlobalCounts,
        gradient_norm: float,
    ) -> str:
        """Source of a loss or gradient that is not finite: the step once more, watched and without an update."""
        with first_non_finite(self.model) as (found, largest):
            loss = self._accumulate(step, batches, text_tokens, global_counts).loss_sum
        self.client_optimizer.withheld = True
        self._update(step)
        everywhere: list[Any] = [None] * self.mesh.world_size
        dist.all_gather_object(everywhere, (found, max(largest.items(), key=lambda own: own[1], default=("", 0.0))))
        places = [f"{found[0]} on rank {rank}" for rank, (found, _) in enumerate(everywhere) if found]
        if places:
            where = f"first in {places[0]}"
        else:
            value, name, rank = max((value, name, rank) for rank, (_, (name, value)) in enumerate(everywhere))
            where = f"every gradient is finite, but not the sum of their squares: the largest is {value:.1e}, of {name}"
            where += f" on rank {rank}"
        return f"loss={loss / max(global_counts.labels, 1)} gradient_norm={gradient_norm} must be finite; {where}"

    def _update(self, step: int) -> float:
        """Set the learning rate, clip, update unless the gradient is not finite; the global norm before clipping."""
        self._enter("train.update", step)
        set_learning_rate(self.optimizer.param_groups, self.learning_rate(step))
        own_norm = None
        if self._elastic is not None:
            own_norm = self._elastic.norm
        elif clips_itself(self.config):
            own_norm = float(self._clip())
        if own_norm is not None and own_norm**2 > _LARGEST_SQUARE:
            own_norm = math.inf  # as DeepSpeed has it, which sums the squares in float32
        if own_norm is not None and not math.isfinite(own_norm):
            self.client_optimizer.withheld = True  # under ZeRO, DeepSpeed withholds it by itself
        self.deepspeed.step()
        self.client_optimizer.withheld = False
        return own_norm if own_norm is not None else float(self.deepspeed.get_global_grad_norm())

    @torch.no_grad()
    def evaluate(
        self,
        batches: Iterable[MicroBatch],
        note: Callable[[MicroBatch, Tensor, list[Routing]], None] = lambda batch, losses, routings: None,
    ) -> Evaluation:
        """Mean cross-entropy over validation micro-batches; every rank must bring the same number of them.

        Args:
            batches: On any device.
            note: Called for each batch with the nats of its positions ``[batch, sequence]``, 0 where not counted, and
                what the routers decided, bottom up.
        """
        self.model.eval()
        # Nats, counted labels, text tokens, and the routes of each MoE layer.
        total = torch.zeros(3 + len(self.model.moe_layers()), dtype=torch.float64, device=self.mesh.device)
        each = [total.clone()]
        for batch in batches:
            batch = batch.to(self.mesh.device)
            with recorded_routings(self.model) as routings:
                losses = self.model.token_losses(
                    batch.input_ids,
                    batch.labels,
                    batch.document_ids,
                    batch.position_ids,
                    routing_context(batch, self.seed, 0),
                )
            note(batch, losses, routings)
            counted = (batch.labels != IGNORE_INDEX).sum()
            text = (batch.document_ids >= 0).sum()
            networks = self._kinds.ffn
            routes = [routing.use.tokens_per_expert[:networks].sum() for routing in routings]
            each.append(torch.stack([losses.sum(dtype=torch.float64), counted.double(), text.double(), *routes]))
            total += each[-1]
        if self._elastic is None:
            dist.all_reduce(total)
        else:
            total = exact_sum(torch.stack(each))
        self.model.train()
        return Evaluation(
            loss=float(total[0] / total[1].clamp(min=1)),
            labels=float(total[1]),
            experts_per_token=(total[3:] / total[2].clamp(min=1)).tolist(),
        )

    def _count(self, batches: list[MicroBatch], text_tokens: list[int]) -> tuple[GlobalCounts, int]:
        """Counted targets and text tokens of the global batch, and the hash of its rows."""
        own_labels = sum(batch.num_valid_labels() for batch in batches)
        own_hash = wrap_to_int64(sum(batch.token_hash for batch in batches))
        counts = on_device_of(self.model.head_weight, [own_labels, sum(text_tokens), own_hash], torch.int64)
        dist.all_reduce(counts)  # int64 sums wrap, as the hash wants
        labels, tokens, token_hash = counts.tolist()
        return GlobalCounts(labels=labels, tokens=tokens), token_hash

    def _needs_routes_ahead(self, step: int) -> bool:
        """Whether the balance loss needs the global batch's routes before its first backward.

        With one micro-batch the layers sum their counts over ranks as they go. With accumulation the later
        micro-batches' counts must be known first: a forward pass without gradient per micro-batch, about a quarter to a
        third more compute. ``router.load_balance_level=last_step`` avoids it from the second step on, ``sequence``
        and a larger micro-batch always.
        """
        needing = [layer for layer in self.model.moe_layers() if layer.router.needs_global_routes]
        return self._plan.accumulation > 1 and any(step == 0 or layer.last_routes is None for layer in needing)

    def _count_routes_ahead(self, step: int, batches: list[MicroBatch]) -> Tensor:
        """Routes per layer and expert of the whole global batch, from a pass without gradient."""
        total = torch.zeros(len(self._layer_row), self._kinds.total, dtype=torch.float64, device=self.mesh.device)
        for batch in batches:
            context = routing_context(batch, self.seed, step)
            uses = self.model.routes(batch.input_ids, batch.document_ids, batch.position_ids, context)
            total += torch.stack([use.tokens_per_expert for use in uses])
        dist.all_reduce(total)
        return total

    def _global_routes(self, step: int, ahead: Tensor | None) -> Callable[[int, Tensor], Tensor]:
        """The context's ``sum_over_global_batch``."""
        layers = self.model.moe_layers()

        def of_layer(layer: int, counts: Tensor) -> Tensor:
            row = self._layer_row[layer]
            last = layers[row].last_routes
            if step > 0 and last is not None:
                return last
            if ahead is not None:
                return ahead[row]
            counts = counts.clone()
            dist.all_reduce(counts)
            return counts

        return of_layer

    def _clip(self) -> Tensor:
        """Global norm over all ranks' experts, each parameter once, and clipping by it; stage 0 only."""
        squares = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        gradients = [(p.grad, is_expert(p)) for p in self.model.parameters() if p.grad is not None]
        for gradient, of_experts in gradients:
            squares[int(of_experts)] += gradient.double().square().sum()
        dist.all_reduce(squares[1:], group=self.mesh.expert_group)
        norm = squares.sum().sqrt()
        if self.config.gradient_clipping > 0:
            scale = clip_scale(norm, self.config.gradient_clipping)
            for gradient, _ in gradients:
                gradient.mul_(scale.to(gradient.dtype))
        return norm
