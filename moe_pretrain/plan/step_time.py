"""Seconds of an optimizer step on GPUs, by part, from what a step computes, moves and sends.

A roofline: every part takes as long as its FLOPs or its bytes at the rate of what limits it, and nothing overlaps but
the halves of an exchange, as in the engine. The bytes of memory traffic were counted on the kernels of ``model=700m
router=top_k``; no part has been measured on a GPU.
"""

from dataclasses import dataclass, fields

from moe_pretrain.config.preflight import RunPlan
from moe_pretrain.config.schema import Config
from moe_pretrain.model.size import mean_ffn_experts
from moe_pretrain.moe.build import dense_width, expert_width
from moe_pretrain.moe.kernels import priced_kernels
from moe_pretrain.plan.cost import GRADIENTS, ROUTES, WEIGHTS, exchange_passes, extra_forward, flops_by_part, traffic
from moe_pretrain.plan.local_parameters import LocalParameters

_MATRIX_RATE = 0.62
"""Share of the peak that large matrix products reach: 0.78 of the 790 TFLOP/s that an H100 of 989 sustains."""
_ATTENTION_RATE = 0.40
"""The same of FlexAttention's kernels."""
_BYTES_PER_HIDDEN = 95
"""Memory traffic per token, layer and unit of the hidden size, forward and backward: norms, rotary, residuals."""
_LESS_PER_HIDDEN = 8
"""So much less with liger's kernels: each of a layer's two norms reads its rows and their gradient once in backward."""
_BYTES_PER_ROUTED_HIDDEN = 16
"""The same for each route: gathers, and sums over a token's experts."""
_BYTES_PER_WIDTH = 18
"""Memory traffic per row of an expert and unit of its width: the activation and its backward."""
_FUSED_BYTES_PER_ROUTED_HIDDEN, _FUSED_BYTES_PER_WIDTH = 4, 10
"""The same two with quack's kernels: products gather rows themselves, and have the activation in their epilogues."""
_TRAFFIC_WITH_RECOMPUTE = {"none": 1.0, "selective": 1.06, "full": 1.28}
"""Times a layer's traffic without; with quack's kernels 1.08 and 1.2."""
_BYTES_PER_LOGIT = 8.5
"""Memory traffic of the loss per token and entry of the vocabulary."""
_BYTES_PER_PARAMETER = 26
"""Memory traffic of accumulating gradients, per parameter of a rank and micro-batch (``BF16_Optimizer``)."""
_BYTES_PER_SENT_BYTE = 5
"""Memory traffic of packing, sorting, unpacking and adding up what the exchange moves."""
_BYTES_PER_HALVED_HIDDEN = 8
"""Memory traffic per token and unit of the routed size where halves are exchanged apart, to put them together again."""
_BYTES_PER_HALVED_PARAMETER = 6
"""The same per parameter of this rank's experts and micro-batch: the halves' gradients are added up."""
_HALVES_SECONDS = 0.06e-3
"""Of a layer's two halves in a micro-batch, forward and backward: more kernels that are too small to be limited."""
_ROUTER_SECONDS = 0.09e-3
"""Of a layer's routing in a micro-batch, forward and backward: kernels too small to be limited by anything else."""


