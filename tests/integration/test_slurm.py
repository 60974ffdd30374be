"""Runs under a real SLURM of two nodes on this machine: signals, saving, queueing again, resuming."""

import os
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest
from helpers import slurm
from helpers.runs import STEPS, files_of_step, rows_of, start, train_words

pytestmark = pytest.mark.skipif(slurm.missing() is not None, reason=str(slurm.missing()))
TRAIN = slurm.ROOT / "scripts" / "slurm" / "train.sbatch"
NO_GPU = ["--gpus-per-node=0", "--cpus-per-task=1"]


def train(cluster: slurm.Cluster, home: Path, name: str, flags: list[str], *words: str) -> str:
    """Submit a run; the job's number."""
    flags = [*NO_GPU, *flags, f"--output={name}.log", "--time=60"]
    return cluster.submit(home, *flags, str(TRAIN), *train_words(name, "checkpoint.every_steps=1000", *words)[1:])


def stops(home: Path, name: str) -> list[tuple[int, str]]:
    """Steps at which signals ended attempts, with what was said."""
    return [(row["step"], row["message"]) for row in rows_of(home, name, "event") if row["event"] == "stopped"]


@pytest.mark.slow
def test_preempted_and_out_of_time_a_run_ends_with_the_bits_of_an_uninterrupted_one(
    cluster: slurm.Cluster, home: Path, request: pytest.FixtureRequest
) -> None:
    """On two nodes, expert parallel: preempted, then out of time, then left alone."""
    expert_parallel = "parallel.expert_parallel_size=2"
    number = train(
        cluster, home, "told", ["--nodes=2", "--ntasks-per-node=1"], expert_parallel, *slurm.stop_in(3, 4, 5, 6)
    )
    cluster.wait_until_stopped(number, ranks=2)
    rows = partial(rows_of, home, "told")
    urgent = ["sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=:"]
    winner = cluster.tell(number, urgent, rows, lambda: cluster.is_in(number, "PENDING", Restarts="1"))
    assert [message for _, message in stops(home, "told")] == ["by SIGUSR1, checkpoint written"]
    cluster.wait(winner, "COMPLETED")

    cluster.start_now(number)
    cluster.wait_until_stopped(number, ranks=2)
    alone = start(home, *train_words("alone", "parallel.processes=2", expert_parallel))
    request.addfinalizer(alone.kill)
    limit = ["scontrol", "update", f"jobid={number}", "TimeLimit=2"]  # SLURM looks at it twice a minute
    cluster.tell(number, limit, rows, lambda: cluster.is_in(number, "PENDING", Restarts="2"))
    (first, _), (second, message) = stops(home, "told")
    assert first < second and message == "by SIGUSR1, checkpoint written"
    out, err = alone.communicate(timeout=100)
    assert alone.returncode == 0, out + err

    cluster.call(home, "scontrol", "update", f"jobid={number}", "TimeLimit=60")
    cluster.start_now(number)
    cluster.wait(number, "COMPLETED", wake=True)
    ours, theirs = rows_of(home, "told"), rows_of(home, "alone")
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1)), "no step is missing or twice"
    assert {row["attempt"] for row in ours} == {0, 1, 2}
    for quantity in ("data/token_hash", "train/loss"):
        assert [row[quantity] for row in ours] == [row[quantity] for row in theirs]
    assert files_of_step(home, "told", STEPS) == files_of_step(home, "alone", STEPS)
    log = (home / "told.log").read_text()
    assert log.count("stopped at step") == 2 and log.count("done: ") == 1, "one log for all attempts"


def test_a_cancelled_run_saves_and_is_not_queued_again(cluster: slurm.Cluster, home: Path):
    number = train(cluster, home, "cancelled", ["--ntasks-per-node=1"], *slurm.stop_in(2, 3))
    cluster.wait_until_stopped(number, ranks=1)
    rows = partial(rows_of, home, "cancelled")
    cluster.tell(number, ["scancel", number], rows, lambda: not cluster.processes(number))
    cluster.wait(number, "CANCELLED", Restarts="0")
    ((step, message),) = stops(home, "cancelled")
    assert message == "by SIGTERM, checkpoint written" and files_of_step(home, "cancelled", step)


@pytest.mark.slow
def test_a_rank_that_is_alive_but_stuck_is_named_and_the_job_fails(cluster: slurm.Cluster, home: Path):
    stuck = ["fault.point=train.backward", "fault.action=hang", "fault.step=2", "fault.rank=1"]
    number = train(cluster, home, "stuck", ["--ntasks-per-node=2"], *stuck, "parallel.timeout_seconds=10")
    cluster.wait(number, "FAILED", ExitCode="69:0")
    log = (home / "stuck.log").read_text()
    named = "stuck, in one place of its loop for 10 s (parallel.timeout_seconds): rank 1 on"
    assert named in log and "step 2, phase train.backward, in reach (faults.py:" in log, log
    assert "rank 0 on" not in log, "it only waits; rank 1 may say the same, since the store ends with rank 0"


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """A folder with an environment in ``.venv`` whose python is the shell script ``stub.sh``."""
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/bash\nsource "{tmp_path}/stub.sh"\n')
    python.chmod(0o755)
    return tmp_path


