import pytest

from moe_pretrain.schedule.batch_plan import BatchConfig, BatchPlan, plan_batches


def plan_of(tokens: int, micro: int | None, world: int) -> BatchPlan:
    return plan_batches(BatchConfig(tokens, micro), sequence_length=12, world_size=world, num_steps=11)


@pytest.mark.parametrize(
    "tokens,micro,world,accumulation",
    [
        (96, 2, 1, 4),
        (96, 2, 2, 2),
        (96, 8, 1, 1),
        (96, 1, 4, 2),
        (1200, 1, 1, 100),
        (96, None, 4, 1),
    ],
)
def test_plan(tokens: int, micro: int, world: int, accumulation: int):
    plan = plan_of(tokens, micro, world)
    assert (plan.accumulation, plan.num_steps, plan.rows_per_step) == (accumulation, 11, tokens // 12)
    assert plan.accumulation * plan.micro_batch_size * world == plan.rows_per_step


def test_indivisible_batch_names_the_nearest_values():
    with pytest.raises(ValueError, match=r"batch.global_batch_tokens=100 must be .* nearest: 96 or 120"):
        plan_of(100, 1, 2)
    with pytest.raises(ValueError, match=r"multiple of 24 = model.sequence_length=12 \* 2 ranks"):
        plan_of(100, None, 2)
    with pytest.raises(ValueError, match=r"nearest: 24$"):
        plan_of(10, 1, 2)
