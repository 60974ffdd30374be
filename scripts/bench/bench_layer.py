"""Times one MoE layer, forward and backward, against a dense layer of equal active FLOPs and against its peers.

    python scripts/bench/bench_layer.py                                        # the 700M shape on a CPU
    python scripts/bench/bench_layer.py --tokens 16384 --rounds 40             # on a GPU

All MoE variants hold the same weights (the very same memory), get the same input and upstream gradient, and are
compared with ours in output and input gradient. Tokens are made such that each prefers its experts clearly:
variants that compute router logits in bfloat16 then still choose the same experts, and the load is what the
title says. More variants are ours with ``router=uniform``: no router to compute, and every expert the same load; one
of them with ``experts=unequal``, whose active FLOPs are the same then, and its weights its own; those with
``experts=zero_computation`` leave to the networks a share of the routes, whose inverse is how much faster they can be.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from bench_tools import device_name, interleave, print_table, ratio_of_medians
from torch import Tensor, nn

from moe_pretrain.config.load import load
from moe_pretrain.moe.build import build_moe_layer
from moe_pretrain.moe.experts.config import UnequalConfig, ZeroComputationConfig
from moe_pretrain.moe.experts.swiglu import SwiGLU, SwiGLUExperts
from moe_pretrain.moe.layer import MoEConfig, MoELayer
from moe_pretrain.moe.routers.top_k import TopKRouter
from moe_pretrain.moe.routers.uniform import UniformConfig, UniformRouter
from moe_pretrain.moe.types import ExpertShard, RoutingContext
from moe_pretrain.system.cpu import keep_freed_memory

COPY_LIMIT_BYTES = 2 << 30
DENSE, OURS, EVEN = "dense SwiGLU, equal FLOPs", "moe_pretrain", "moe_pretrain, router=uniform"
UNEQUAL = f"{EVEN}, experts=unequal"
PATTERN = (1, 1, 2, 4)
SHARES = (0.8, 0.67, 0.5)
"""Of the routes to networks beside zero-computation experts."""


@dataclass
class Variant:
    """A layer and how to call it on ``[tokens, hidden]``."""

    module: nn.Module
    forward: Callable[[Tensor], Tensor]


def main() -> None:
    options = parse_options()
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype)
    if device.type == "cpu":
        keep_freed_memory()
    if options.cpu_clock:
        torch.set_num_threads(1)
    torch.manual_seed(0)
    layer = build_ours(options).to(device)
    variants = {DENSE: build_dense(options, device, dtype), OURS: wrap_ours(layer, options, device)}
    variants[EVEN] = wrap_ours(build_even(options, layer), options, device)
    if options.experts % len(PATTERN) == 0:
        variants[UNEQUAL] = wrap_ours(build_unequal(options).to(device), options, device)
    for share in SHARES:
        beside = build_zero_computation(options, layer, share).to(device)
        share = beside.kinds.ffn / beside.kinds.total
        variants[f"{EVEN}, {share:.0%} of routes to networks"] = wrap_ours(beside, options, device)
    variants |= build_transformers(options, layer) | build_deepspeed(options, layer, device)
    if options.only:
        variants = {name: v for name, v in variants.items() if any(part in name for part in options.only.split(","))}
    for skew in (1.0, options.skew):
        hidden = make_tokens(layer.router.weight.detach(), options, skew).to(dtype)
        bench(variants, hidden, options, device, skew)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--width", type=int, default=3072, help="inner width of one expert")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--skew", type=float, default=2.0, help="load of the busiest expert over the mean, 2nd table")
    parser.add_argument("--cpu-clock", action="store_true", help="one thread, processor time instead of wall time")
    parser.add_argument("--only", default="", help="parts of names, comma-separated: time only these variants")
    options = parser.parse_args()
    if not 1 <= options.skew <= options.experts / options.top_k:
        parser.error(f"--skew {options.skew} must be in [1, experts / top_k = {options.experts / options.top_k}]")
    return options


def make_tokens(router_weight: Tensor, options: argparse.Namespace, skew: float) -> Tensor:
    """``[tokens, hidden]``, normal except along the router's rows, where the wanted experts stand out.

    The first expert serves ``skew`` times the mean number of tokens, the others share the rest at random.
    """
    experts, top_k = options.experts, options.top_k
    generator = torch.Generator().manual_seed(1)
    preference = torch.rand(options.tokens, experts, generator=generator)
    if skew > 1:
        hot = torch.rand(options.tokens, generator=generator) < skew * top_k / experts
        preference[:, 0] = torch.where(hot, 2.0, -1.0)
    wanted = preference.topk(top_k, dim=1).indices
    logits = torch.rand(options.tokens, experts, generator=generator)
    logits.scatter_add_(1, wanted, torch.full_like(logits, 2.0))
    hidden = torch.randn(options.tokens, options.hidden, generator=generator).to(router_weight.device)
    # The rows are orthonormal, so this sets the logits and leaves all else as it is.
    return hidden + (logits.to(hidden.device) - hidden @ router_weight.t()) @ router_weight


def build_ours(options: argparse.Namespace) -> MoELayer:
    weights = "renormalised" if options.top_k > 1 else "raw"
    shipped = load(["router=top_k", "router.load_balance_level=micro_batch"]).router
    config = replace(shipped, top_k=options.top_k, weights=weights)
    router = TopKRouter(config, options.hidden, options.experts, layer=0)
    experts = SwiGLUExperts(options.experts, options.hidden, options.width, ExpertShard())
    layer = MoELayer(layer_config(options), router, experts, options.hidden)
    nn.init.orthogonal_(router.weight)
    for parameter in layer.experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    layer.experts.to(getattr(torch, options.dtype))
    return layer


def build_even(options: argparse.Namespace, layer: MoELayer) -> MoELayer:
    """The same experts, whose tokens are dealt out."""
    router = UniformRouter(UniformConfig(name="uniform", top_k=options.top_k), options.experts, layer=0)
    return MoELayer(layer_config(options), router, layer.experts, options.hidden)


def build_unequal(options: argparse.Namespace) -> MoELayer:
    """Experts of the widths of ``PATTERN``, ``--width`` on average, whose tokens are dealt out."""
    config = replace(layer_config(options), experts=UnequalConfig("unequal", PATTERN, "routes"))
    router = UniformConfig(name="uniform", top_k=options.top_k)
    layer = build_moe_layer(config, router, options.hidden, 0, ExpertShard())
    assert isinstance(layer, MoELayer)
    for parameter in layer.experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    layer.experts.to(getattr(torch, options.dtype))
    return layer


def build_zero_computation(options: argparse.Namespace, layer: MoELayer, share: float) -> MoELayer:
    """The same networks beside as many zero, copy and constant experts, half of them constant as in the paper.

    Of routes that are dealt out, ``share``, as near as whole experts come, goes to the networks.
    """
    others = max(1, round(options.experts * (1 / share - 1)))
    constant, copy = -(-others // 2), others // 4
    experts = ZeroComputationConfig("zero_computation", constant, copy, others - constant - copy, input_scale=1.0)
    config = replace(layer_config(options), experts=experts)
    router = UniformRouter(UniformConfig(name="uniform", top_k=options.top_k), config.kinds.total, layer=0)
    built = MoELayer(config, router, layer.experts, options.hidden)
    assert built.zero_computation is not None
    for parameter in built.zero_computation.parameters():
        nn.init.normal_(parameter, std=0.02)
    built.zero_computation.to(layer.experts.in_weight.dtype)
    return built


def layer_config(options: argparse.Namespace) -> MoEConfig:
    return MoEConfig(options.experts, options.width, 0, 1, 1, 0, None, 8)


def wrap_ours(layer: MoELayer, options: argparse.Namespace, device: torch.device) -> Variant:
    position = torch.arange(options.tokens, device=device)
    context = RoutingContext(torch.ones_like(position, dtype=torch.bool), position, 1, seed=0, step=0)
    return Variant(layer, lambda hidden: layer(hidden, context, False).hidden)


def build_dense(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Variant:
    dense = SwiGLU(options.hidden, options.top_k * options.width)
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.02)
    dense.to(device, dtype)
    return Variant(dense, dense)


def build_transformers(options: argparse.Namespace, layer: MoELayer) -> dict[str, Variant]:
    """The sparse blocks of OLMoE and Mixtral with every implementation of their experts."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock
    from transformers.models.olmoe.modeling_olmoe import OlmoeConfig, OlmoeSparseMoeBlock

    shape = {
        "hidden_size": options.hidden,
        "intermediate_size": options.width,
        "num_local_experts": options.experts,
        "num_experts_per_tok": options.top_k,
    }
    weights_per_route = 3 * options.hidden * options.width
    copied = options.tokens * options.top_k * weights_per_route * layer.experts.in_weight.element_size()
    found = {}
    for implementation in ["eager", *sorted(ALL_EXPERTS_FUNCTIONS)]:
        if implementation == "batched_mm" and copied > COPY_LIMIT_BYTES:
            print(f"transformers {implementation}: left out, it would copy {copied / 2**30:.0f} GiB of weights")
            continue
        olmoe = OlmoeConfig(**shape, num_experts=options.experts, norm_topk_prob=options.top_k > 1)
        blocks: dict[str, tuple[type[nn.Module], object]] = {"OLMoE": (OlmoeSparseMoeBlock, olmoe)}
        if options.top_k > 1:  # Mixtral's weights always sum to 1, ours do not at top-1
            blocks["Mixtral"] = (MixtralSparseMoeBlock, MixtralConfig(**shape))
        for name, (block_class, config) in blocks.items():
            config._experts_implementation = implementation
            with torch.device("meta"):
                block = block_class(config)
            # bfloat16, as in a model of that dtype; the values are near enough to choose the same experts.
            block.gate.weight = nn.Parameter(layer.router.weight.detach().to(layer.experts.in_weight.dtype))
            block.experts.gate_up_proj = nn.Parameter(layer.experts.in_weight.detach())
            block.experts.down_proj = nn.Parameter(layer.experts.out_weight.detach())
            found[f"{name} {implementation}"] = Variant(block, lambda hidden, block=block: block(hidden[None])[0])
    return found


