"""A preparation that is killed at the wrong moment: nothing of it reaches into the next one, nothing of it stays."""

import json
import os
import signal
import subprocess
import sys

import pytest
from helpers.corpora import files

from moe_pretrain.data import TokenizerConfig, prepare_corpus
from moe_pretrain.data.documents import work_units as sources
from moe_pretrain.data.prepare import cache
from moe_pretrain.system.file_lock import try_lock

TOKENIZER = TokenizerConfig("train", 300, None)

# Dies as soon as the tasks are in the workers' pipes.
PROGRAM = """
import multiprocessing.connection, os, signal, sys
from pathlib import Path
from moe_pretrain.data import FilesCorpusConfig, TokenizerConfig, prepare_corpus
from moe_pretrain.data.documents import work_units as sources
sources._SMALLEST_UNIT_BYTES = 1000
multiprocessing.connection.wait = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
policies = ("hash", None, "ignore", "fail", "fail", "fail", "sampled")
config = FilesCorpusConfig("files", (sys.argv[1],), (".txt",), "text", 0.5, *policies, None, None, None)
prepare_corpus(config, TokenizerConfig("train", 300, None), Path(sys.argv[2]), None, 2, None)
"""
# Keeps a worker from its first line until a file is there: a machine that is busy with other things.
SLOW_START = """
import pathlib, sys, time
if "data.prepare.worker_pool import main" in " ".join(sys.orig_argv):
    until = time.monotonic() + 120
    while time.monotonic() < until and not pathlib.Path({go!r}).exists():
        time.sleep(0.01)
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_SMALLEST_UNIT_BYTES", 1000)
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {n} says {n * n}"}) + "\n" for n in range(200)))
    return files(path)


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_workers_that_start_after_their_parent_is_dead_write_nothing(config, tmp_path):
    reference = prepare_corpus(config, TOKENIZER, tmp_path / "one", None, 1, None).train.folder.parent
    go, slow, killed = tmp_path / "go", tmp_path / "slow", tmp_path / "killed" / reference.name
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(SLOW_START.format(go=str(go)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(slow), *sys.path])}
    command = [sys.executable, "-c", PROGRAM, config.paths[0], str(killed.parent)]
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL

    lock = killed.with_name(f".{killed.name}.lock")
    assert try_lock(lock) is None, "the workers are alive, so the next preparation must wait"
    partial = cache.partial_folder(killed)
    before = names(partial)
    go.touch()
    with cache.locked(killed, lambda line: None):  # until the last of them is gone
        assert names(partial) == before and not any("shard" in name for name in before)
    corpus = prepare_corpus(config, TOKENIZER, killed.parent, None, 2, None)
    assert names(corpus.train.folder.parent) == names(reference)
    assert [path.name for path in killed.parent.iterdir()] == [killed.name]


def test_what_a_kill_at_the_very_end_leaves_is_removed(config, tmp_path):
    """After the corpus has its name, before the records and the lock are gone."""
    folder = prepare_corpus(config, TOKENIZER, tmp_path / "cache", None, 1, None).train.folder.parent
    whole = names(folder)
    (folder / "units").mkdir()
    (folder / "units" / "unit-00000.json").write_text("{}")
    folder.with_name(f".{folder.name}.lock").touch()
    prepare_corpus(config, TOKENIZER, tmp_path / "cache", None, 1, None)
    assert names(folder) == whole
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
