"""One run started twice on one folder: one trains, the other is refused and changes nothing."""

import signal
from pathlib import Path

from helpers.runs import rows_of, run, start, train_words, wait_for_step

LONG = ["batch.total_tokens=100000000", "checkpoint.every_steps=1000", "evaluation.every_steps=100000"]


def test_of_two_starts_at_once_one_trains_and_the_other_is_refused(home: Path):
    """Two rounds, on one process and on two; a killed owner does not keep the next start waiting."""
    name, folder = "twice", home / "outputs" / "twice"
    words = train_words(name, *LONG)
    for attempt, more in enumerate(([], ["parallel.processes=2", "parallel.expert_parallel_size=2"])):
        seeds = {f"schedule.warmup_steps={number}": None for number in (2, 3)}
        started = {seed: start(home, *words, *more, seed) for seed in seeds}
        while all(process.poll() is None for process in started.values()):
            signal.sigtimedwait([], 0.05)
        ((loser, refused),) = [(seed, process) for seed, process in started.items() if process.poll() is not None]
        ((winner, owner),) = [(seed, process) for seed, process in started.items() if seed != loser]
        _, err = refused.communicate(timeout=60)
        last = err.strip().splitlines()[-1]
        assert refused.returncode == 2, err
        assert f"run.name={name} must be another one" in last and f"process {owner.pid} on" in last
        assert "Traceback" not in err
        wait_for_step(home, name, 3, owner)
        assert (folder / "overrides.txt").read_text().splitlines().count(winner) == 1
        assert loser not in (folder / "overrides.txt").read_text(), "the second start has written nothing"
        owner.kill()
        owner.communicate()
        rows = rows_of(home, name)
        steps = [row["step"] for row in rows]
        assert steps == list(range(1, len(rows) + 1)) and {row["attempt"] for row in rows} == {attempt}
    code, _, err = run(home, *words, "batch.total_tokens=4096")
    assert code == 0 and "in use" not in err, "what was killed is gone, on all its processes"
