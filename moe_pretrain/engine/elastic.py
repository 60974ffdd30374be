"""Gradients with the same bits on any number of ranks: ``engine.determinism=elastic``.

The micro-batch is the unit of arithmetic. Every matrix product, dense or of an expert, is over rows of one micro-batch,
so it does not know which rank runs it: experts run the rows of each sending rank by themselves. The gradients, losses
and statistics of the micro-batches are added in one balanced binary tree over the global batch; among powers of two, a
rank's consecutive micro-batches are a whole subtree, and so are those of an expert group. DeepSpeed then gets the
finished gradient from one rank, times the number of ranks, and zeros from the others, so that its average is exact in
any order. The norm is summed per parameter and per expert, each at its place, and the optimizer runs without a fused
kernel, which rounds the last few elements of a partition otherwise than the rest.

What a run must keep for the same bits: the global batch, ``batch.micro_batch_size``, the kind of processor, torch. What
it costs: the small products, one copy of the gradients per level of the tree, and ``log2(ranks)`` messages of them.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from moe_pretrain.engine.gradient_norms import GRADIENT_PARTS, gradient_part, norms_of
from moe_pretrain.model.decoder import DecoderLM, ModelConfig
from moe_pretrain.model.parameter_groups import parameter_roles
from moe_pretrain.moe.build import build_router
from moe_pretrain.moe.routers.config import RouterConfig
from moe_pretrain.moe.types import Experts
from moe_pretrain.parallel.deepspeed_moe import is_expert
from moe_pretrain.parallel.exchange import AllToAll
from moe_pretrain.parallel.mesh import Mesh
from moe_pretrain.schedule.batch_plan import BatchConfig, BatchPlan
from moe_pretrain.system.cpu import fix_products


def check_elastic(
    model: ModelConfig,
    router: RouterConfig,
    batch: BatchConfig,
    plan: BatchPlan,
    world_size: int,
    device_type: str,
    dtype: str,
) -> None:
    """Refuse what ``engine.determinism=elastic`` does not cover.

    Raises:
        ValueError: One line naming the field.
    """
    word = "with engine.determinism=elastic"
    if (device_type, dtype) != ("cpu", "float32"):
        raise ValueError(
            f"engine.device={device_type} engine.dtype={dtype} must be cpu and float32 {word}: kernels of a GPU sum in "
            "orders that depend on sizes, and bfloat16 would round the sum that is handed to DeepSpeed"
        )
    if batch.micro_batch_size is None:
        raise ValueError(f"batch.micro_batch_size=null must be a number {word}: it is the same on any number of ranks")
    units = plan.rows_per_step // plan.micro_batch_size
    for name, value in (
        ("number of ranks", world_size),
        ("number of micro-batches in batch.global_batch_tokens", units),
    ):
        if value & (value - 1):
            raise ValueError(f"the {name}={value} must be a power of two {word}: sums are balanced binary trees")
    if router.dense_experts:
        return
    if router.merges_experts:
        raise ValueError(
            f"router={router.name} must be another {word}: ranks add up parts of a token's output, in sums that depend "
            "on how many they are"
        )
    if model.moe.experts.name == "matrix_product":
        raise ValueError(
            f"experts=matrix_product must be swiglu {word}: the gradient of the shared cores would be summed by rank"
        )
    for layer in router.twin_layers(model.moe_layers):
        with torch.device("meta"):
            module = build_router(model.moe, router, model.hidden_size, layer)
        if module.needs_proxy_norms:
            raise ValueError(
                f"router.expert_router_coupling_weight must be 0 {word}: the experts' part of its gradient is of no "
                "sender"
            )
        if module.needs_expert_scores or module.expert_arguments(range(1)):
            raise ValueError(
                f"router={router.of_layer(layer).name} must be another {word}: its own parameters take part on the "
                "ranks of the experts, where their gradients would be summed by rank (autonomy: set "
                "router.gate_activation=travels)"
            )


class TreeSum:
    """Sum of a power of two of equally long lists of tensors, one list at a time, in a balanced binary tree."""

    def __init__(self) -> None:
        self._subtrees: dict[int, Sequence[Tensor]] = {}  # by height

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Add the next leaf."""
        height = 0
        while (left := self._subtrees.pop(height, None)) is not None:
            tensors = [first + second for first, second in zip(left, tensors, strict=True)]
            height += 1
        self._subtrees[height] = tensors

    def take(self) -> Sequence[Tensor]:
        """The sum; the tree is empty again."""
        (total,) = self._subtrees.values()
        self._subtrees = {}
        return total


