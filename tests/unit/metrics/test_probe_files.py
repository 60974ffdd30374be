"""The files of a run's probes: whole or not there, gone where a resumed run will be again, kept where it needs them."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_pretrain.data.rows.micro_batch import build_micro_batch
from moe_pretrain.metrics import probe_collector as probes
from moe_pretrain.metrics.probe_collector import Collector
from moe_pretrain.run_folder.probe import Probe, ProbeFiles, put_together, routing_drift


def make(step: int, fingerprint: str = "rows") -> Probe:
    return Probe(
        step=step,
        fingerprint=fingerprint,
        share=np.ones(1),
        set_index=np.zeros(3, dtype=np.int64),
        document=np.array([0, 1, 1]),
        tokens=np.array([4, 5, 6]),
        loss=np.array([1.5, 2.5, step]),
        layer=np.array([0, 2]),
        routes=np.array([[1, 2, 3, 4], [5, 6, 7, 8]]),
    )


def test_what_is_written_is_read(tmp_path: Path):
    files = ProbeFiles(tmp_path)
    files.write(make(7))
    found = files.read(7)
    assert found is not None
    for field in fields(Probe):
        assert np.array_equal(getattr(found, field.name), getattr(make(7), field.name)), field.name
    assert files.read(8) is None
    assert [path.name for path in files.folder.iterdir()] == ["step_00000007.npz"]


@pytest.mark.parametrize("content", [b"", b"not a zip", None], ids=["empty", "no zip", "cut"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes | None):
    files = ProbeFiles(tmp_path)
    files.write(make(7))
    whole = files.path(7).read_bytes()
    files.path(7).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ValueError, match=r"step_00000007\.npz: damaged"):
        files.read(7)


def test_a_write_that_breaks_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = ProbeFiles(tmp_path)
    files.write(make(7))

    def full(file, **values):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(probes.np, "savez_compressed", full)
    with pytest.raises(OSError, match="no space"):
        files.write(make(7, "other"))
    found = files.read(7)
    assert found is not None and found.fingerprint == "rows" and files.steps() == [7]


def test_what_a_resume_will_do_again_is_removed_and_what_it_needs_is_kept(tmp_path: Path):
    files = ProbeFiles(tmp_path)
    for step in (10, 20, 30, 40):
        files.write(make(step))
    files.remove_before(25)
    assert files.steps() == [20, 30, 40], "a run that goes on from step 25 compares with step 20"
    files.remove_after(35)
    assert files.steps() == [20, 30]
    newest = files.newest(29)
    assert newest is not None and newest.step == 20 and files.newest(19) is None


def test_drift_of_other_rows_is_not_told():
    now = make(2)
    moved = replace(now, routes=np.array([[1, 2, 3, 0], [0, 0, 7, 8]]))
    assert routing_drift(moved, now) == {0: 0.25, 2: 0.5}
    assert routing_drift(replace(moved, fingerprint="other"), now) == {}
    assert routing_drift(replace(moved, routes=moved.routes[:, :3]), now) == {}


def collect(monkeypatch: pytest.MonkeyPatch, tokens: np.ndarray, starts: np.ndarray, isolate: bool = True) -> str:
    """Fingerprint of two rows on one rank."""
    monkeypatch.setattr(probes.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(probes.dist, "all_gather_object", lambda places, own: places.__setitem__(0, own))
    collector = Collector(np.array([6, 100]), 4, 2, 0)
    batch = build_micro_batch(tokens, starts, np.arange(2), isolate)
    collector.add(batch, torch.zeros(2, 4), [])
    return put_together(1, {"": collector.gather()}, {"": 1.0}, []).fingerprint


def test_the_fingerprint_is_of_tokens_and_of_what_counts(monkeypatch: pytest.MonkeyPatch):
    tokens, starts = np.arange(10).reshape(2, 5), np.zeros((2, 5), dtype=bool)
    starts[1, 2] = True
    base = collect(monkeypatch, tokens, starts)
    assert base == collect(monkeypatch, tokens.copy(), starts)
    other_token, other_start = tokens.copy(), starts.copy()
    other_token[1, 0] = 50
    other_start[1, 3] = True
    found = {
        base,
        collect(monkeypatch, other_token, starts),
        collect(monkeypatch, tokens, other_start),
        collect(monkeypatch, tokens, starts, isolate=False),
        collect(monkeypatch, tokens[::-1].copy(), starts),
    }
    assert len(found) == 5
