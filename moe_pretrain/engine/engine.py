"""One training step under DeepSpeed, and evaluation."""

import io
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from moe_pretrain.batching import BatchPlan
from moe_pretrain.data.packing import IGNORE_INDEX, MicroBatch, wrap_to_int64
from moe_pretrain.engine.checks import check_optimizer_covers, check_replicas, every_parameter_gets_gradient
from moe_pretrain.engine.context import routing_context
from moe_pretrain.engine.deepspeed_config import Dtype, EngineConfig, clips_itself, deepspeed_config
from moe_pretrain.engine.objective import GlobalCounts, micro_batch_loss
from moe_pretrain.engine.optimizer import OptimizerConfig, build_optimizer
from moe_pretrain.model.decoder import DecoderLM, LMOutput
from moe_pretrain.moe.types import StepUse
from moe_pretrain.parallel.deepspeed_moe import is_expert
from moe_pretrain.parallel.mesh import Mesh


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, summed over ranks and micro-batches.

    Attributes:
        loss: Cross-entropy per counted token of the global batch, nats; never with aux losses (defect C19).
        aux: Each aux loss, unweighted.
        aux_weights: Coefficients of ``aux``.
        gradient_norm: Global norm before clipping.
        tokens_per_expert: Routes of text tokens ``[moe_layers, experts]``, float64.
        tokens: Text tokens of the global batch.
        router_entropy: Mean entropy of the routing distribution per MoE layer, nats.
        dropped_share: Share of routes that no expert computed, per MoE layer.
        sums: The scheme's own sums ``[moe_layers, num_sums]``, float64, on the training device.
        token_hash: Wrapping 64-bit sum of the hashes of the rows consumed.
    """

    loss: float
    aux: dict[str, float]
    aux_weights: dict[str, float]
    gradient_norm: float
    tokens_per_expert: Tensor
    tokens: int
    router_entropy: list[float]
    dropped_share: list[float]
    sums: Tensor
    token_hash: int

    @property
    def aux_loss(self) -> float:
        """The weighted sum that was added to the loss."""
        return sum(self.aux_weights[name] * value for name, value in self.aux.items())

    @property
    def experts_per_token(self) -> float:
        """Mean routes per text token, over all MoE layers."""
        return float(self.tokens_per_expert.sum()) / max(1, len(self.tokens_per_expert) * self.tokens)

    def layer_uses(self) -> list[StepUse]:
        """What each MoE layer's router may move its state by."""
        routes = self.tokens_per_expert.to(self.sums.device)
        mean = self.experts_per_token
        return [StepUse(own, self.tokens, mean, sums) for own, sums in zip(routes, self.sums, strict=True)]


@dataclass(frozen=True)
class Evaluation:
    """Loss over a validation set: mean nats per counted token, and the number of those tokens."""

    loss: float
    labels: float


