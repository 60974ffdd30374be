"""Whatever the save path meets, a good checkpoint is left, nobody has to clean up, and the failure is loud."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import checkpoints
from helpers.builders import tiny
from helpers.engines import build_engine, random_batches
from helpers.processes import RanksFailed, run_on_ranks

from moe_pretrain.checkpoint import store
from moe_pretrain.checkpoint.manifest import SET_ASIDE, folder_name
from moe_pretrain.checkpoint.store import TrainState, train_state
from moe_pretrain.system.faults import ALL_RANKS, SAVE_POINTS, FaultConfig, Faults

KEEP = checkpoints.policy(keep_last=2, asynchronous=True)
FAULTY_STEP = 3
# From here on the new checkpoint has its name.
NAMED = SAVE_POINTS[SAVE_POINTS.index("save.renamed") :]


def fault(point: str, action: str, rank: int = ALL_RANKS, step: int = FAULTY_STEP) -> FaultConfig:
    return FaultConfig(point=point, action=action, step=step, num_steps=1, rank=rank, parameter="")


def save_steps(folder: str, config: FaultConfig, last: int, ep: int) -> list[tuple[int, bool, str | None]]:
    """Train and save to step ``last`` with a fault; (step, whether it was saved, problem) of each save."""
    engine = build_engine(tiny(f"parallel.expert_parallel_size={ep}", "engine.check_every_steps=0"))
    saver = store.Saver(engine, Path(folder), KEEP, 30.0, Faults(config, engine.mesh.rank))
    outcomes = []
    for step in range(last):
        engine.step(step, random_batches(engine, step))
        saver.save(TrainState(step=step + 1))
        outcome = saver.take(wait=True)
        outcomes.append((outcome.step, outcome.path is not None, outcome.problem))
    return outcomes


def add_damaged(folder: Path) -> None:
    """A damaged checkpoint of the step that is saved next, so that replacing it is passed too."""
    (folder / folder_name(FAULTY_STEP)).mkdir()
    (folder / folder_name(FAULTY_STEP) / "manifest.json").write_text("{")


def kill_everywhere(folder: str) -> list[int]:
    """One process per point, forked with the state of step 3, that is killed there; how each of them ended."""
    engine = build_engine(tiny("engine.check_every_steps=0"))
    template = Path(folder) / "template"
    for step in range(FAULTY_STEP):
        engine.step(step, random_batches(engine, step))
        if step + 1 < FAULTY_STEP:
            checkpoints.save(engine, template, TrainState(step=step + 1), keep_last=2)
    endings = []
    for point in SAVE_POINTS:
        own = Path(folder) / point
        shutil.copytree(template, own)
        add_damaged(own)
        child = os.fork()
        if child == 0:
            try:  # groups made here have threads of their own; those of before the fork have none
                saver = store.Saver(engine, own, KEEP, 30.0, Faults(fault(point, "kill"), 0))
                saver.save(TrainState(step=FAULTY_STEP))
                saver.take(wait=True)
            finally:
                os._exit(0)
        endings.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return endings


def recover(folders: list[str]) -> list[list[str]]:
    """Go on from what each folder holds to step 4; what is then in it."""
    engine = build_engine(tiny("engine.check_every_steps=0"))
    for folder in folders:
        path, manifest = store.newest(Path(folder), lambda line: None)
        store.restore(engine, path, manifest)
        for step in range(train_state(manifest).step, FAULTY_STEP + 1):
            engine.step(step, random_batches(engine, step))
            checkpoints.save(engine, Path(folder), TrainState(step=step + 1), keep_last=2)
    return [sorted(path.name for path in Path(folder).iterdir()) for folder in folders]


def good_files(folder: Path, step: int) -> dict:
    return store.read_manifest(folder / folder_name(step))["files"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_on_ranks(save_steps, 1, str(folder), fault("save.begin", "kill", step=99), FAULTY_STEP + 1, 1)
    return folder


def test_kill_at_every_point_of_a_save(undisturbed: Path, tmp_path: Path):
    """SIGKILL at each of the save path's points: the newest that verifies is the last complete one, bit for bit."""
    assert len(SAVE_POINTS) == len(set(SAVE_POINTS)) >= 20
    endings = run_on_ranks(kill_everywhere, 1, str(tmp_path))[0]
    for point, ending in zip(SAVE_POINTS, endings, strict=True):
        assert ending == -9, f"{point} was never reached"
        path, manifest = store.newest(tmp_path / point, lambda line: None)
        assert train_state(manifest).step == (FAULTY_STEP if point in NAMED else FAULTY_STEP - 1), point
        if point in NAMED:
            assert manifest["files"] == good_files(undisturbed, FAULTY_STEP), point
    left = run_on_ranks(recover, 1, [str(tmp_path / point) for point in SAVE_POINTS])[0]
    for point, names in zip(SAVE_POINTS, left, strict=True):
        kept = [name for name in names if name != SET_ASIDE]  # the damaged one of step 3, which nobody has read
        assert kept == [folder_name(3), folder_name(4)], f"{point}: nothing half-written stays, nothing good goes"
        assert [path.name for path in (tmp_path / point / SET_ASIDE).iterdir()] == [folder_name(3)], point
        assert good_files(tmp_path / point, 4) == good_files(undisturbed, 4), point


