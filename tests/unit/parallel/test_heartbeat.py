"""What a watcher says of silent ranks, and where ranks meet; the ranks themselves are in tests/integration."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from moe_pretrain.parallel.config import ParallelConfig
from moe_pretrain.parallel.heartbeat import Heartbeat
from moe_pretrain.parallel.rendezvous import Rendezvous, interface_towards, meet

PLACE = {"phase": "train.step", "step": 7, "ended": False, "failure": None}


@pytest.fixture
def watcher(tmp_path: Path) -> Heartbeat:
    """Rank 0 of 5, which watches rank 1; ranks 2 and 3 are on another host, and 4 has finished."""
    watcher = Heartbeat(Rendezvous(dist.HashStore(), 0, 5), tmp_path, limit_seconds=10.0)
    watcher._store = dist.HashStore()
    for rank, host in enumerate(("host-a", "host-a", "host-b", "host-b", "host-b")):
        publish(watcher, rank, {"host": host, "count": 1, **PLACE, "ended": rank == 4})
    return watcher


def publish(watcher: Heartbeat, rank: int, sign: dict) -> None:
    watcher._store.set(f"rank_{rank}", json.dumps(sign))


def test_all_silent_ranks_are_named_by_host(watcher: Heartbeat):
    before = watcher._read_all()
    publish(watcher, 1, {"host": "host-a", "count": 2, **PLACE})
    assert watcher._describe_silent_ranks(before) == (
        "stuck or gone, no sign of life for 10 s: ranks 2, 3 on host-b, last seen at step 7, phase train.step"
    )


def test_a_rank_that_failed_is_named_with_its_failure(watcher: Heartbeat):
    for rank in (2, 3):
        publish(watcher, rank, {"host": "host-b", "count": 2, **PLACE})
    publish(watcher, 1, {"host": "host-a", "count": 1, **PLACE, "ended": True, "failure": "OutOfMemoryError: no"})
    before = watcher._read_all()
    for rank in (2, 3):
        publish(watcher, rank, {"host": "host-b", "count": 3, **PLACE})
    assert watcher._describe_silent_ranks(before).endswith(
        ": rank 1 on host-a, last seen at step 7, phase train.step, failed with OutOfMemoryError: no"
    )


def test_a_broken_store_does_not_end_a_step(watcher: Heartbeat, monkeypatch: pytest.MonkeyPatch):
    def fail(*words: object) -> None:
        raise dist.DistNetworkError("Broken pipe")

    monkeypatch.setattr(watcher, "_publish", fail)
    watcher._threads.append(None)  # type: ignore[arg-type]  # as if it were watching
    watcher.enter("train.update", 8)
    assert watcher.where == "step 8, phase train.update"


def test_the_interface_that_leads_to_a_host():
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no such host") is None


def test_ranks_without_a_place_to_meet_are_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="MASTER_ADDR=None, MASTER_PORT=.*: both must be set"):
        meet(ParallelConfig(1, 1, 60, 60))


def test_ranks_that_do_not_come_are_one_line(monkeypatch: pytest.MonkeyPatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    with pytest.raises(ValueError, match=r"MASTER_ADDR=127.0.0.1, MASTER_PORT=1: .*timeout_seconds=1"):
        meet(ParallelConfig(1, 1, 1, 60))