class NonFiniteError(RuntimeError):
    """A loss or gradient norm that is not finite; training must not go on silently."""


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
    ):
        """Put ``model`` (tagged by ``parallel.prepare_experts``) on the device and build its optimizer."""
        model.to(mesh.device)
        self.config, self.mesh, self.seed = config, mesh, seed
        self.model = model
        self._plan = plan
        self._peak_learning_rate = optimizer.learning_rate
        self._learning_rate_factor = learning_rate_factor
        layers = model.moe_layers()
        self._layer_row = {layer.router.layer: row for row, layer in enumerate(layers)}
        self._num_experts = layers[0].num_experts if layers else 0
        self._num_sums = layers[0].router.num_sums if layers else 0
        self.adamw = adamw = build_optimizer(model, optimizer)
        check_optimizer_covers(model, [p for group in adamw.param_groups for p in group["params"]])
        settings = deepspeed_config(config, dtype, plan.micro_batch_size, plan.accumulation, mesh.world_size)
        with redirect_stdout(io.StringIO()):  # in bfloat16 it prints its memory use a dozen times
            initialised = deepspeed.initialize(model=model, optimizer=adamw, config=settings)
        self.deepspeed, self.optimizer, _, _ = initialised

    def learning_rate(self, step: int) -> float:
        """Learning rate of ``step``."""
        return self._peak_learning_rate * self._learning_rate_factor(step)

    def step(self, step: int, micro_batches: list[MicroBatch]) -> StepResult:
        """One optimizer step.

        Args:
            step: Number of the step, from 0; sets the learning rate and the noise.
            micro_batches: This rank's micro-batches, ``accumulation`` of them, on any device.

        Raises:
            NonFiniteError: The loss or the gradient norm is not finite.
        """
        assert len(micro_batches) == self._plan.accumulation
        self.model.train()
        # Counted before the copy to the device, so that counting does not synchronise with it.
        text_tokens = [int((batch.document_ids >= 0).sum()) for batch in micro_batches]
        global_counts, token_hash = self._count(micro_batches, text_tokens)
        batches = [batch.to(self.mesh.device) for batch in micro_batches]
        layers = self.model.moe_layers()
        aux_weights = layers[0].router.aux_weights if layers else {}
        sums = _StepSums(list(aux_weights), len(layers), self._num_experts, self._num_sums, self.mesh.device)
        ahead = self._count_routes_ahead(step, batches) if self._needs_routes_ahead() else None
        is_check_step = self.config.check_every_steps > 0 and step % self.config.check_every_steps == 0
        watch = every_parameter_gets_gradient(self.model, step) if is_check_step else nullcontext()
        with watch:
            for batch, tokens in zip(batches, text_tokens, strict=True):
                context = routing_context(batch, self.seed, step, self._global_routes(ahead), global_counts.tokens)
                output = self.deepspeed(batch.input_ids, batch.labels, batch.document_ids, batch.position_ids, context)
                loss = micro_batch_loss(output, aux_weights, tokens, global_counts)
                sums.add(output, tokens / max(global_counts.tokens, 1))
                # DeepSpeed divides by the accumulation and averages over ranks.
                self.deepspeed.backward(loss * (self._plan.accumulation * self.mesh.world_size))
                if batch is not batches[-1]:
                    self.deepspeed.step()  # not a boundary: counts the micro-batch, updates nothing
        gradient_norm = self._update(step)
        result = sums.result(global_counts, aux_weights, gradient_norm, token_hash)
        if not (math.isfinite(result.loss) and math.isfinite(gradient_norm)):
            raise NonFiniteError(
                f"step {step}: loss={result.loss} gradient_norm={gradient_norm} must be finite; "
                "lower optimizer.learning_rate or look at the data of this step"
            )
        for layer, use in zip(layers, result.layer_uses(), strict=True):
            layer.router.after_step(use)
        if is_check_step:
            check_replicas(self.model, self.mesh, step)
        return result

    def _update(self, step: int) -> float:
        """Set the learning rate, clip, update; return the global gradient norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        own_norm = self._clip() if clips_itself(self.config) else None
        self.deepspeed.step()
        return float(own_norm if own_norm is not None else self.deepspeed.get_global_grad_norm())

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> Evaluation:
        """Mean cross-entropy over validation micro-batches; every rank must bring the same number of them."""
        self.model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        for batch in batches:
            batch = batch.to(self.mesh.device)
            output = self.model(
                batch.input_ids,
                batch.labels,
                batch.document_ids,
                batch.position_ids,
                routing_context(batch, self.seed, 0),
            )
            total[0] += output.loss_sum
            total[1] += (batch.labels != IGNORE_INDEX).sum()
        dist.all_reduce(total)
        self.model.train()
        return Evaluation(loss=float(total[0] / total[1].clamp(min=1)), labels=float(total[1]))

    def _count(self, batches: list[MicroBatch], text_tokens: list[int]) -> tuple[GlobalCounts, int]:
        """Counted targets and text tokens of the global batch, and the hash of its rows."""
        own_labels = sum(batch.num_valid_labels() for batch in batches)
        own_hash = wrap_to_int64(sum(batch.token_hash for batch in batches))
        counts = torch.tensor([own_labels, sum(text_tokens), own_hash], device=self.mesh.device)
        dist.all_reduce(counts)  # int64 sums wrap, as the hash wants
        labels, tokens, token_hash = counts.tolist()
        return GlobalCounts(labels=labels, tokens=tokens), token_hash

    def _needs_routes_ahead(self) -> bool:
        """Whether the balance loss needs the global batch's routes before its first backward.

        With one micro-batch the layers sum their counts over ranks as they go. With accumulation the later
        micro-batches' counts must be known first: a forward pass without gradient per micro-batch, about a quarter to a
        third more compute. ``router.load_balance_level=sequence`` avoids it, so does a larger micro-batch.
        """
        layers = self.model.moe_layers()
        return bool(layers) and layers[0].router.needs_global_routes and self._plan.accumulation > 1

    def _count_routes_ahead(self, step: int, batches: list[MicroBatch]) -> Tensor:
        """Routes per layer and expert of the whole global batch, from a pass without gradient."""
        total = torch.zeros(len(self._layer_row), self._num_experts, dtype=torch.float64, device=self.mesh.device)
        for batch in batches:
            context = routing_context(batch, self.seed, step)
            uses = self.model.routes(batch.input_ids, batch.document_ids, batch.position_ids, context)
            total += torch.stack([use.tokens_per_expert for use in uses])
        dist.all_reduce(total)
        return total

    def _global_routes(self, ahead: Tensor | None) -> Callable[[int, Tensor], Tensor]:
        """The context's ``sum_over_global_batch``."""

        def from_pass(layer: int, counts: Tensor) -> Tensor:
            assert ahead is not None
            return ahead[self._layer_row[layer]]

        def over_ranks(layer: int, counts: Tensor) -> Tensor:
            counts = counts.clone()
            dist.all_reduce(counts)
            return counts

        return over_ranks if ahead is None else from_pass

    def _clip(self) -> Tensor:
        """Global norm over all ranks' experts, each parameter once, and clipping by it; stage 0 only."""
        squares = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        gradients = [(p.grad, is_expert(p)) for p in self.model.parameters() if p.grad is not None]
        for gradient, of_experts in gradients:
            squares[int(of_experts)] += gradient.double().square().sum()
        dist.all_reduce(squares[1:], group=self.mesh.expert_group)
        norm = squares.sum().sqrt()
        if self.config.gradient_clipping > 0:
            scale = (self.config.gradient_clipping / (norm + 1e-6)).clamp(max=1.0)
            for gradient, _ in gradients:
                gradient.mul_(scale.to(gradient.dtype))
        return norm


