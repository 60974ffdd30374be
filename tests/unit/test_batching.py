import pytest

from moe_pretrain.batching import BatchConfig, plan_batches


def config(global_batch_tokens: int, micro_batch_size: int | None, total_tokens: int = 1000) -> BatchConfig:
    return BatchConfig(global_batch_tokens, micro_batch_size, total_tokens)


@pytest.mark.parametrize(
    "tokens,micro,world,accumulation,steps",
    [
        (96, 2, 1, 4, 11),
        (96, 2, 2, 2, 11),
        (96, 8, 1, 1, 11),
        (96, 1, 4, 2, 11),
        (1200, 1, 1, 100, 1),
        (96, None, 4, 1, 11),
    ],
)
def test_plan(tokens: int, micro: int, world: int, accumulation: int, steps: int):
    plan = plan_batches(config(tokens, micro), sequence_length=12, world_size=world)
    assert (plan.accumulation, plan.num_steps, plan.rows_per_step) == (accumulation, steps, tokens // 12)
    assert plan.accumulation * plan.micro_batch_size * world == plan.rows_per_step


def test_indivisible_batch_names_the_nearest_values():
    with pytest.raises(ValueError, match=r"batch.global_batch_tokens=100 must be .* nearest: 96 or 120"):
        plan_batches(config(100, 1), sequence_length=12, world_size=2)
    with pytest.raises(ValueError, match=r"multiple of 24 = model.sequence_length=12 \* 2 ranks"):
        plan_batches(config(100, None), sequence_length=12, world_size=2)
    with pytest.raises(ValueError, match=r"nearest: 24$"):
        plan_batches(config(10, 1), sequence_length=12, world_size=2)