@pytest.mark.parametrize(
    "point,rank",
    [("save.staged", 1), ("save.file_half", 1), ("save.reported", 1), ("save.manifest_half", 0), ("save.announced", 1)],
)
@pytest.mark.fast("file_half", "reported")
def test_kill_of_one_rank_in_a_save(tmp_path: Path, point: str, rank: int):
    with pytest.raises(RanksFailed) as failed:
        run_on_ranks(save_steps, 2, str(tmp_path), fault(point, "kill", rank), FAULTY_STEP, 2)
    assert f"rank {rank} (exit code -9" in str(failed.value)
    _, manifest = store.newest(tmp_path, pytest.fail)
    # A rank that dies after it has reported does not keep the main one from finishing what is whole.
    expected = (FAULTY_STEP - 1, FAULTY_STEP) if point == "save.reported" else (FAULTY_STEP - (point not in NAMED),)
    assert train_state(manifest).step in expected


@pytest.mark.parametrize("error,rank", [("ENOSPC", 0), ("EROFS", 1), ("EIO", 1), ("ENOENT", 0)])
@pytest.mark.fast("EROFS-1")
def test_errors_of_the_disk_are_told_to_every_rank_and_training_goes_on(tmp_path: Path, error: str, rank: int):
    told = run_on_ranks(save_steps, 2, str(tmp_path), fault("save.file_half", error, rank), FAULTY_STEP + 1, 2)
    assert told[0] == told[1]
    assert [(step, saved) for step, saved, _ in told[0]] == [(1, True), (2, True), (3, False), (4, True)]
    problem = told[0][2][2]
    assert f"rank {rank}: " in problem and os.strerror(getattr(errno, error)) in problem
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder_name(2), folder_name(4)]


def every_error(folder: str) -> list[tuple[str, bool, str | None, int]]:
    """ENOSPC at each point in turn: (point, saved, problem, newest good step after it)."""
    engine = build_engine(tiny("engine.check_every_steps=0"))
    found = []
    for index, point in enumerate(SAVE_POINTS):
        own = Path(folder) / point
        for step in (1, 2, 3):
            config = fault(point, "ENOSPC")
            saver = store.Saver(engine, own, KEEP, 30.0, Faults(config, 0))
            if step == FAULTY_STEP:
                add_damaged(own)
            saver.save(TrainState(step=step, tokens=index))
            outcome = saver.take(wait=True)
        good = train_state(store.newest(own, lambda line: None)[1]).step
        found.append((point, outcome.path is not None, outcome.problem, good))
    return found


def test_an_error_at_every_point_leaves_a_good_checkpoint(tmp_path: Path):
    for point, saved, problem, good in run_on_ranks(every_error, 1, str(tmp_path))[0]:
        assert problem is not None and "No space left" in problem, point
        assert good == FAULTY_STEP if saved or point in NAMED else good == FAULTY_STEP - 1, point


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder to mount a small file system on, and the mount command."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount; the injected errors cover the same path")
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o"]
    try:
        yield folder, command
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False, stderr=subprocess.DEVNULL)


def break_disk(kind: str, folder: Path, checkpoints: Path) -> None:
    if kind == "read_only":
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    elif kind == "vanished":
        shutil.rmtree(checkpoints)
    elif kind == "full":
        filler = folder / "filler"
        with pytest.raises(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
    elif kind == "no_inodes":
        with pytest.raises(OSError):
            for index in range(10_000):
                (folder / f"file_{index}").touch()


def mend_disk(kind: str, folder: Path) -> None:
    if kind == "read_only":
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
    for path in [*folder.glob("filler"), *folder.glob("file_*")]:
        path.unlink()


def save_on_broken_disk(kind: str, folder: str) -> tuple[list[str | None], int | None]:
    """Save, break the disk, save, mend it, save: the three problems, and the newest good step while it was broken."""
    engine = build_engine(tiny("engine.check_every_steps=0"))
    checkpoints = Path(folder) / "checkpoints"
    saver = store.Saver(engine, checkpoints, KEEP, 30.0)
    problems, while_broken = [], None
    for step in (1, 2, 3):
        if step == 2:
            break_disk(kind, Path(folder), checkpoints)
        engine.step(step, random_batches(engine, step))
        saver.save(TrainState(step=step))
        problems.append(saver.take(wait=True).problem)
        if step == 2:
            found = store.newest(checkpoints, pytest.fail)
            while_broken = train_state(found[1]).step if found else None
            mend_disk(kind, Path(folder))
    assert train_state(store.newest(checkpoints, pytest.fail)[1]).step == 3
    return problems, while_broken


BROKEN_DISKS = {
    "full": ("size=1m", "No space left", 1),
    "no_inodes": ("size=4m,nr_inodes=20", "No space left", 1),
    "read_only": ("size=4m", "Read-only", 1),
    # Made anew: what vanished cannot stay, but the next checkpoint is whole.
    "vanished": ("size=4m", None, 2),
}


@pytest.mark.parametrize("kind", BROKEN_DISKS)
@pytest.mark.fast("full", "vanished")
def test_a_broken_disk_does_not_stop_training(small_disk: tuple[Path, list[str]], kind: str):
    folder, command = small_disk
    options, expected, good = BROKEN_DISKS[kind]
    if subprocess.run([*command, options, "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("this machine lets nobody mount; the injected errors cover the same path")
    problems, while_broken = run_on_ranks(save_on_broken_disk, 1, kind, str(folder))[0]
    assert problems[0] is None and problems[2] is None
    assert problems[1] is None if expected is None else expected in problems[1]
    assert while_broken == good