def test_ranks_over_nodes(cluster: slurm.Cluster, stub: Path):
    variables = "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $SLURM_CPUS_PER_TASK $SLURMD_NODENAME"
    (stub / "stub.sh").write_text(f'echo "$* : {variables}" >"rank_$RANK"')
    flags = ["--nodes=2", "--ntasks-per-node=2", *NO_GPU, "--output=log"]
    number = cluster.submit(stub, *flags, str(TRAIN), "run.name=a b", "seed=1")
    cluster.wait(number, "COMPLETED")
    port = 10000 + int(number) % 20000
    said = [(stub / f"rank_{rank}").read_text().strip() for rank in range(4)]
    expected = [(0, 0, "node1"), (1, 1, "node1"), (2, 0, "node2"), (3, 1, "node2")]
    assert said == [
        f"-m moe_pretrain train run.name=a b seed=1 : {rank} {local} 4 127.0.0.1 {port} 1 {node}"
        for rank, local, node in expected
    ]


def test_every_rank_has_its_cores(cluster: slurm.Cluster, stub: Path):
    (stub / "stub.sh").write_text('(scontrol show step "$SLURM_JOB_ID.$SLURM_STEP_ID"; echo $OMP_NUM_THREADS) >cores')
    flags = ["--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=2", "--output=log"]
    number = cluster.submit(stub, *flags, "--export=PATH", str(TRAIN))
    cluster.wait(number, "COMPLETED")
    said = (stub / "cores").read_text().split()
    assert "TresPerTask=cpu:2" in said and said[-1] == "2"


@pytest.mark.parametrize(
    "body,state,code",
    [
        ("exit 75", "PENDING", "0:0"),
        ("kill -USR1 $$", "PENDING", "0:0"),  # before the program heeds signals
        ("kill -TERM $$", "PENDING", "0:0"),
        ("exit 74", "FAILED", "74:0"),
        ("[ $RANK = 0 ] && exit 2; exit 0", "FAILED", "2:0"),
        ("kill -KILL $$", "FAILED", "137:0"),
    ],
)
def test_which_endings_are_queued_again(cluster: slurm.Cluster, stub: Path, body: str, state: str, code: str):
    (stub / "stub.sh").write_text(body)
    flags = ["--ntasks-per-node=2", *NO_GPU, "--output=log"]
    number = cluster.submit(stub, *flags, str(TRAIN))
    cluster.wait(number, state, Restarts=str(int(state == "PENDING")), ExitCode=code)
    if state == "PENDING":
        cluster.call(stub, "scancel", number)


def test_one_rank_that_ends_early_does_not_end_the_others(cluster: slurm.Cluster, stub: Path):
    (stub / "stub.sh").write_text("[ $RANK = 1 ] && exit 75; sleep 1; echo whole >saved; exit 75")
    number = cluster.submit(stub, "--ntasks-per-node=2", *NO_GPU, "--output=log", str(TRAIN))
    cluster.wait(number, "PENDING", Restarts="1")
    assert (stub / "saved").read_text() == "whole\n"
    cluster.call(stub, "scancel", number)


@pytest.mark.parametrize("crashed", [False, True])
@pytest.mark.fast("False")
def test_the_cluster_starts_once_and_leaves_nothing(tmp_path_factory: pytest.TempPathFactory, crashed: bool):
    folder = tmp_path_factory.mktemp("own")
    assert slurm.control("status", folder).returncode == 3
    first = slurm.control("start", folder)
    assert first.returncode == 0 and first.stdout == f"export SLURM_CONF={folder}/slurm.conf\n"
    daemons = (folder / "slurmctld.pid").read_text()
    assert slurm.control("start", folder).stdout == first.stdout
    assert (folder / "slurmctld.pid").read_text() == daemons, "the second start finds the first"
    assert "low*         up   infinite      1   idle node1" in slurm.control("status", folder).stdout
    cluster = slurm.Cluster(folder)
    number = cluster.submit(folder, "--output=/dev/null", "--wrap", 'trap : TERM; srun bash -c "trap : TERM; sleep 99"')
    cluster.wait(number, "RUNNING")
    slurm.wait_until(lambda: len(cluster.processes(number)) >= 4, 30, lambda: "shell, srun, shell, sleep")
    if crashed:
        for daemon in ("slurmctld", "slurmd-node1"):
            os.kill(int((folder / f"{daemon}.pid").read_text()), signal.SIGKILL)
        assert slurm.control("status", folder).returncode == 3
    assert slurm.control("stop", folder).returncode == 0
    assert not processes_of(folder)
    assert slurm.control("status", folder).returncode == 3
    assert slurm.control("stop", folder).returncode == 0


def processes_of(folder: Path) -> list[str]:
    """Processes that name the folder in their command line or environment, zombies aside."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            text = (place / "cmdline").read_bytes() + (place / "environ").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in text:
            found.append(text.decode(errors="replace"))
    return found


def test_mistakes_are_one_line(tmp_path: Path):
    nobody = ["setpriv", "--reuid=65534", "--clear-groups"]
    cases = [
        (["start"], 2, "usage: local_cluster.sh"),
        (["start", str(tmp_path / "a"), "none"], 1, "NODES=none must be a number"),
        (["start", str(tmp_path / ("a" * 80))], 1, "must have at most 70 characters"),
    ]
    for words, code, text in cases:
        done = subprocess.run(["bash", str(slurm.SCRIPT), *words], text=True, capture_output=True)
        assert done.returncode == code and text in done.stderr and len(done.stderr.splitlines()) == 1
    done = subprocess.run([*nobody, "bash", str(slurm.SCRIPT), "start", "/tmp/x"], text=True, capture_output=True)
    assert done.returncode == 1 and done.stderr == "local_cluster.sh: must be started by root\n"
