"""Streams through ``datasets``, over HTTP with a server that fails and over ``file://``; the real hub stays untried."""

import gzip
import json
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers.corpora import hub
from helpers.http_files import serve

from moe_pretrain.data.documents import hub as hub_module
from moe_pretrain.data.documents.hub import START, Place, Retries, hub_batches

ROWS = 300
ENDINGS = ["jsonl", "jsonl.gz", "parquet"]


@pytest.fixture
def texts():
    generator = np.random.default_rng(0)
    return [f"row {number} " + "é" * int(generator.integers(0, 40)) for number in range(3 * ROWS)]


@pytest.fixture
def folder(tmp_path, texts):
    for number in range(3):
        own = texts[number * ROWS : (number + 1) * ROWS]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in own).encode()
        (tmp_path / f"{number}.jsonl").write_bytes(lines)
        (tmp_path / f"{number}.jsonl.gz").write_bytes(gzip.compress(lines))
        pyarrow.parquet.write_table(pyarrow.table({"text": own}), tmp_path / f"{number}.parquet", row_group_size=70)
    return tmp_path


@pytest.fixture
def waits(monkeypatch):
    found: list[float] = []
    monkeypatch.setattr(hub_module, "time", SimpleNamespace(sleep=found.append))
    return found


def files_at(address, ending, **changes):
    names = tuple(f"{address}{number}.{ending}" for number in range(3))
    return hub(name="parquet" if ending == "parquet" else "json", files=names, **changes)


def read(config, start=START, limit=0.0, lines=None):
    retries = Retries(limit, (lines if lines is not None else []).append)
    return [([row.text for row in rows], end) for rows, end in hub_batches(config, start, 1000, retries)]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("protocol", ["http", "file"])
def test_every_batch_can_be_the_start(folder, texts, ending, protocol):
    with serve(folder) as (address, _):
        config = files_at(address if protocol == "http" else f"file://{folder}/", ending)
        whole = read(config)
        assert [text for batch, _ in whole for text in batch] == texts and len(whole) > 15
        for number, (_, end) in enumerate(whole[::4]):
            rest = read(config, Place(**json.loads(json.dumps({"rows": end.rows, "state": end.state}))))
            assert [batch for batch, _ in rest] == [batch for batch, _ in whole[4 * number + 1 :]]
        assert [batch for batch, _ in read(config, Place(whole[3][1].rows, None))] == [batch for batch, _ in whole[4:]]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("seed", range(3))
def test_failures_of_the_network_change_nothing(folder, texts, ending, seed, waits):
    with serve(folder) as (address, faults):
        generator = np.random.default_rng(seed)
        # The first request may find out what the server can do: it works.
        kinds = [None, "500", "drop", "503", "slow"]
        faults.coming = [None, *(kinds[k] for k in generator.integers(len(kinds), size=8)), "drop", "500"]
        lines: list[str] = []
        found = read(files_at(address, ending), limit=10**6, lines=lines)
        assert [text for batch, _ in found for text in batch] == texts
        assert len(waits) == len(lines) >= 1 and all("trying again in" in line for line in lines), lines


def test_waits_grow_and_end(folder, waits):
    with serve(folder) as (address, faults):
        faults.coming = [None, *["500"] * 1000]
        with pytest.raises(ValueError, match=r"^data=hub data\.name=json .* \(given up after 130 s\)$") as caught:
            read(files_at(address, "jsonl"), limit=130)
    assert waits == [1, 2, 4, 8, 16, 32, 60]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", ["404", "column", "cut short", "no file"])
def test_what_no_try_mends_is_not_tried_again(folder, waits, fault):
    with serve(folder) as (address, faults):
        config = files_at(address, "parquet")
        if fault == "404":
            (folder / "1.parquet").unlink()
        elif fault == "column":
            config = files_at(address, "parquet", text_column="body")
        elif fault == "cut short":
            (folder / "1.parquet").write_bytes((folder / "1.parquet").read_bytes()[:-100])
        else:
            config = files_at("file:///nowhere/", "parquet")
        with pytest.raises(ValueError) as caught:
            read(config, limit=10**6)
    assert not waits and "\n" not in str(caught.value), str(caught.value)
    words = {"404": "1.parquet", "column": "no column 'body'", "cut short": "Parquet", "no file": "nowhere"}[fault]
    assert words in str(caught.value)


def test_files_need_a_loader_and_a_loader_needs_files():
    with pytest.raises(ValueError, match=r"data\.files=None must list at least one file with data\.name=json"):
        hub(name="json")