class GradientCarrier(nn.Module):
    """The model as DeepSpeed sees it: forward takes finished gradients, backward hands them to the parameters."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, gradients: Sequence[tuple[nn.Parameter, Tensor]]) -> Tensor:
        """A scalar with these gradients, to the bit."""
        return torch.stack([(parameter * gradient).sum() for parameter, gradient in gradients]).sum()


class ElasticGradients:
    """Gradients of micro-batches one by one, and what becomes of them at the end of the step."""

    def __init__(self, model: DecoderLM, mesh: Mesh):
        """Let every MoE layer of ``model`` exchange, also over one rank, and keep senders apart."""
        fix_products()
        self.norm = 0.0
        self.norms: dict[str, float] = {}
        self._mesh = mesh
        roles = parameter_roles(model)
        self._part_of = {parameter: gradient_part(roles[name]) for name, parameter in model.named_parameters()}
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._dense = [parameter for parameter in parameters if not is_expert(parameter)]
        self._experts = [parameter for parameter in parameters if is_expert(parameter)]
        self._num_experts = 0
        self._anchor = torch.zeros((), requires_grad=True)
        self._own: list[dict[int, Tensor]] = [{} for _ in range(mesh.shard.size)]  # this unit's, per sender
        self._dense_sum, self._statistics_sum = TreeSum(), TreeSum()
        self._expert_sums = [TreeSum() for _ in range(mesh.shard.size)]
        self._reached: set[int] = set()
        for layer in model.moe_layers():
            self._num_experts = layer.kinds.ffn
            layer.exchange = AllToAll(mesh.expert_group)
            layer.experts_of_sender = partial(self._experts_of_sender, layer.experts)

    def _experts_of_sender(self, experts: nn.Module, sender: int) -> Experts:
        """``experts`` for the rows of one sender: gradients of parameters are kept by sender, not added up."""
        copies = {
            name: _Keep.apply(self._anchor, parameter.detach(), partial(self._keep, sender, id(parameter)))
            for name, parameter in experts.named_parameters()
            if parameter.requires_grad
        }
        return lambda *arguments: functional_call(experts, copies, arguments)

    def _keep(self, sender: int, parameter: int, gradient: Tensor) -> None:
        """Add to the gradient of one sender's rows: a scheme with two passes has one from each."""
        own = self._own[sender]
        own[parameter] = own[parameter] + gradient if parameter in own else gradient

    def backward(self, loss: Tensor, statistics: Tensor) -> None:
        """Add the next micro-batch: the gradients of ``loss``, and a float64 vector of ``statistics``. Collective."""
        *gradients, _ = torch.autograd.grad(loss, [*self._dense, self._anchor], allow_unused=True)
        dense = list(zip(self._dense, gradients, strict=True))
        self._reached.update(id(parameter) for parameter, gradient in dense if gradient is not None)
        self._dense_sum.add([torch.zeros_like(p) if gradient is None else gradient for p, gradient in dense])
        self._statistics_sum.add([statistics])
        for own, total in zip(self._own, self._expert_sums, strict=True):
            self._reached.update(own)
            total.add([own.pop(id(parameter)) for parameter in self._experts])

    @torch.no_grad()
    def finish(self, clip_to: float) -> tuple[list[tuple[nn.Parameter, Tensor]], Tensor]:
        """End the step: its gradients as ``GradientCarrier`` wants them, and the statistics. Collective.

        Args:
            clip_to: Largest global norm, 0 for no clipping. The norm before clipping is in ``norm`` afterwards, those
                of the model's parts in ``norms``.
        """
        mesh = self._mesh
        of_senders = TreeSum()
        for total in self._expert_sums:
            of_senders.add(total.take())
        has_dense, dense = _sum_over_ranks(self._dense_sum.take(), None)
        own = of_senders.take()
        if own:  # as they are, but seen by hooks of the parameters: checks and injected faults
            own = torch.autograd.grad(self._experts, self._experts, own)
        has_experts, experts = _sum_over_ranks(own, mesh.expert_data_group)
        _, (statistics,) = _sum_over_ranks(self._statistics_sum.take(), None)
        dist.broadcast(statistics, 0)

        norm = self._norm(dense if has_dense else [], experts if has_experts else [])
        self.norm = float(norm)
        scale = clip_scale(norm, clip_to).float()
        handed = []
        parts = ((self._dense, dense, has_dense), (self._experts, experts, has_experts))
        for parameters, gradients, is_summed in parts:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if id(parameter) in self._reached:
                    whole = gradient * scale * mesh.world_size if is_summed else torch.zeros_like(gradient)
                    handed.append((parameter, whole))
        self._reached.clear()
        return handed, statistics

    def _norm(self, dense: Sequence[Tensor], experts: Sequence[Tensor]) -> Tensor:
        """Global norm, float64, from the ranks that have the sums; each number is summed at its own place."""
        num_dense, num_experts = len(self._dense), self._num_experts
        squares = torch.zeros(num_dense + len(self._experts) * num_experts, dtype=torch.float64)
        for row, gradient in enumerate(dense):
            squares[row] = gradient.double().square().sum()
        for row, gradient in enumerate(experts):
            own = self._mesh.shard.local_experts(len(gradient) * self._mesh.shard.size)  # of one width
            for expert, of_expert in zip(own, gradient, strict=True):
                squares[num_dense + row * num_experts + expert] = of_expert.double().square().sum()
        dist.all_reduce(squares)  # one rank has each number, the others 0
        norm = squares.sum().sqrt()
        of_parts = torch.zeros(len(GRADIENT_PARTS), dtype=torch.float64)
        for row, parameter in enumerate(self._dense):
            of_parts[self._part_of[parameter]] += squares[row]
        for parameter, own in zip(self._experts, squares[num_dense:].split(num_experts or 1), strict=True):
            of_parts[self._part_of[parameter]] += own.sum()
        self.norms = norms_of(of_parts.tolist(), set(self._part_of.values()), float(norm))
        return norm


