"""Kill a sweep of five schemes and three seeds with -9 at random moments, start it again, and check its answer.

    python scripts/durability/chaos_sweep.py [--kills 2] [--seed 0] [--tokens 204800] [--jobs 2] [--folder DIR]

A kill hits the sweep's first process or, as often, a process of one of its jobs. After the last one the same command
must finish the sweep: every run did each step exactly once, on the tokens that its seed gives all schemes, and what was
finished before a kill is not touched. Then two variants are added: one with a planted mistake, a far too low learning
rate, which `compare` must find worse, and a twin that computes the same, which it must call not distinguishable. Means,
differences and the order are computed again here from `metrics.jsonl`.
"""

import argparse
import contextlib
import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

from attempts import fresh_home, remove

from moe_pretrain.run_folder.metrics_file import MetricsRow, read_rows

ROUTERS, SEEDS = ["top_k", "top_p", "loss_free", "hash", "autonomy"], [1, 2, 3]
TOKENS_PER_STEP = 4096
SHAPE = [
    *("model=tiny", "model.num_layers=2", "model.hidden_size=64", "model.moe.expert_hidden_size=128"),
    *("model.sequence_length=128", "model.vocab_size=2048", "tokenizer.vocab_size=2048", "schedule.warmup_steps=5"),
    *(f"batch.global_batch_tokens={TOKENS_PER_STEP}", "evaluation.max_rows=128", "evaluation.every_steps=25"),
    *("metrics.log_every_steps=1", "metrics.wandb=off", "checkpoint.every_steps=5"),
]
SWEEPS = {
    "schemes": [],
    "twin": ["router=top_k", "model.recompute=full"],
    "worse": ["router=top_k", "optimizer.learning_rate=1e-5"],
}
"""The sweep that is killed, of the schemes asked for, and the variants that are added: overrides by ``sweep.name``."""
PROGRAM = [sys.executable, "-m", "moe_pretrain"]


class Sweep:
    """One sweep, as started from a shell."""

    def __init__(self, home: Path, name: str, options: argparse.Namespace):
        self.outputs, self.log = home / "outputs", home / f"{name}.log"
        self.folder = self.outputs / name
        self.steps = options.tokens // TOKENS_PER_STEP
        self.num_runs = len(SEEDS) * (len(options.schemes) if name == "schemes" else 1)
        added = SWEEPS[name] or [f"router={','.join(options.schemes)}"]
        self._words = [*SHAPE, *added, f"seed={','.join(map(str, SEEDS))}", f"sweep.name={name}"]
        self._words += [f"run.output_dir={self.outputs}", f"budget.tokens={options.tokens}"]
        self._words += [f"sweep.parallel={options.jobs}", *options.overrides]

    def start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            command = [*PROGRAM, "train", "--multirun", *self._words]
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def finish(self) -> None:
        if code := self.start().wait():
            raise SystemExit(f"FAILED: the sweep ended with {code}; see {self.log}")

    def rows(self) -> dict[str, list[MetricsRow]]:
        """Rows of each run that has any, by the run's name."""
        return {path.parent.name: read_rows(path) for path in sorted(self.folder.glob("*/metrics.jsonl"))}

    def steps_done(self) -> int:
        return sum(row["kind"] == "train" for rows in self.rows().values() for row in rows)

    def finished(self) -> dict[str, list[MetricsRow]]:
        return {name: rows for name, rows in self.rows().items() if rows and rows[-1].get("event") == "finished"}


