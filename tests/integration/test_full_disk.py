"""A disk that is full when a run starts or goes on is one line and an exit code, the same as later."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.runs import rows_of, run, train_words

KIB = 1024


@pytest.fixture
def disk(home: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = home / "disk"
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("nobody may mount here; the unit tests of the exit codes cover what errors come to")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False, stderr=subprocess.DEVNULL)


def fill(folder: Path, but_kib: int = 0) -> None:
    with pytest.raises(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * KIB)
    os.truncate(folder / "filler", max(0, (folder / "filler").stat().st_size - but_kib * KIB))


@pytest.mark.parametrize("but_kib", [0, 4, 16])
@pytest.mark.parametrize("field", ["run.output_dir", "run.cache_dir"])
@pytest.mark.fast("output_dir-0", "cache_dir-4")
def test_a_full_disk_at_the_start(home: Path, disk: Path, field: str, but_kib: int) -> None:
    fill(disk, but_kib)
    words = train_words(
        "full", "budget.tokens=2048", "run.output_dir=other", "run.cache_dir=cache", f"{field}=disk/runs"
    )
    code, out, err = run(home, *words)
    assert code == 74 and "No space left on device" in err + out and "Traceback" not in err, err
    shutil.rmtree(home / "other", ignore_errors=True)
    (disk / "filler").unlink()
    code, _, err = run(home, *words)
    assert code == 0, err
    shutil.rmtree(home / "other", ignore_errors=True)


@pytest.mark.parametrize("but_kib", [0, 4])
@pytest.mark.fast("0")
def test_a_full_disk_at_a_resume_loses_nothing(home: Path, disk: Path, but_kib: int) -> None:
    words = train_words("resumed", "budget.tokens=2048", "run.output_dir=disk", "run.cache_dir=cache")
    code, _, err = run(home, *words)
    assert code == 0, err
    fill(disk, but_kib)
    code, out, err = run(home, *words, "budget.tokens=4096")
    assert code == 74 and "No space left on device" in err + out and "Traceback" not in err, err
    assert (disk / "resumed" / "checkpoints" / "step_00000002" / "manifest.json").exists()
    (disk / "filler").unlink()
    code, _, err = run(home, *words, "budget.tokens=4096")
    assert code == 0, err
    (file,) = [path for path in disk.rglob("metrics.jsonl")]
    assert sum('"kind": "train"' in line for line in file.read_text().splitlines()) == 4, "no step is lost or twice"
    assert rows_of(home, "resumed") == []