def clip_scale(norm: Tensor, clip_to: float) -> Tensor:
    """Factor that brings gradients of global norm ``norm`` down to ``clip_to``; 1 without clipping."""
    return (clip_to / (norm + 1e-6)).clamp(max=1.0) if clip_to > 0 else torch.ones_like(norm)


def exact_sum(own: Float[Tensor, "vectors size"]) -> Float[Tensor, "size"]:
    """Sum of the vectors of all ranks, correctly rounded, so in no order. All bring equally many. Collective."""
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    return torch.tensor([math.fsum(column) for column in torch.cat(gathered).t().tolist()], dtype=own.dtype)


class _Keep(torch.autograd.Function):
    """A parameter whose gradient goes to ``keep`` and no further; ``anchor`` makes autograd come by."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, parameter: Tensor, keep: Callable[[Tensor], None]) -> Tensor:
        ctx.keep = keep
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.keep(grads[0])
        return None, None, None


def _sum_over_ranks(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> tuple[bool, Sequence[Tensor]]:
    """Continue the tree over the ranks of ``group``, lower ranks to the left; whether this rank has the sum, and it."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if size == 1 or not tensors:
        return rank == 0, tensors
    total = torch.cat([tensor.flatten() for tensor in tensors])
    distance = 1
    while distance < size and rank % (2 * distance) == 0:
        right = torch.empty_like(total)
        dist.recv(right, group=group, group_src=rank + distance)
        total += right
        distance *= 2
    if rank:
        dist.send(total, group=group, group_dst=rank - distance)
    parts = total.split([tensor.numel() for tensor in tensors])
    return rank == 0, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