def kill_at_random(sweep: Sweep, generator: random.Random, kills_left: int) -> str:
    """Start the sweep and kill it somewhere on its way; in words, what was hit and when."""
    total, before = sweep.num_runs * sweep.steps, sweep.steps_done()
    target = before + generator.randrange(max(1, (total - before) * 9 // 10 // kills_left))
    process = sweep.start()
    while sweep.steps_done() <= target:
        if process.poll() is not None:
            raise SystemExit(f"FAILED: the sweep ended with {process.returncode} before it was killed; see {sweep.log}")
        time.sleep(0.2)
    time.sleep(generator.random())
    victims = descendants(process.pid) if generator.random() < 0.5 else []
    if victims:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(generator.choice(victims), signal.SIGKILL)
        time.sleep(2 * generator.random())
    process.kill()
    process.wait()
    hit = "a process of a job and then the sweep" if victims else "the sweep"
    return f"{hit} at {sweep.steps_done()} of {total} steps, {len(sweep.finished())} runs finished"


def descendants(process: int) -> list[int]:
    try:
        found = [
            int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text(encoding="utf-8").split()
        ]
    except FileNotFoundError:  # it has ended
        return []
    return found + [deeper for child in found for deeper in descendants(child)]


def seed_of(run: str) -> int:
    return int(run.rpartition("seed=")[2])


def check_runs(sweep: Sweep, kept: dict[str, list[MetricsRow]]) -> str:
    """Every run is whole, runs of one seed have read the same, and what had been finished is as it was."""
    found = sweep.rows()
    read: dict[int, set[tuple[str, ...]]] = {}
    for name, rows in found.items():
        train = [row for row in rows if row["kind"] == "train"]
        if [row["step"] for row in train] != list(range(1, sweep.steps + 1)):
            raise SystemExit(f"FAILED: {name} has the steps {[row['step'] for row in train]}")
        read.setdefault(seed_of(name), set()).add(tuple(row["data/token_hash"] for row in train))
    if len(found) != sweep.num_runs or any(len(hashes) > 1 for hashes in read.values()):
        raise SystemExit(f"FAILED: {len(found)} runs, of one seed {[len(hashes) for hashes in read.values()]} data")
    if any(found.get(name) != rows for name, rows in kept.items()):
        raise SystemExit("FAILED: a finished run was touched")
    resumed = sum(row.get("event") == "resumed" for rows in found.values() for row in rows)
    return f"{len(found)} runs of {sweep.steps} steps, each step once; {len(kept)} kept, {resumed} times one went on"


def check_answer(sweeps: list[Sweep]) -> str:
    """Check the answer of `compare` against the raw rows."""
    outputs = sweeps[0].outputs
    print(subprocess.run([*PROGRAM, "compare", str(outputs)], check=True, capture_output=True, text=True).stdout)
    answer = {row["variant"]: row for row in read_csv(outputs / "compare.csv")}
    variant_of = {row["run"]: row["variant"] for row in read_csv(outputs / "compare_runs.csv")}
    losses: dict[str, dict[int, float]] = {}
    for sweep in sweeps:
        for name, rows in sweep.rows().items():
            last = [row for row in rows if row["kind"] == "validation"][-1]
            variant = variant_of[f"{sweep.folder.name}/{name}"]
            losses.setdefault(variant, {})[seed_of(name)] = last["validation/loss"]
    reference = variant_of[f"schemes/router=top_k,seed={SEEDS[0]}"]
    for name, own in losses.items():
        check_variant(name, answer[name], own, losses[reference])
    for sweep, verdict in (("twin", "not distinguishable"), ("worse", "worse")):
        name = variant_of[f"{sweep}/seed={SEEDS[0]}"]
        if answer[name]["verdict"] != verdict:
            raise SystemExit(f"FAILED: {name} must be {verdict}; compare says {answer[name]['verdict']}")
    if answer[name]["rank"] != str(len(answer)):
        raise SystemExit(f"FAILED: {name} must be last; its place is {answer[name]['rank']}")
    means = {name: fmean(own.values()) for name, own in losses.items()}
    by_page = [line.split(" | ")[1] for line in (outputs / "compare.md").read_text().splitlines()[2:] if " | " in line]
    if [means[name] for name in by_page] != sorted(means.values()):  # twins may stand either way
        raise SystemExit(f"FAILED: by the rows the means are {means}; compare has {by_page}")
    return f"best first, by the raw rows: {', '.join(by_page)}; planted mistake found, twin not distinguishable"


def check_variant(name: str, found: dict[str, str], own: dict[int, float], reference: dict[int, float]) -> None:
    """Mean, difference and direction of one variant, again."""
    wanted = fmean(own.values()), fmean(own[seed] - reference[seed] for seed in SEEDS)
    said = float(found["loss_mean"]), float(found["difference_mean"])
    if max(abs(a - b) for a, b in zip(said, wanted, strict=True)) > 1e-9:
        raise SystemExit(f"FAILED: {name}: compare has loss and difference {said}, the rows {wanted}")
    if found["verdict"] in ("better", "worse") and (found["verdict"] == "worse") != (wanted[1] > 0):
        raise SystemExit(f"FAILED: {name} is {found['verdict']}, but its difference is {wanted[1]}")


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schemes", nargs="+", default=ROUTERS, help="values of router, top_k and another at least")
    parser.add_argument("--tokens", type=int, default=50 * TOKENS_PER_STEP, help="of each run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--folder", type=Path, help="where to work; kept if given")
    parser.add_argument("--overrides", nargs="+", default=[], help="key=value for every run, after the script's own")
    options = parser.parse_args()
    home, generator = fresh_home(options.folder), random.Random(options.seed)
    sweeps = [Sweep(home, name, options) for name in SWEEPS]
    kept: dict[str, list[MetricsRow]] = {}
    for kill in range(options.kills):
        print(f"killed {kill_at_random(sweeps[0], generator, options.kills - kill)}", flush=True)
        kept |= sweeps[0].finished()
    sweeps[0].finish()
    print(check_runs(sweeps[0], kept), flush=True)
    for sweep in sweeps[1:]:
        sweep.finish()
    print(check_answer(sweeps))
    if options.folder is None:
        remove(home)
    else:
        print(f"pages and runs: {home}")


if __name__ == "__main__":
    main()
