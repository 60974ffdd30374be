"""A user's configuration shrunk to a size that the oracle can follow."""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from moe_pretrain.config.preflight import RunPlan
from moe_pretrain.config.schema import Config
from moe_pretrain.data.rows.micro_batch import PADDING_POSITION, MicroBatch, build_micro_batch
from moe_pretrain.model.init import REFERENCE_WIDTH
from moe_pretrain.moe.build import expert_gate
from moe_pretrain.schedule.batch_plan import BatchPlan

NUM_STEPS = 3


def shrink(config: Config, plan: RunPlan) -> Config:
    """The same configuration, whose plan is ``plan``, in the smallest shape that still has every one of its parts."""
    model, moe, batches = config.model, config.model.moe, plan.batches
    leading = min(1, moe.num_leading_dense_layers)
    kept = config.router.twin_layers(model.moe_layers)
    # One MoE layer is two in the twin, the second as the first.
    num_layers = min(model.num_layers, leading + max(1, len(kept) - 1) * moe.every_k_layers + 1)
    heads_per_key_value = model.num_heads // model.num_key_value_heads
    heads = heads_per_key_value * min(2, model.num_key_value_heads)
    sequence, micro_batch_size = 12, min(2, batches.micro_batch_size)
    tokens = sequence * micro_batch_size * batches.accumulation * plan.world_size
    small_moe = replace(moe, expert_hidden_size=24, shared_expert_hidden_size=16, num_leading_dense_layers=leading)
    size = 16 if plan.device == "cuda" else 8  # the kernels of attention on CUDA take no smaller heads
    if moe.latent_size is not None:
        small_moe = replace(small_moe, latent_size=heads * size // 2)
    in_twin = [layer for layer in range(num_layers) if small_moe.is_moe_layer(layer)]
    places = {layer: kept[min(index, len(kept) - 1)] for index, layer in enumerate(in_twin) if kept}
    router = config.router.renumbered(places).for_sequence_length(sequence)
    rank = expert_gate(moe, router)
    if rank is not None:
        small_rank = min(heads * 4, rank)
        if moe.gate_rank is None:
            router = router.with_parts(lambda scheme: _with_gate_rank(scheme, small_rank))
        else:
            small_moe = replace(small_moe, gate_rank=small_rank)
    small_model = replace(
        model,
        vocab_size=264,  # a learnt tokenizer has at least 257 tokens, and the configuration is checked against it
        sequence_length=sequence,
        num_layers=num_layers,
        hidden_size=heads * size,
        num_heads=heads,
        head_size=None if model.head_size is None else 32 if plan.device == "cuda" else 12,
        num_key_value_heads=heads // heads_per_key_value,
        ffn_hidden_size=28,
        cross_entropy_chunk_tokens=5,
        # Large enough that every part contributes visibly to the loss at this width.
        init="normal",
        init_std=0.2,
        moe=small_moe,
    )
    if model.init == "mup":  # the same spread, and no rate that is another's
        small_model = replace(
            small_model,
            init="mup",
            init_std=0.2 * math.sqrt(small_model.hidden_size / REFERENCE_WIDTH),
            mup_base_width=small_model.hidden_size // 2,
            mup_base_layers=2 * small_model.num_layers,
        )
    return replace(
        config,
        model=small_model,
        router=router,
        tokenizer=replace(config.tokenizer, vocab_size=min(257, config.tokenizer.vocab_size)),
        batch=replace(
            config.batch,
            micro_batch_size=micro_batch_size,
            global_batch_tokens=tokens,
        ),
        budget=replace(config.budget, tokens=tokens * NUM_STEPS, flops=None),
        # A full-size step, so that a wrong update shows.
        optimizer=replace(config.optimizer.conditioned(), learning_rate=1e-2),
        schedule=replace(config.schedule, warmup_steps=0),
        engine=replace(config.engine, check_every_steps=1),
    )


def _with_gate_rank(scheme: Any, rank: int) -> Any:
    return replace(scheme, gate_rank=rank)


def random_batches(config: Config, plan: BatchPlan, seed: int = 0) -> list[list[MicroBatch]]:
    """All micro-batches of each of ``NUM_STEPS`` steps, in rank order: several documents per row, some rows padding.

    Which row is padding is drawn too, so ranks and micro-batches have different numbers of counted labels.
    """
    length, size = config.model.sequence_length + 1, plan.micro_batch_size
    random = np.random.default_rng(seed)
    steps = []
    for step in range(NUM_STEPS):
        rows = plan.rows_per_step
        tokens = random.integers(0, config.model.vocab_size, (rows, length))
        starts = random.random((rows, length)) < random.random((rows, 1)) * 0.5
        starts[:, 0] = False
        positions = np.arange(rows) + step * rows
        if rows > 1:
            positions[random.permutation(rows)[: max(1, rows // 5)]] = PADDING_POSITION
        cuts = [slice(first, first + size) for first in range(0, rows, size)]
        packing = (config.packing.isolate_documents, config.packing.reset_positions)
        steps.append([build_micro_batch(tokens[cut], starts[cut], positions[cut], *packing) for cut in cuts])
    return steps
