"""Checks before anything expensive: what can be refused without a process group or a corpus."""

from pathlib import Path

import torch

from moe_pretrain.checkpoint.store import locate
from moe_pretrain.config.schema import Config
from moe_pretrain.engine.deepspeed_config import Dtype, EngineConfig
from moe_pretrain.engine.elastic import check_elastic
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.moe.build import num_routed_experts, width_problems
from moe_pretrain.moe.types import ExpertShard
from moe_pretrain.schedule.batch_plan import plan_batches


def check(config: Config, world_size: int) -> None:
    """Everything that can be refused before a process group or a corpus exists.

    Raises:
        ValueError: One line naming the field.
    """
    plan = plan_batches(config.batch, config.model.sequence_length, world_size, config.num_steps)
    moe = config.model.moe
    config.parallel.check(world_size, num_routed_experts(moe, config.router))
    if config.checkpoint.warm_start is not None:
        locate(Path(config.checkpoint.warm_start))
    if config.optimizer.trainable == "routers":
        with torch.device("meta"):
            model = DecoderLM(config.model, config.router, ExpertShard())
        if not any(list(layer.router.parameters()) for layer in model.moe_layers()):
            raise ValueError(f"optimizer.trainable=routers must be all with router={config.router.name}: no weights")
    device, dtype = resolve_device(config.engine)
    if dtype == "bfloat16" and config.engine.zero_stage == 0:
        raise ValueError("engine.zero_stage=0 must be 1 or 2 with engine.dtype=bfloat16")
    if config.engine.determinism == "elastic":
        check_elastic(config.model, config.router, config.batch, plan, world_size, device, dtype)
    if device == "cuda" and dtype == "bfloat16":
        for problem in width_problems(moe, config.router, config.model.hidden_size):
            raise ValueError(problem)


def resolve_device(config: EngineConfig) -> tuple[str, Dtype]:
    """``auto`` to what this machine has: a GPU with bfloat16, else the CPU with float32."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("engine.device=cuda must be auto or cpu: torch finds no CUDA device")
    if config.dtype == "auto":
        return device, "bfloat16" if device == "cuda" else "float32"
    return device, config.dtype
