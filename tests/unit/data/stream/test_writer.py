"""The writer as a process: killed, orphaned, on a full disk."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import pytest
from helpers.corpora import files
from helpers.streams import TOKENIZER, open_inline, streaming, write_lines

from moe_pretrain.data.stream.rows import StreamedRows
from moe_pretrain.data.stream.shard_stream import ShardStream
from moe_pretrain.data.stream.writer import Demand, StreamJob, serve
from moe_pretrain.data.stream.writer_process import WriterProcess
from moe_pretrain.data.tokenizer.train import make_tokenizer
from moe_pretrain.system.files import WholeFile


@pytest.fixture
def corpus(tmp_path):
    write_lines(tmp_path / "a.jsonl", 400)
    return files(tmp_path / "a.jsonl", fraction=0.1)


def never():
    return False


def read(rows, steps):
    found = []
    for first in range(steps.start * 16, steps.stop * 16, 16):
        assert rows.reach(first, first + 16, never)
        rows.release(first)
        found.append(rows.read(np.arange(first, first + 16))[0].tobytes())
    return found


def test_a_killed_writer_is_replaced_and_the_rows_are_the_same(corpus, tmp_path):
    config = streaming(cache_shards=5)
    lines: list[str] = []
    writer = WriterProcess(StreamJob(tmp_path / "cache", corpus, TOKENIZER, config, 1), lines.append)
    try:
        stream = ShardStream(tmp_path / "cache", corpus, config, writer, lines.append)
        stream.load_tokenizer(TOKENIZER)
        rows = StreamedRows(stream, 16, 3, True)
        found = read(rows, range(2))
        maps = Path(f"/proc/{writer._process.pid}/maps").read_text(encoding="utf-8")
        assert "tokenizers" in maps and "libtorch" not in maps and "libcuda" not in maps, "it holds no GPU"
        for steps in (range(2, 8), range(8, 20)):
            writer._process.send_signal(signal.SIGTERM)  # not for it
            os.kill(writer._process.pid, signal.SIGKILL)
            found += read(rows, steps)
    finally:
        writer.close()
    inline, _ = open_inline(tmp_path / "other", corpus, config)
    assert found == read(StreamedRows(inline, 16, 3, True), range(20))
    assert sum("ended by signal 9: starting another" in line for line in lines) == 2, lines


def test_a_writer_that_always_dies_is_given_up(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    lines: list[str] = []
    writer = WriterProcess(StreamJob(tmp_path / "cache", corpus, TOKENIZER, streaming(), 1), lines.append)
    stream = ShardStream(tmp_path / "cache", corpus, streaming(), writer, lines.append)
    with pytest.raises(ValueError, match="ended with exit code 1 4 times in a row") as caught:
        stream.load_tokenizer(TOKENIZER)
    assert "\n" not in str(caught.value)


ORPHAN = """
import sys, time
sys.path[:0] = {path!r}
from pathlib import Path
from helpers.corpora import files
from helpers.streams import TOKENIZER, streaming
from moe_pretrain.data.stream.writer import StreamJob
from moe_pretrain.data.stream.writer_process import WriterProcess
writer = WriterProcess(StreamJob(Path({folder!r}), files({corpus!r}, fraction=0.1), TOKENIZER, streaming(), 1), print)
print(writer._process.pid, flush=True)
time.sleep(100)
"""


def test_the_writer_dies_with_its_parent(corpus, tmp_path):
    path = [str(Path(__file__).parents[2]), *sys.path]
    program = ORPHAN.format(path=path, folder=str(tmp_path / "cache"), corpus=corpus.paths[0])
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 60
        while Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8"):
            assert time.monotonic() < deadline, "an orphan is left"
            time.sleep(0.02)


def test_a_full_disk_is_one_line_and_finished_shards_stay(corpus, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    folder.mkdir()
    make_tokenizer(corpus, TOKENIZER, folder, lambda line: None)  # written whole as well, but the disk fills later
    write = WholeFile.write
    left = [6000]  # a few shards and a part of one

    def write_until_full(self, data):
        if len(data) > left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= len(data)
        write(self, data)

    monkeypatch.setattr(WholeFile, "write", write_until_full)
    ours, theirs = Pipe()
    ours.send(StreamJob(folder, corpus, TOKENIZER, streaming(shards_ahead=100), 1))
    ours.send(Demand(0, 1))
    thread = threading.Thread(target=serve, args=(theirs, lambda: None))
    thread.start()
    while (message := ours.recv())[0] != "failed":
        pass
    thread.join()
    text, number = message[1]
    assert "cannot write shards: " in text and "No space left on device" in text and number == errno.ENOSPC
    assert text.endswith("finished shards are kept, the same command goes on from there")
    done = {path: path.stat().st_mtime_ns for path in (folder / "units").glob("*.json")}
    assert done and not list(folder.rglob("*.tmp"))
    left[0] = 10**9
    stream, _ = open_inline(folder, corpus, streaming())
    found = read(StreamedRows(stream, 16, 3, True), range(15))
    other, _ = open_inline(tmp_path / "other", corpus, streaming())
    assert found == read(StreamedRows(other, 16, 3, True), range(15))
    assert all(path.stat().st_mtime_ns == changed for path, changed in done.items()), "finished shards stay"
