"""Training on a stream: files on an HTTP server that fails, processes that are killed, a cache that is lost."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from helpers.http_files import Faults, serve
from helpers.runs import STEPS, TINY, rows_of, run, start, wait_for_step

STREAM = [
    "data=hub",
    "data.name=json",
    "streaming.shard_bytes=5000",
    "streaming.window_shards=2",
    "streaming.shards_ahead=2",
    "streaming.validation_shards=3",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, Faults]]:
    """A working folder, the address of the folder's files, and what goes wrong with them."""
    folder = tmp_path_factory.mktemp("home")
    texts = [part for name in sorted(topics) for part in topics[name].split("\n\n") if part.strip()]
    for number in range(3):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[number::3][:300]]
        (folder / f"{number}.jsonl").write_text("".join(lines))
    with serve(folder) as (address, faults):
        yield folder, address, faults


def words(address: str, name: str, *more: str) -> list[str]:
    files = ",".join(f"{address}{number}.jsonl" for number in range(3))
    return ["train", *TINY, *STREAM, f"data.files=[{files}]", f"run.name={name}", *more]


@pytest.fixture(scope="module")
def straight(server: tuple[Path, str, Faults]) -> list[str]:
    """Token hash of each step of a run without interruption, on one process, with all it wrote kept."""
    home, address, _ = server
    code, out, err = run(home, *words(address, "straight"))
    assert code == 0, err
    assert "corpus: streamed, rows shuffled in windows of 2 shards" in out
    return [row["data/token_hash"] for row in rows_of(home, "straight")]


def writers(home: Path) -> list[int]:
    """Writer processes whose working folder this is."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            ours = folder.name.isdigit() and (folder / "cwd").resolve() == home
            if ours and b"stream.writer" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue  # gone meanwhile
    return found


@pytest.mark.slow
def test_kills_failures_a_lost_cache_and_other_ranks_change_no_token(server, straight):
    """Two ranks with a bounded cache and a failing server; killed; without the cache, one rank finishes."""
    home, address, faults = server
    faults.coming = [None, "500", "drop", "slow"]
    bounded = ["streaming.cache_shards=5", "parallel.processes=2", "run.cache_dir=bounded"]
    process = start(home, *words(address, "killed", *bounded))
    wait_for_step(home, "killed", 5, process)
    assert len(writers(home)) == 1
    process.send_signal(signal.SIGKILL)
    out, _ = process.communicate()
    assert "trying again in 1 s" in out
    assert len(list(home.glob("bounded/*/train/*.bin"))) <= 5
    deadline = time.monotonic() + 30
    while writers(home):
        assert time.monotonic() < deadline, "the writer outlives its run"
        time.sleep(0.02)
    shutil.rmtree(home / "bounded")
    code, _, err = run(home, "train", "run.name=killed", "parallel.processes=1", "streaming.cache_shards=null")
    assert code == 0, err
    rows = rows_of(home, "killed")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)) and max(row["attempt"] for row in rows) == 1
    assert [row["data/token_hash"] for row in rows] == straight


def test_a_killed_writer_is_replaced(server, straight):
    home, address, _ = server
    process = start(home, *words(address, "orphaned", "run.cache_dir=other"))
    wait_for_step(home, "orphaned", 2, process)
    (writer,) = writers(home)
    os.kill(writer, signal.SIGKILL)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "ended by signal 9: starting another" in out
    assert [row["data/token_hash"] for row in rows_of(home, "orphaned")] == straight


def test_a_run_may_end_with_its_source(server):
    home, address, _ = server
    one = [f"data.files=[{address}0.jsonl]", "streaming.at_end=stop", "budget.tokens=1024000"]
    code, out, err = run(home, *words(address, "ends", *one))
    assert code == 0, err
    (rows,) = re.findall(r"ends after ([\d,]+) rows in \d+ shards; the run ends with it", out)
    steps = int(rows.replace(",", "")) // 16
    assert rows_of(home, "ends")[-1]["step"] == steps and "the source has no rows for another step" in err
    assert rows_of(home, "ends", "validation")[-1]["step"] == steps
    assert (home / "outputs" / "ends" / "checkpoints" / f"step_{steps:08d}").is_dir()


def test_a_spike_in_a_stream_ends_the_run_and_the_next_start_leaves_its_rows_out(server):
    home, address, _ = server
    spikes = ["spike.window_steps=4", "spike.deviations=2", "spike.rewind=true"]
    clean = home / "outputs" / "clean"
    clean.mkdir(parents=True)
    (clean / "rewinds.json").write_text(json.dumps([{"step": 0, "first": 9, "stop": 10}]))
    code, _, err = run(home, *words(address, "clean", *spikes))
    assert code == 0, err
    poison = ["fault.point=train.rows", "fault.action=poison", "fault.step=9"]
    code, out, err = run(home, *words(address, "poisoned", *spikes, *poison))
    assert code == 75 and "the same command goes on" in out, err
    code, _, err = run(home, *words(address, "poisoned", *spikes, *poison))
    assert code == 0, err
    hashes = [[row["data/token_hash"] for row in rows_of(home, name)] for name in ("poisoned", "clean")]
    assert hashes[0] == hashes[1] and len(hashes[0]) == STEPS


@pytest.mark.slow
def test_a_run_goes_on_past_a_row_that_stopped_it(server, straight):
    home, address, _ = server
    lines = (home / "0.jsonl").read_text().splitlines()
    (home / "bad.jsonl").write_text("\n".join([*lines[:215], '{"text": null}', *lines[215:]]) + "\n")
    steps = 18
    # One that is learnt from the stream would meet the row at once.
    tokenizer = next(home.glob("**/stream-*/tokenizer.json"))
    one = [
        f"data.files=[{address}bad.jsonl]",
        "tokenizer=pretrained",
        f"tokenizer.path={tokenizer}",
        "checkpoint.every_steps=1",
        f"budget.tokens={steps * 1024}",
    ]
    code, _, err = run(home, *words(address, "past", *one))
    assert code == 2 and "row 216: column 'text' must be a string, got None; data.invalid_text=skip" in err
    before = rows_of(home, "past")
    code, out, err = run(home, "train", "run.name=past", "data.invalid_text=skip")
    assert code == 0, err
    assert "left out: 1 without a text" in out
    rows = rows_of(home, "past")
    assert 0 < len(before) < steps == len(rows) and rows[: len(before)] == before
    code, _, err = run(home, *words(address, "skipping", *one, "data.invalid_text=skip"))
    assert code == 0, err
    assert [row["data/token_hash"] for row in rows_of(home, "skipping")] == [row["data/token_hash"] for row in rows]


def test_a_source_that_is_not_there_is_one_line(server):
    home, address, _ = server
    code, _, err = run(home, *words(address, "nothing", f"data.files=[{address}9.jsonl]"))
    assert code == 2 and "9.jsonl" in err and len(err.strip().splitlines()) == 1, err
