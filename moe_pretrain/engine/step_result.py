"""Results of a step and of an evaluation, and the sums over micro-batches and ranks that they come from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_pretrain.engine.micro_batch import GlobalCounts
from moe_pretrain.model.decoder import LMOutput
from moe_pretrain.moe.types import ExpertKinds, StepUse


@dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step, summed over ranks and micro-batches.

    Attributes:
        loss: Cross-entropy per counted token of the global batch, nats; never with aux losses (defect C19).
        aux: Each aux loss, unweighted.
        aux_weights: Coefficients of ``aux``.
        gradient_norm: Global norm before clipping.
        gradient_norms: The same of each part of the model that there is; empty after a step that changed nothing.
        tokens_per_expert: Routes of text tokens ``[moe_layers, experts]``, float64.
        kinds: The experts.
        tokens: Text tokens of the global batch.
        router_entropy: Mean entropy of the routing distribution per MoE layer, nats.
        dropped_share: Share of routes that no expert computed, per MoE layer.
        sums: Each MoE layer's own sums ``[num_sums]``, float64, on the training device.
        token_hash: Wrapping 64-bit sum of the hashes of the rows consumed.
        sickness: None, or why the step changed nothing: a loss or gradient that is not finite, and where it arose.
    """

    loss: float
    aux: dict[str, float]
    aux_weights: dict[str, float]
    gradient_norm: float
    gradient_norms: Mapping[str, float]
    tokens_per_expert: Tensor
    kinds: ExpertKinds
    tokens: int
    router_entropy: list[float]
    dropped_share: list[float]
    sums: Sequence[Tensor]
    token_hash: int
    sickness: str | None = None

    @property
    def aux_loss(self) -> float:
        """The weighted sum that was added to the loss."""
        return sum(self.aux_weights[name] * value for name, value in self.aux.items())

    @property
    def experts_per_token(self) -> float:
        """Mean routes per text token to experts that are networks, over all MoE layers."""
        return self._per_token(self.tokens_per_expert[:, : self.kinds.ffn])

    @property
    def mean_experts_run(self) -> float:
        """The same with each network counted by its cost: what a token runs, in networks of the mean width."""
        if not self.kinds.costs:
            return self.experts_per_token
        return self._per_token(self.tokens_per_expert * torch.tensor(self.kinds.costs, dtype=torch.float64))

    def layer_uses(self) -> list[StepUse]:
        """Sums by which each MoE layer's router may move its state."""
        routes = self.tokens_per_expert.to(self.sums[0].device) if self.sums else self.tokens_per_expert
        mean = self._per_token(self.tokens_per_expert)
        return [StepUse(own, self.tokens, mean, sums) for own, sums in zip(routes, self.sums, strict=True)]

    def _per_token(self, routes: Tensor) -> float:
        return float(routes.sum()) / max(1, len(routes) * self.tokens)


@dataclass(frozen=True)
class Evaluation:
    """Result of a validation set.

    Attributes:
        loss: Mean nats per counted token.
        labels: Number of those tokens.
        experts_per_token: Mean routes per text token to networks of each MoE layer, bottom up: evaluation may route by
            another rule than training.
    """

    loss: float
    labels: float
    experts_per_token: list[float]


class StepSums:
    """Sums over one step's micro-batches; one stacked all-reduce at its end covers all layers."""

    def __init__(self, aux_names: list[str], kinds: ExpertKinds, num_sums: list[int], device: torch.device):
        """Begin at 0; ``num_sums`` has the number of each MoE layer's own sums."""
        self.aux_names, self.num_experts = aux_names, kinds.total
        self.kinds, self.num_sums = kinds, num_sums
        num_experts = kinds.total
        self.scalars = torch.zeros(1 + len(aux_names), dtype=torch.float64, device=device)
        columns = num_experts + 2 + max(num_sums, default=0)
        self.layers = torch.zeros(len(num_sums), columns, dtype=torch.float64, device=device)

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
                self.layers[row, self.num_experts + 2 :][: self.num_sums[row]] += use.sums

    def reduce(self) -> None:
        """Sum over ranks."""
        stacked = self.stacked()
        dist.all_reduce(stacked)
        self.set(stacked)

    def stacked(self) -> Tensor:
        """All sums as one vector."""
        return torch.cat([self.scalars, self.layers.flatten()])

    def set(self, stacked: Tensor) -> None:
        """Take over sums that are reduced already, and wait for them, once."""
        sizes, on_host = [len(self.scalars), self.layers.numel()], stacked.cpu()
        self.scalars, layers = on_host.split(sizes)
        self._layers_on_host = layers.view_as(self.layers)
        self.layers = stacked.split(sizes)[1].view_as(self.layers)

    @property
    def loss_sum(self) -> float:
        """Cross-entropy summed over counted positions, of the global batch after ``reduce``."""
        return float(self.scalars[0])

    def result(
        self,
        counts: GlobalCounts,
        aux_weights: dict[str, float],
        gradient_norm: float,
        gradient_norms: Mapping[str, float],
        token_hash: int,
        sickness: str | None,
    ) -> StepResult:
        """Take means of the reduced sums."""
        scalars, layers = self.scalars.tolist(), self._layers_on_host
        routes = layers[:, : self.num_experts]
        return StepResult(
            loss=scalars[0] / max(counts.labels, 1),
            aux=dict(zip(self.aux_names, scalars[1:], strict=True)),
            aux_weights=aux_weights,
            gradient_norm=gradient_norm,
            gradient_norms=gradient_norms,
            tokens_per_expert=routes,
            kinds=self.kinds,
            tokens=counts.tokens,
            router_entropy=(layers[:, self.num_experts] / max(counts.tokens, 1)).tolist(),
            sums=[own[self.num_experts + 2 :][:number] for own, number in zip(self.layers, self.num_sums, strict=True)],
            dropped_share=(layers[:, self.num_experts + 1] / routes.sum(dim=1).clamp(min=1)).tolist(),
            token_hash=token_hash,
            sickness=sickness,
        )