class _StepSums:
    """Sums over one step's micro-batches; one stacked all-reduce at its end covers all layers."""

    def __init__(self, aux_names: list[str], num_layers: int, num_experts: int, num_sums: int, device: torch.device):
        self.aux_names, self.num_layers, self.num_experts = aux_names, num_layers, num_experts
        self.scalars = torch.zeros(1 + len(aux_names), dtype=torch.float64, device=device)
        self.layers = torch.zeros(num_layers, num_experts + 2 + num_sums, dtype=torch.float64, device=device)

    def add(self, output: LMOutput, share: float) -> None:
        """Add one micro-batch; ``share`` is its part of the global batch's tokens."""
        self.scalars[0] += output.loss_sum.detach()
        for column, name in enumerate(self.aux_names, start=1):
            self.scalars[column] += share * output.aux[name].detach()
        for row, use in enumerate(output.uses):
            self.layers[row, : self.num_experts] += use.tokens_per_expert
            self.layers[row, self.num_experts] += use.router_entropy
            self.layers[row, self.num_experts + 1] += use.dropped_routes
            if use.sums is not None:
                self.layers[row, self.num_experts + 2 :] += use.sums

    def result(
        self, counts: GlobalCounts, aux_weights: dict[str, float], gradient_norm: float, token_hash: int
    ) -> StepResult:
        """Reduce over ranks and take means."""
        stacked = torch.cat([self.scalars, self.layers.flatten()])
        dist.all_reduce(stacked)
        scalars = stacked[: len(self.scalars)].tolist()
        on_device = stacked[len(self.scalars) :].view(self.layers.shape)
        layers = on_device[:, : self.num_experts + 2].cpu()
        routes = layers[:, : self.num_experts]
        return StepResult(
            loss=scalars[0] / max(counts.labels, 1),
            aux=dict(zip(self.aux_names, scalars[1:], strict=True)),
            aux_weights=aux_weights,
            gradient_norm=gradient_norm,
            tokens_per_expert=routes,
            tokens=counts.tokens,
            router_entropy=(layers[:, self.num_experts] / max(counts.tokens, 1)).tolist(),
            sums=on_device[:, self.num_experts + 2 :],
            dropped_share=(layers[:, self.num_experts + 1] / routes.sum(dim=1).clamp(min=1)).tolist(),
            token_hash=token_hash,
        )
