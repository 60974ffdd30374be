"""A sweep whose jobs a real SLURM runs: two nodes, one rank on each."""

import json
from pathlib import Path

import pytest
from helpers import slurm
from helpers.runs import STEPS, TINY, files_of_step, rows_of, run, start, train_words

from moe_pretrain.cli import main

pytest.importorskip("submitit", reason="pip install 'moe_pretrain[sweep]'")
pytestmark = pytest.mark.skipif(slurm.missing() is not None, reason=str(slurm.missing()))
TWO_RANKS = ["parallel.processes=2", "parallel.expert_parallel_size=2"]
JOBS = ["seed=0", "seed=1"]
COMMAND = ["train", "--multirun", *TINY, "data=files", "data.paths=[corpus.jsonl]", *TWO_RANKS]
COMMAND += ["checkpoint.every_steps=1000", "seed=0,1", "sweep.name=grid", "hydra/launcher=submitit_slurm"]
COMMAND += ["hydra.launcher.gpus_per_node=0", "hydra.launcher.nodes=2", "hydra.launcher.tasks_per_node=1"]
COMMAND += ["hydra.launcher.cpus_per_task=2"]  # all of a node's: one job at a time


@pytest.fixture
def on_cluster(cluster: slurm.Cluster, monkeypatch: pytest.MonkeyPatch) -> slurm.Cluster:
    """The cluster, which commands started here talk to."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    return cluster


def read(home: Path, job: str, file: str) -> dict:
    return json.loads((home / "outputs" / "grid" / job / file).read_text())


@pytest.mark.slow
def test_a_sweep_survives_preemption_and_the_death_of_its_driver(
    on_cluster: slurm.Cluster, home: Path, request: pytest.FixtureRequest
):
    cluster, command = on_cluster, [*COMMAND, *slurm.stop_in(3, 4, 5)]
    folders = [home / "outputs" / "grid" / job for job in JOBS]
    driver = start(home, *command)
    request.addfinalizer(driver.kill)
    slurm.wait_until(
        lambda: all((folder / "slurm_job.json").exists() for folder in folders) or driver.poll() is not None,
        120,
        lambda: "nothing is submitted",
    )
    assert driver.poll() is None, driver.communicate()
    first, second = (read(home, job, "slurm_job.json")["number"] for job in JOBS)
    assert len(cluster.call(home, "squeue", "--noheader", "--array").splitlines()) == 2, "one for each run"
    cluster.wait_until_stopped(first, ranks=2)
    driver.kill()
    driver.communicate()

    driver = start(home, *command)
    request.addfinalizer(driver.kill)
    urgent = ["sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=:"]
    cluster.tell(
        first, urgent, lambda: rows_of(home, f"grid/{JOBS[0]}"), lambda: cluster.is_in(first, "PENDING", Restarts="1")
    )
    code, _, err = run(home, *train_words("alone", "checkpoint.every_steps=1000", *TWO_RANKS))  # its seed is 0
    assert code == 0, err
    cluster.wait(second, "COMPLETED", wake=True)
    cluster.start_now(first)
    cluster.wait(first, "COMPLETED", wake=True)
    out, err = driver.communicate(timeout=100)
    assert driver.returncode == 0 and "2 jobs: 2 finished" in out, out + err

    states = [read(home, job, "job_state.json") for job in JOBS]
    assert [(state["state"], state["attempts"]) for state in states] == [("finished", 2), ("finished", 1)]
    events = [row for row in rows_of(home, f"grid/{JOBS[0]}", "event") if row["event"] == "stopped"]
    assert [event["message"] for event in events] == ["by SIGUSR1, checkpoint written"]
    ours, theirs = rows_of(home, f"grid/{JOBS[0]}"), rows_of(home, "alone")
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1)), "no step is missing or twice"
    for quantity in ("data/token_hash", "train/loss"):
        assert [row[quantity] for row in ours] == [row[quantity] for row in theirs]
    assert files_of_step(home, f"grid/{JOBS[0]}", STEPS) == files_of_step(home, "alone", STEPS)
    assert read(home, JOBS[0], "slurm_job.json")["number"] == first, "the second driver submitted nothing"

    before = [(folder / "metrics.jsonl").read_bytes() for folder in folders]
    code, out, err = run(home, *command)
    assert code == 0 and "2 jobs: 2 finished" in out, out + err
    assert [read(home, job, "slurm_job.json")["number"] for job in JOBS] == [first, second]
    assert [(folder / "metrics.jsonl").read_bytes() for folder in folders] == before


MISTAKES = [
    (["hydra.launcher.tasks_per_node=2"], "parallel.processes=2 must be hydra.launcher.nodes=2 times"),
    (["sweep.parallel=2"], "sweep.parallel=2 has no effect on SLURM: hydra.launcher.array_parallelism"),
    (["hydra.launcher.partition=lowest"], "SLURM does not take the jobs"),
    (["hydra.launcher.partitoin=low"], "partitoin"),
    (["hydra.launcher.timeout_min=day"], "timeout_min"),
]


@pytest.mark.parametrize("words,fragment", MISTAKES, ids=lambda value: str(value)[:50])
def test_mistakes_are_one_line(
    on_cluster: slurm.Cluster,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: list[str],
    fragment: str,
):
    monkeypatch.chdir(home)
    assert main([*COMMAND, "sweep.name=wrong", *words]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert fragment in lines[-1] and all(line.startswith("sbatch: error: ") for line in lines[:-1])
    assert on_cluster.call(home, "squeue", "--noheader") == ""


def test_without_slurm_it_says_so(home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.chdir(home)
    monkeypatch.setenv("PATH", str(home))
    assert main([*COMMAND, "sweep.name=nowhere"]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert "there is no squeue here" in line
