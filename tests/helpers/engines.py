"""Engines and batches for tests that run on ranks."""

import torch

from moe_pretrain.config.schema import Config
from moe_pretrain.data.rows.micro_batch import MicroBatch, build_micro_batch
from moe_pretrain.engine.engine import TrainEngine
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.parallel.deepspeed_moe import prepare_experts
from moe_pretrain.parallel.mesh import build_mesh
from moe_pretrain.schedule.batch_plan import plan_batches


def build_engine(config: Config) -> TrainEngine:
    """What ``pretrain.train`` builds, on the CPU."""
    mesh = build_mesh(config.parallel, "cpu")
    plan = plan_batches(config.batch, config.model.sequence_length, mesh.world_size, config.num_steps)
    model = DecoderLM(config.model, config.router, mesh.shard)
    initialise(model, config.seed)
    parallel = config.parallel
    prepare_experts(model, parallel.expert_parallel_size, parallel.overlaps_exchange(mesh.device.type))
    assert config.engine.dtype != "auto"
    return TrainEngine(
        model,
        config.engine,
        config.engine.dtype,
        config.optimizer,
        lambda step: config.schedule.factor(step, plan.num_steps),
        plan,
        mesh,
        config.seed,
    )


def random_batches(engine: TrainEngine, step: int) -> list[MicroBatch]:
    """This rank's micro-batches of ``step``: random tokens that depend on the position alone."""
    plan, mesh = engine._plan, engine.mesh
    length = engine.model.config.sequence_length
    own = plan.rows_per_step // mesh.world_size
    first = step * plan.rows_per_step + mesh.rank * own
    batches = []
    for start in range(first, first + own, plan.micro_batch_size):
        positions = torch.arange(start, start + plan.micro_batch_size)
        rows = []
        for position in positions.tolist():
            generator = torch.Generator().manual_seed(position)
            rows.append(torch.randint(0, engine.model.config.vocab_size, (length + 1,), generator=generator))
        tokens = torch.stack(rows)
        starts = torch.zeros_like(tokens, dtype=torch.bool)
        starts[:, 0] = starts[:, length // 3] = True
        batches.append(build_micro_batch(tokens.numpy(), starts.numpy(), positions.numpy(), True))
    return batches
