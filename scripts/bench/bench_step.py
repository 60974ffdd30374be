"""Times whole training steps (forward, backward, clipping, AdamW) against a dense twin and against transformers.

    python scripts/bench/bench_step.py                                         # the tiny model on a CPU
    python scripts/bench/bench_step.py model=700m batch.micro_batch_size=8 batch.global_batch_tokens=16384
    python scripts/bench/bench_step.py router=uniform                          # every expert the same load

Words of the form ``key=value`` are the overrides of ``moe-pretrain train``. All variants take the same batch of random
tokens, each row one document. The dense twin is the same model with ``router=dense``, of equal active size. The
transformers model is a Mixtral of the same shape with grouped experts, SDPA, its own balance loss and torch's fused
AdamW; in bfloat16 it has no float32 master weights, so it does less work than ours there.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from bench_tools import device_name, interleave, print_table, ratio_of_medians
from torch import nn

from moe_pretrain.config.load import load
from moe_pretrain.config.preflight import plan_run
from moe_pretrain.config.schema import Config
from moe_pretrain.data.rows.micro_batch import MicroBatch, build_micro_batch
from moe_pretrain.engine.engine import TrainEngine
from moe_pretrain.metrics.throughput import model_flops_utilization, peak_flops_per_second
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.model.size import model_size
from moe_pretrain.parallel.deepspeed_moe import prepare_experts
from moe_pretrain.parallel.mesh import Mesh, build_mesh
from moe_pretrain.parallel.rendezvous import launched_world_size
from moe_pretrain.schedule.batch_plan import BatchPlan
from moe_pretrain.system.cpu import keep_freed_memory

OURS, DENSE, PEER = "moe_pretrain", "dense twin", "transformers Mixtral"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="key=value, as for moe-pretrain train")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu-clock", action="store_true", help="one thread, processor time instead of wall time")
    parser.add_argument("--only", default=f"{OURS},{DENSE},{PEER}", help="variants, comma-separated")
    options = parser.parse_args()

    config = load([*options.overrides, "engine.check_every_steps=0"])
    run = plan_run(config, launched_world_size() or 1)
    device_type, dtype, plan = run.device, run.dtype, run.batches
    if device_type == "cpu":
        keep_freed_memory()
    if options.cpu_clock:
        torch.set_num_threads(1)
    torch.manual_seed(0)
    mesh = build_mesh(config.parallel, device_type)
    batches = make_batches(config, plan)
    builders: dict[str, Callable[[], Callable[[], object]]] = {
        OURS: lambda: build_engine(config, dtype, plan, mesh, batches),
        DENSE: lambda: build_engine(dense_twin(options.overrides, config), dtype, plan, mesh, batches),
        PEER: lambda: build_peer(config, getattr(torch, dtype), mesh.device, batches),
    }
    variants = {name: builders[name]() for name in options.only.split(",")}
    times = interleave(variants, options.rounds, 2, mesh.device, lambda: None, options.cpu_clock)

    stage = config.engine.stage(dtype, run.world_size)
    print(
        f"\n{device_name(mesh.device)}, torch {torch.__version__}: model={config.model.name} "
        f"router={config.router.name}, recompute {config.model.recompute}, {dtype}, ZeRO {stage}; "
        f"{plan.tokens_per_step} tokens per step in {plan.accumulation} micro-batches; {options.rounds} rounds"
    )
    peak = peak_flops_per_second(device_name(mesh.device)) if device_type == "cuda" else None
    flops = {
        OURS: model_size(config.model, config.router).training_flops_per_token,
        DENSE: model_size(config.model, dense_twin(options.overrides, config).router).training_flops_per_token,
    }
    flops[PEER] = flops[OURS]
    rows = []
    for name in variants:
        median = float(np.median(times[name]))
        tokens_per_second = plan.tokens_per_step / median * 1e3
        ratio = ratio_of_medians(times[name], times[OURS]) if OURS in times else "-"
        utilization = f"{model_flops_utilization(flops[name], tokens_per_second, 1, peak):.1%}" if peak else "-"
        rows.append([name, f"{median:.1f}", f"{tokens_per_second:,.0f}", ratio, utilization])
    print_table(["training step", "median ms", "tokens/s", "tokens/s of ours / its [90 %]", "MFU"], rows)


def make_batches(config: Config, plan: BatchPlan) -> list[MicroBatch]:
    random = np.random.default_rng(0)
    shape = (plan.micro_batch_size, config.model.sequence_length + 1)
    return [
        build_micro_batch(
            random.integers(0, config.model.vocab_size, shape),
            np.zeros(shape, dtype=bool),
            np.arange(plan.micro_batch_size) + index * plan.micro_batch_size,
            isolate_documents=True,
        )
        for index in range(plan.accumulation)
    ]


def dense_twin(overrides: list[str], config: Config) -> Config:
    """The same run without routing, as wide as the experts that one token uses."""
    if config.router.dense_experts:
        return config
    others = [override for override in overrides if not override.startswith("router")]
    active = round(config.router.mean_experts_per_token)
    return load([*others, "router=dense", f"router.active_experts={active}", "engine.check_every_steps=0"])


def build_engine(
    config: Config, dtype: str, plan: BatchPlan, mesh: Mesh, batches: list[MicroBatch]
) -> Callable[[], object]:
    model = DecoderLM(config.model, config.router, mesh.shard)
    initialise(model, config.seed)
    parallel = config.parallel
    prepare_experts(model, parallel.expert_parallel_size, parallel.overlaps_exchange(mesh.device.type))
    engine = TrainEngine(model, config.engine, dtype, config.optimizer, lambda step: 0.1, plan, mesh, config.seed)
    return lambda: engine.step(1, batches)


def build_peer(
    config: Config, dtype: torch.dtype, device: torch.device, batches: list[MicroBatch]
) -> Callable[[], object]:
    from transformers import MixtralConfig, MixtralForCausalLM

    shape, moe = config.model, config.model.moe
    if config.router.dense_experts or moe.shared_width or len(shape.moe_layers) != shape.num_layers:
        raise SystemExit("a Mixtral has no dense layers and no shared experts; leave it out with --only")
    settings = MixtralConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=moe.expert_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        max_position_embeddings=shape.sequence_length,
        num_local_experts=moe.num_experts,
        num_experts_per_tok=round(config.router.mean_experts_per_token),
        tie_word_embeddings=shape.tie_embeddings,
        rms_norm_eps=shape.norm_epsilon,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        use_cache=False,
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
    )
    with torch.device(device):
        model = MixtralForCausalLM(settings).to(dtype).train()
    if shape.recompute == "full":
        model.gradient_checkpointing_enable()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> float:
        total = 0.0
        for batch in batches:
            ids = batch.input_ids.to(device)
            loss = model(input_ids=ids, labels=ids).loss / len(batches)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return float(total)

    return step


if __name__ == "__main__":
    main()
