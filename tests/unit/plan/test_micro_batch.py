"""``batch.micro_batch_size=auto``: what fits, what a run keeps of it, and who refuses it."""

from pathlib import Path

import pytest
import torch

from moe_pretrain import cli
from moe_pretrain.commands import train
from moe_pretrain.config.load import load
from moe_pretrain.config.schema import to_values
from moe_pretrain.plan.memory import memory_per_rank
from moe_pretrain.plan.micro_batch import with_largest_micro_batch
from moe_pretrain.run_folder.provenance import write_config
from moe_pretrain.schedule.batch_plan import plan_batches

AUTO = "batch.micro_batch_size=auto"
TARGET = ("cuda", "bfloat16")
GIB = 2**30


@pytest.mark.parametrize(("ranks", "rows", "room"), [(8, 96, 30), (2, 96, 30), (1, 7, 19), (8, 96, 1000)])
def test_it_is_the_most_rows_that_divide_and_fit(ranks: int, rows: int, room: float):
    """96 rows have divisors that are no powers of two; on two ranks the optimizer leaves less room."""
    words = ["model=700m", f"parallel.processes={ranks}", f"batch.global_batch_tokens={rows * ranks * 2048}"]
    chosen = with_largest_micro_batch(load([*words, AUTO]), ranks, TARGET, room * GIB).batch.micro_batch_size

    def needed(size: int) -> float:
        config = load([*words, f"batch.micro_batch_size={size}"])
        return memory_per_rank(config, *TARGET, plan_batches(config.batch, 2048, ranks, 1), ranks, 1.5).total

    divisors = [size for size in range(1, rows + 1) if rows % size == 0]
    assert chosen == max(size for size in divisors if needed(size) <= room * GIB)
    assert (chosen == rows) == (room == 1000)


def test_where_not_one_row_fits_the_error_says_what_one_needs():
    with pytest.raises(
        ValueError,
        match=r"^batch.micro_batch_size=auto: not even one row of model.sequence_length=2048 fits: a rank "
        r"needs 78\.\d GiB and may fill 70.0; more ranks, engine.zero_stage=2 or model.recompute=full",
    ):
        with_largest_micro_batch(load(["model=4b", AUTO]), 1, TARGET, 70 * GIB)


@pytest.fixture
def gpu_of(monkeypatch: pytest.MonkeyPatch):
    """A machine with two GPUs, the second of which has so many GiB, the first one more."""

    def make(gib: float) -> None:
        class Properties:
            def __init__(self, index: int):
                self.total_memory = (gib + 1 - index) * GIB

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)

    return make


def test_a_run_gets_a_number_and_keeps_it(gpu_of, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Of the smallest GPU here; started again on others, with the same words, it goes on with its own."""
    words = ["model=700m", "run.name=one", f"run.output_dir={tmp_path}"]
    gpu_of(40)
    (*_, found) = own = train.with_micro_batch([*words, AUTO], load([*words, AUTO]), 8)
    room = 0.92 * 40 * GIB
    expected = with_largest_micro_batch(load([*words, AUTO]), 8, TARGET, room).batch.micro_batch_size
    assert own == [*words, f"batch.micro_batch_size={expected}"] and expected > 1
    assert (
        capsys.readouterr().out == f"batch.micro_batch_size=auto is {expected}: the most rows that are planned to fit\n"
    )
    gpu_of(80)
    assert train.with_micro_batch([*words, AUTO], load([*words, AUTO]), 8)[-1] != found
    (tmp_path / "one").mkdir()
    write_config(tmp_path / "one", to_values(load(own)))
    assert train.with_micro_batch([*words, AUTO], load([*words, AUTO]), 8)[-1] == found
    # On so many ranks no whole number of such micro-batches is left of a step.
    ranks = 2048 // expected * 2
    assert train.with_micro_batch([*words, AUTO], load([*words, AUTO]), ranks)[-1] != found


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["train"], "batch.micro_batch_size=auto must be a number or null on a CPU"),
        (["plan"], "batch.micro_batch_size=auto must be a number or null on a CPU"),
        (["train", "--multirun", "seed=1,2"], "batch.micro_batch_size=auto must be a number here: only a single"),
        (["verify"], "batch.micro_batch_size=auto must be a number here: only a single"),
    ],
    ids=str,
)
def test_who_cannot_say_what_fits_refuses_it(
    words: list[str], error: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    place = [AUTO, "engine.device=cpu", f"run.output_dir={tmp_path}", "metrics.wandb=off"]
    assert cli.main([*words, *place]) == cli.USAGE_CODE
    assert error in capsys.readouterr().err and not list(tmp_path.iterdir())