@dataclass(frozen=True)
class Machine:
    """Rates of one GPU and of what connects it to others.

    Attributes:
        peak: FLOP/s; 989e12 is the H100's dense bfloat16.
        memory_bandwidth: Bytes/s of its memory that copies reach.
        link: Bytes/s that one GPU sends to others of its node.
        network: Bytes/s that one GPU sends to other nodes.
        gpus_per_node: GPUs of a node.
    """

    peak: float = 989e12
    memory_bandwidth: float = 3.0e12
    link: float = 300e9
    network: float = 50e9
    gpus_per_node: int = 8

    def between(self, ranks: int) -> float:
        """Bytes/s among so many neighbouring ranks."""
        return self.link if ranks <= self.gpus_per_node else self.network


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on one rank; they add up.

    Attributes:
        products: Matrix products, recomputed ones among them.
        attention: Scores and values of attention.
        memory: Everything between the products, and the loss.
        routing: Small kernels of the routers.
        accumulation: Gradients of each micro-batch added to those before.
        exchange: Rows sent to experts and back, as far as they are waited for, and their packing.
        reduction: Gradients reduced, weights gathered.
    """

    products: float
    attention: float
    memory: float
    routing: float
    accumulation: float
    exchange: float
    reduction: float

    @property
    def total(self) -> float:
        """The step."""
        return sum(getattr(self, part.name) for part in fields(self))


def step_time(config: Config, run: RunPlan, parameters: LocalParameters, machine: Machine) -> StepTime:
    """Estimate a step of ``run``; ``parameters`` are those of one rank."""
    plan, size, model = run.batches, run.size, config.model
    ranks, expert_parallel = config.parallel.processes, config.parallel.expert_parallel_size
    tokens = plan.tokens_per_step / ranks
    scores = flops_by_part(size)["attention scores"]
    again = extra_forward(config, size, plan)
    scores_again = scores if model.recompute != "none" else 0.0
    trained = 3 * size.num_passes
    products = size.training_flops_per_token + again - trained * scores - scores_again
    experts = 0 if config.router.dense_experts else len(model.moe_layers)
    routes = mean_ffn_experts(model, config.router) if experts else 0.0
    inner_routed = routes * expert_width(model.moe, config.router, model.hidden_size)
    in_moe = inner_routed + model.moe.shared_width if experts else dense_width(model.moe, config.router)
    widths = len(model.moe_layers) * in_moe + (model.num_layers - len(model.moe_layers)) * model.ffn_hidden_size
    kernels = priced_kernels(config.engine.kernels, run.device)
    per_hidden, per_routed_hidden = _BYTES_PER_HIDDEN, _BYTES_PER_ROUTED_HIDDEN
    if kernels == "liger":
        per_hidden -= _LESS_PER_HIDDEN
    if kernels == "quack":
        per_routed_hidden = _FUSED_BYTES_PER_ROUTED_HIDDEN
        widths -= experts * inner_routed * (1 - _FUSED_BYTES_PER_WIDTH / _BYTES_PER_WIDTH)
    routed = per_routed_hidden * experts * routes * model.moe.routed_size(model.hidden_size)
    once = per_hidden * model.num_layers * model.hidden_size + routed + _BYTES_PER_WIDTH * widths
    once *= _TRAFFIC_WITH_RECOMPUTE[model.recompute]
    moved = size.num_passes * (once + _BYTES_PER_LOGIT * model.vocab_size)
    sent = traffic(config, run.dtype, plan, parameters)
    dense, own = sent[GRADIENTS] + sent[WEIGHTS], sent[ROUTES]
    travelling = own / machine.between(expert_parallel)
    if experts and config.parallel.overlaps_exchange(run.device) and not config.router.merges_experts:
        forward = tokens * flops_by_part(size)["routed experts"] / (_MATRIX_RATE * machine.peak)
        travelling = _waited_for(travelling, forward, *exchange_passes(config, plan))
        travelling += plan.accumulation * experts * size.num_passes * _HALVES_SECONDS
        halved = tokens * experts * model.moe.routed_size(model.hidden_size) * _BYTES_PER_HALVED_HIDDEN
        halved += plan.accumulation * parameters.expert * _BYTES_PER_HALVED_PARAMETER
        travelling += size.num_passes * halved / machine.memory_bandwidth
    return StepTime(
        products=tokens * products / (_MATRIX_RATE * machine.peak),
        attention=tokens * (trained * scores + scores_again) / (_ATTENTION_RATE * machine.peak),
        memory=tokens * moved / machine.memory_bandwidth,
        routing=plan.accumulation * experts * _ROUTER_SECONDS,
        accumulation=plan.accumulation * parameters.count * _BYTES_PER_PARAMETER / machine.memory_bandwidth,
        exchange=travelling + own * _BYTES_PER_SENT_BYTE / machine.memory_bandwidth,
        reduction=dense / machine.between(ranks),
    )


def _waited_for(travelling: float, experts: float, forward_passes: int, backward_passes: int) -> float:
    """Seconds of ``travelling`` in which no expert works, where halves of the tokens are exchanged apart.

    The first half's way to the experts and the second half's way back are waited for; the two ways between lie behind
    the experts of the other half, which take ``experts`` in all layers' forward passes and twice as long in backward.
    """
    each = travelling / (forward_passes + backward_passes)
    forward, backward = (max(each / 2, each - work) for work in (experts, 2 * experts))
    return forward_passes * forward + backward_passes * backward
