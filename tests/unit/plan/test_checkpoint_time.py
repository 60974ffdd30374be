"""The plan of a checkpoint against what ranks stage, and what it says of the time."""

import pytest
from helpers.engines import build_engine, random_batches
from helpers.processes import run_on_ranks

from moe_pretrain.checkpoint.host_copy import Staging
from moe_pretrain.cli import main
from moe_pretrain.config.load import load
from moe_pretrain.plan.checkpoint_time import Storage, checkpoint_time
from moe_pretrain.plan.local_parameters import local_parameters

SMALL = [
    *("model.vocab_size=512", "tokenizer.vocab_size=300", "model.sequence_length=64", "model.num_layers=2"),
    *("model.hidden_size=64", "model.moe.expert_hidden_size=128", "model.moe.num_experts=4"),
    *("batch.micro_batch_size=2", "engine.device=cpu", "engine.dtype=float32", "engine.check_every_steps=0"),
]


def staged_bytes(overrides: list[str]) -> int:
    """Bytes that this rank saves after a step."""
    engine = build_engine(load(overrides))
    engine.step(0, random_batches(engine, 0))
    return len(Staging(engine).fill().content)


@pytest.mark.parametrize(
    ("ranks", "expert_parallel", "stage"), [(1, 1, 0), (2, 1, 0), (2, 2, 0), (2, 1, 1), (2, 2, 2), (4, 2, 1)]
)
def test_bytes_are_those_that_ranks_stage(ranks: int, expert_parallel: int, stage: int):
    overrides = [
        *SMALL,
        *(f"parallel.processes={ranks}", f"parallel.expert_parallel_size={expert_parallel}"),
        *(f"engine.zero_stage={stage}", f"batch.global_batch_tokens={128 * ranks}"),
    ]
    config = load(overrides)
    storage = Storage(host_link=1e3, disk=1e2)
    found = checkpoint_time(config, ranks, local_parameters(config), storage)
    staged = run_on_ranks(staged_bytes, ranks, overrides)
    if stage:
        assert found.rank_bytes * ranks == pytest.approx(sum(staged), rel=0.01)
    else:
        assert found.rank_bytes == pytest.approx(max(staged), rel=0.01)
    assert found.staged == found.rank_bytes / 1e3
    assert found.written == pytest.approx(sum(staged) / 1e2, rel=0.01), "all ranks are of one node"


def test_ranks_of_other_nodes_write_to_disks_of_their_own():
    config = load([*SMALL, "parallel.processes=4", "engine.zero_stage=1"])
    one, two = (checkpoint_time(config, 4, local_parameters(config), Storage(gpus_per_node=n)) for n in (4, 2))
    assert two.written == one.written / 2 and two.staged == one.staged


def test_training_waits_for_a_disk_that_is_slower_than_the_interval(capsys):
    words = ["plan", "model=700m", "parallel.processes=8", "--mfu=0.5", "checkpoint.every_steps=10"]
    assert main([*words, "--disk=0.1"]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("checkpoint every")]
    # 12 bytes for each of 758M parameters at 0.1 GB/s are 91 s; ten steps are 15 s.
    assert "checkpoint every 10 steps (0:15): training waits 76 s (83" in line and line.endswith("THAN THE NEXT COMES")
    assert main([*words, "checkpoint.asynchronous=false"]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("checkpoint every")]
    assert "training waits 4.6 s" in line and line.endswith("for which training waits too")