def build_deepspeed(options: argparse.Namespace, layer: MoELayer, device: torch.device) -> dict[str, Variant]:
    """DeepSpeed's own layer without dropping, its experts the same SwiGLU as ours."""
    from deepspeed.moe.layer import MoE

    from moe_pretrain.config.load import load
    from moe_pretrain.parallel.mesh import build_mesh

    build_mesh(load([]).parallel, device.type)
    block = MoE(
        options.hidden,
        SwiGLU(options.hidden, options.width),
        options.experts,
        k=options.top_k,
        drop_tokens=False,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    block.set_deepspeed_parallelism()
    block.deepspeed_moe.gate.wg.weight = nn.Parameter(layer.router.weight.detach())
    for index, expert in enumerate(block.deepspeed_moe.experts.deepspeed_experts):
        expert.in_weight = nn.Parameter(layer.experts.in_weight.detach()[index])
        expert.out_weight = nn.Parameter(layer.experts.out_weight.detach()[index])
    return {"DeepSpeed MoE, no drop": Variant(block, lambda hidden: block(hidden[None])[0][0])}


def bench(
    variants: dict[str, Variant], hidden: Tensor, options: argparse.Namespace, device: torch.device, skew: float
) -> None:
    """Check, then time, then print one table."""
    hidden = hidden.requires_grad_()
    grad = torch.randn(hidden.shape, device=device).to(hidden.dtype)

    def run(variant: Variant) -> Tensor:
        output = variant.forward(hidden)
        output.backward(grad)
        return output.detach()

    def clean() -> None:
        hidden.grad = None
        for variant in variants.values():
            variant.module.zero_grad(set_to_none=True)

    outputs, saved, usable = {}, {}, {}
    for name, variant in variants.items():
        try:
            outputs[name] = (run(variant), hidden.grad)
            clean()
            saved[name] = saved_megabytes(variant, hidden)
            usable[name] = variant
        except (RuntimeError, ImportError, ValueError, NotImplementedError) as error:
            print(f"{name}: left out, {type(error).__name__}: {str(error).splitlines()[0][:150]}")
            clean()
    times = interleave(
        {name: lambda variant=variant: run(variant) for name, variant in usable.items()},
        options.rounds,
        2,
        device,
        clean,
        options.cpu_clock,
    )
    busiest = busiest_over_mean(variants[OURS], hidden) if OURS in variants else skew
    print(
        f"\n{device_name(device)}, torch {torch.__version__}: hidden {options.hidden}, {options.experts} experts x "
        f"{options.width}, top-{options.top_k}, {options.tokens} tokens, {options.dtype}; busiest expert "
        f"{busiest:.2f} x mean; {options.rounds} rounds"
    )
    rows = []
    for name in usable:
        dense = ratio_of_medians(times[DENSE], times[name]) if DENSE in usable else "-"
        ours = ratio_of_medians(times[name], times[OURS]) if OURS in usable else "-"
        errors = ["-", "-"]
        if name != DENSE and not name.startswith(EVEN) and OURS in usable:
            errors = [f"{relative_error(a, b):.0e}" for a, b in zip(outputs[name], outputs[OURS], strict=True)]
        median = float(torch.tensor(times[name]).median())
        rows.append([name, f"{median:.2f}", dense, ours, f"{saved[name]:.1f}", *errors])
    header = "forward + backward, median ms, dense / it [90 %], it / ours [90 %], saved MB, error y, error dx"
    print_table(header.split(", "), rows)
    for name, variant in usable.items():
        if getattr(variant.module, "zero_computation", None) is not None and EVEN in usable:
            faster, kinds = ratio_of_medians(times[EVEN], times[name]), variant.module.kinds
            print(f"{name}: {faster} times as fast as without the others; {kinds.total / kinds.ffn:.2f} is the limit")


def saved_megabytes(variant: Variant, hidden: Tensor) -> float:
    """Bytes that autograd keeps between forward and backward: unique storages, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in variant.module.parameters()}
    storages: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            # The tensor is kept, so that no other can take its address while we count.
            storages[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        variant.forward(hidden)
    return sum(size for _, size in storages.values()) / 1e6


def busiest_over_mean(variant: Variant, hidden: Tensor) -> float:
    layer = variant.module
    assert isinstance(layer, MoELayer)
    position = torch.arange(len(hidden), device=hidden.device)
    context = RoutingContext(torch.ones_like(position, dtype=torch.bool), position, 1, seed=0, step=0)
    with torch.no_grad():
        load = layer.router(hidden, context).use.tokens_per_expert
    return float(load.max() / load.mean())


def relative_error(value: Tensor, reference: Tensor) -> float:
    difference = value.double() - reference.double()
    return float(difference.norm() / reference.double().norm())


if __name__ == "__main__":
    main()
