"""A working folder for runs, and a cluster."""

import fcntl
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from helpers import slurm


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a small corpus."""
    folder = tmp_path_factory.mktemp("home")
    rows = "".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics))
    (folder / "corpus.jsonl").write_text(rows)
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Cluster]:
    """A SLURM of two nodes."""
    # One on a machine at a time: jobs of the same number have the same port.
    with (Path(tempfile.gettempdir()) / "moe-pretrain-test-slurm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield from _cluster(tmp_path_factory.mktemp("slurm"))


def _cluster(folder: Path) -> Iterator[slurm.Cluster]:
    done = slurm.control("start", folder, "2")
    assert done.returncode == 0, done.stderr
    yield slurm.Cluster(folder)
    assert slurm.control("stop", folder).returncode == 0
