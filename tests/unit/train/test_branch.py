"""What a branch leaves in the run that it leaves."""

from pathlib import Path

import pytest

from moe_pretrain.run_folder.metrics_file import JsonlSink, read_rows
from moe_pretrain.train.branch import Branch, record_in_trunk


@pytest.mark.parametrize(("first", "clock"), [(3, (5.0, 1)), (10, (0, 0))], ids=["behind a row", "before every row"])
def test_a_trunk_is_told_with_all_that_a_row_has(tmp_path: Path, first: int, clock: tuple[float, int]):
    """Without it the trunk could not be resumed: what its metrics go on from is read from all rows."""
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    for step, seconds, attempt in ((first, 5.0, 1), (20, 9.0, 2)):
        own = {"step": step, "tokens": step * 100, "seconds": seconds, "attempt": attempt}
        sink.write({"kind": "train", **own, "train/loss": 3.0})
    sink.close()
    assert record_in_trunk(Branch(tmp_path, 4), Path("branch"), 400, print) == ""
    row = read_rows(tmp_path / "metrics.jsonl")[-1]
    assert (row["event"], row["step"], row["tokens"]) == ("branched_off", 4, 400)
    assert (row["seconds"], row["attempt"]) == clock
