"""The position in a stream that a checkpoint keeps: whatever stands there, one line."""

import math
from typing import Any

import pytest

from moe_pretrain.data.stream.rows import _check_cursor

GOOD = {
    **{"epoch": 0, "window": 1, "shard": 2, "tokens": 300, "rows": 7, "state": {"a": 1}, "epoch_rows": None},
    **{"epoch_shards": None, "checksums": ["x", None], "settings": {"shard_bytes": 9}},
}
WRONG: list[tuple[str, Any]] = [
    *((name, value) for name in ("epoch", "window", "shard", "tokens") for value in (None, -1, 1.0, "1", True, 2**60)),
    *((name, value) for name in ("rows", "epoch_rows", "epoch_shards") for value in (-1, 0.5, "1", False, math.nan)),
    *((name, 0) for name in ("epoch_rows", "epoch_shards")),
    *(("state", value) for value in ([], "x", 1)),
    *(("checksums", value) for value in (None, "x", [1], {"0": "x"})),
    *(("settings", value) for value in (None, [], "x")),
]


def test_a_good_one_passes() -> None:
    _check_cursor(GOOD)
    _check_cursor({**GOOD, "epoch": 2, "epoch_rows": 40, "epoch_shards": 4, "rows": None, "state": None})


@pytest.mark.parametrize("name,value", WRONG)
def test_a_wrong_field_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^state\.stream\.{name}="):
        _check_cursor({**GOOD, name: value})
    with pytest.raises(ValueError, match=r"^state\.stream\.epoch_rows=None"):
        _check_cursor({**GOOD, "epoch": 1})
