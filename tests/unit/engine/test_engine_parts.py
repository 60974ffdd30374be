import math

import pytest
import torch

from moe_pretrain.config.load import load
from moe_pretrain.engine.deepspeed_config import Dtype, EngineConfig, deepspeed_config
from moe_pretrain.engine.micro_batch import GlobalCounts, micro_batch_loss
from moe_pretrain.engine.optimizers.base import parameter_groups
from moe_pretrain.model.decoder import DecoderLM, LMOutput
from moe_pretrain.moe.types import ExpertShard
from moe_pretrain.parallel.deepspeed_moe import is_expert, prepare_experts
from moe_pretrain.schedule.learning_rate import CosineScheduleConfig, WarmupStableDecayScheduleConfig


def test_cosine_schedule():
    schedule = CosineScheduleConfig("cosine", warmup_steps=4, floor=0.1)
    values = [schedule.factor(step, 14) for step in range(14)]
    assert values[:4] == [0.25, 0.5, 0.75, 1.0]
    assert values[8] == pytest.approx(0.1 + 0.9 * 0.5)  # half way down
    assert values[13] == pytest.approx(0.1)
    assert values[4:] == sorted(values[4:], reverse=True)


def test_warmup_stable_decay_schedule():
    schedule = WarmupStableDecayScheduleConfig("warmup_stable_decay", warmup_steps=2, decay_fraction=0.4, floor=0.0)
    values = [schedule.factor(step, 10) for step in range(10)]
    assert values == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.0])


def engine_config(**changes: object) -> EngineConfig:
    fields = dict(
        device="cpu",
        dtype="float32",
        zero_stage=1,
        gradient_clipping=0.5,
        reduce_bucket_elements=1000,
        check_every_steps=0,
        max_skipped_steps=3,
        determinism="topology",
    )
    return EngineConfig(**{**fields, **changes})


@pytest.mark.parametrize("zero_stage,clipping", [(0, 0.0), (1, 0.5), (2, 0.5)])
def test_deepspeed_dictionary(zero_stage: int, clipping: float):
    values = deepspeed_config(engine_config(zero_stage=zero_stage), "float32", 2, 4, 8)
    assert values["train_batch_size"] == 64
    # Stage 0 clips wrongly in DeepSpeed, so there it must not clip at all.
    assert values["gradient_clipping"] == clipping
    assert values["zero_optimization"]["stage"] == zero_stage
    assert values["data_types"] == {"grad_accum_dtype": "fp32"} and values["communication_data_type"] == "fp32"


@pytest.mark.parametrize("dtype,ranks,stage", [("float32", 1, 0), ("float32", 2, 1), ("bfloat16", 1, 1)])
def test_state_is_cut_up_where_there_is_someone_to_share_it_with(dtype: Dtype, ranks: int, stage: int):
    assert engine_config(zero_stage="auto").stage(dtype, ranks) == stage
    assert engine_config(zero_stage=2).stage(dtype, ranks) == 2


def test_objective_weights_tokens_not_micro_batches():
    """Shares of unequal micro-batches sum to the global batch's loss."""
    counts = GlobalCounts(labels=10, tokens=12)
    parts = []
    for loss_sum, aux, tokens in ((6.0, 2.0, 3), (14.0, 4.0, 9)):
        output = LMOutput(torch.tensor(loss_sum), {"load_balance": torch.tensor(aux)}, [])
        parts.append(micro_batch_loss(output, {"load_balance": 0.5}, tokens, counts))
    expected = (6 + 14) / 10 + 0.5 * (2.0 * 3 + 4.0 * 9) / 12
    assert math.isclose(float(sum(parts)), expected, rel_tol=1e-6)


def test_objective_leaves_out_losses_of_weight_zero():
    value = torch.tensor(float("nan"))
    output = LMOutput(torch.tensor(1.0), {"load_balance": value}, [])
    assert float(micro_batch_loss(output, {"load_balance": 0.0}, 1, GlobalCounts(1, 1))) == 1.0


def test_parameter_groups_hold_every_parameter_once():
    config = load(["model.moe.num_leading_dense_layers=1", "model.moe.num_shared_experts=1"])
    model = DecoderLM(config.model, config.router, ExpertShard())
    prepare_experts(model, 1)
    groups = parameter_groups(model, config.optimizer)
    held = [parameter for group in groups for parameter in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()} and len(held) == len(list(model.parameters()))
    for group in groups:
        assert len({is_expert(p) for p in group["params"]}) == 1, "experts need a group of their own"
        assert len({p.ndim >= 2 for p in group["params"]}) == 1
        assert (group["weight_decay"] > 0) == (group["params"][0].ndim >= 2)
    assert sum(is_expert(p) for p in held) == 2 * 3
