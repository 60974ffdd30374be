"""Topologies that cannot work are refused in one line before any process starts."""

from collections.abc import Sequence

import pytest

from moe_pretrain import cli
from moe_pretrain.parallel import launcher as launch

SMALL = ("engine.device=cpu", "batch.global_batch_tokens=24576", "batch.micro_batch_size=1")


@pytest.fixture(autouse=True)
def _no_process_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(arguments: Sequence[str], processes: int) -> int:
        raise AssertionError(f"{processes} processes were started with {arguments}")

    monkeypatch.setattr(launch, "run_workers", refuse)


@pytest.mark.parametrize("command", ["train", "verify"])
@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (
            ("parallel.processes=4", "parallel.expert_parallel_size=4", "model.moe.num_experts=6"),
            "parallel.expert_parallel_size=4 must divide model.moe.num_experts=6; valid: [1, 2]",
        ),
        (
            ("parallel.processes=2", "parallel.expert_parallel_size=4"),
            "parallel.expert_parallel_size=4 must divide the number of ranks=2; valid: [1, 2]",
        ),
        (
            ("parallel.processes=3", "parallel.expert_parallel_size=2"),
            "parallel.expert_parallel_size=2 must divide the number of ranks=3; valid: [1, 3]",
        ),
        (
            ("parallel.processes=2", "parallel.expert_parallel_size=2", "router=dense"),
            "parallel.expert_parallel_size=2 must be 1: router=dense",
        ),
        (("parallel.processes=0",), "parallel.processes=0 must be at least 1"),
        (
            ("engine.zero_stage=3",),
            "engine.zero_stage=3 must be 0, 1 or 2, or auto: DeepSpeed refuses custom MoE layers",
        ),
        (
            ("parallel.processes=2", "engine.zero_stage=0", "engine.dtype=bfloat16"),
            "engine.zero_stage=0 must be 1 or 2 with engine.dtype=bfloat16",
        ),
        (
            ("engine.determinism=elastic", "engine.dtype=bfloat16"),
            "engine.device=cpu engine.dtype=bfloat16 must be cpu and float32 with engine.determinism=elastic",
        ),
        (
            ("engine.determinism=elastic", "batch.micro_batch_size=null"),
            "batch.micro_batch_size=null must be a number with engine.determinism=elastic",
        ),
        (
            ("engine.determinism=elastic", "parallel.processes=3"),
            "the number of ranks=3 must be a power of two with engine.determinism=elastic",
        ),
        (
            ("engine.determinism=elastic", "batch.global_batch_tokens=12288", "parallel.processes=2"),
            "the number of micro-batches in batch.global_batch_tokens=48 must be a power of two",
        ),
        (
            ("engine.determinism=elastic", "router=attentive", "batch.global_batch_tokens=16384"),
            "router=attentive must be another with engine.determinism=elastic",
        ),
        (
            (
                *("engine.determinism=elastic", "router=autonomy", "batch.global_batch_tokens=16384"),
                "router.gate_activation=recomputed",
            ),
            "set router.gate_activation=travels",
        ),
        (("parallel.processes=5",), "batch.global_batch_tokens=24576 must be a multiple of 1280"),
    ],
)
def test_refused_in_one_line(
    command: str,
    overrides: tuple[str, ...],
    named: str,
    capfd: pytest.CaptureFixture[str],
    tmp_path: object,
) -> None:
    code = cli.main([command, *SMALL, f"run.output_dir={tmp_path}", *overrides])
    error = capfd.readouterr().err.strip().splitlines()
    assert code == cli.USAGE_CODE
    assert len(error) == 1 and named in error[0], error
