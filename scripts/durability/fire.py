"""Hit runs under the product's own launcher with everything at once, and show that each goes on to the same bits.

    python scripts/durability/fire.py [--hits 60] [--seed 0] [--stream] [--folder DIR]

A hit is one of: SIGKILL of a rank or of the launcher, SIGSTOP of a rank, SIGTERM, SIGINT or SIGUSR1 to the launcher. It
comes at a random moment from the first instruction on, every fifth time while the corpus is prepared anew, half of them
while a checkpoint is written; only the newest checkpoint is kept (``checkpoint.keep_last=1``). Every attempt must
end by itself within a bound, with the exit code that its hit asks for, with a stopped rank named, and leave no process
behind. At the end every step was done once, on the tokens of an undisturbed run, and the weights, moments and router
state are equal bit for bit. With ``--stream`` the corpus is tokenised while the run trains on it.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from attempts import STREAM, Run, array_hashes, fresh_home, moment, remove
from helpers.runs import Program, start

from moe_pretrain.checkpoint.store import train_state
from moe_pretrain.system.exit_codes import INTERRUPTED, LOST_RANK, STOPPED

EVERY_STEPS, STEPS_PER_HIT = 2, 8
HEARTBEAT_SECONDS, TIMEOUT_SECONDS = 6, 30
BOUND_SECONDS = 180.0
"""Above the sum of both limits and the launcher's grace, on a machine that does other work too."""
TWO_RANKS = ["parallel.processes=2", "parallel.expert_parallel_size=2"]
ASKED = {signal.SIGTERM: {STOPPED}, signal.SIGUSR1: {STOPPED}, signal.SIGINT: {STOPPED, INTERRUPTED}}
"""Exit codes after a signal that asks; 0 as well, where the run had come to its end."""


class Fire:
    """One run under fire.

    Attributes:
        run: The run's folder and words.
        hits: Number of each kind so far.
        inside_saves: Hits while a checkpoint was written.
        slowest: Longest time from a hit to the end of all processes, seconds.
    """

    def __init__(self, home: Path, run: Run, words: list[str], generator: random.Random, num_hits: int, num_steps: int):
        self.run, self.hits, self.inside_saves, self.slowest = run, Counter[str](), 0, 0.0
        self._home, self._words, self._generator = home, words, generator
        self._num_hits, self._num_steps = num_hits, num_steps

    def attempt(self) -> bool:
        """Start the run once; hit it while hits are left. Whether it came to its end."""
        left = self._num_hits - self.hits.total()
        if left and self._generator.random() < 0.2:
            remove(self._home / "cache")  # the same text again gives the same shards
        program = start(self._home, "train", *self._words)
        if not left:
            return self._check(program, "no hit", {0}, None)
        if not self._await_moment(program, left):
            return self._check(program, "ended before its hit", {0}, None)
        return self._hit(program)

    def _await_moment(self, program: Program, hits_left: int) -> bool:
        """Wait for a random moment of the start, of training or of a save; False if the run has ended before."""
        done = self.run.step()
        fair_share = (self._num_steps - done) // hits_left
        wanted = self._generator.randrange(max(1, min(2 * STEPS_PER_HIT, 2 * fair_share - 4)))
        longest_start = moment(self._generator, 12.0) if wanted < 3 else BOUND_SECONDS
        started = time.monotonic()
        while self.run.step() < done + wanted and time.monotonic() - started < longest_start:
            if program.poll() is not None:
                return False
            time.sleep(0.002)
        if self._generator.random() < 0.5:
            deadline = time.monotonic() + 3.0
            while not self.run.is_saving() and program.poll() is None and time.monotonic() < deadline:
                pass
        time.sleep(moment(self._generator, 0.1))
        return program.poll() is None

    def _hit(self, program: Program) -> bool:
        before = max(self.run.named_steps(), default=0)
        self.inside_saves += self.run.is_saving()
        ranks = children_of(program.pid)
        kinds = ["kill the launcher", *map(str, ASKED)] + (["kill a rank", "stop a rank"] * 2 if ranks else [])
        kind = self._generator.choice(kinds)
        asked = next((number for number in ASKED if str(number) == kind), None)
        named = None
        if asked is not None:
            # A process that has only been made takes the signal as the kernel has it.
            codes = ASKED[asked] | ({0} if catches(program.pid, asked) else {0, -asked})
            program.send_signal(asked)
        elif kind == "kill the launcher":
            program.kill()
            codes = {-signal.SIGKILL}
        else:
            rank = self._generator.randrange(len(ranks))
            send(ranks[rank], signal.SIGKILL if kind == "kill a rank" else signal.SIGSTOP)
            codes = {128 + signal.SIGKILL, LOST_RANK, 0} if kind == "kill a rank" else {LOST_RANK, 2, 0}
            named = f"rank {rank}"
        self.hits[signal.Signals(asked).name if asked is not None else kind] += 1
        finished = self._check(program, kind, codes, named)
        found = self.run.newest()
        after = train_state(found[1]).step if found else 0
        if after < before:
            raise SystemExit(f"FAILED: step {before} was complete, and after the hit ({kind}) only {after} is left")
        return finished

    def _check(self, program: Program, kind: str, codes: set[int], named: str | None) -> bool:
        """Wait for the end of every process; whether the run is finished."""
        hit = time.monotonic()
        ranks = children_of(program.pid)
        bound = BOUND_SECONDS if kind != "no hit" else 3600.0
        out, err = program.communicate(timeout=bound)
        while any(map(is_alive, ranks)):
            if time.monotonic() - hit > bound:
                raise SystemExit(f"FAILED: {kind}: a rank outlives the launcher")
            time.sleep(0.01)
        self.slowest = max(self.slowest, time.monotonic() - hit) if kind != "no hit" else self.slowest
        code = program.returncode
        problem = ""
        if code not in codes:
            problem = f"ended with {code}"
        elif named is not None and code and f"{named} " not in err:
            problem = f"{named} is not named"
        elif named is None and "Traceback" in err:
            problem = "a traceback"
        if problem:
            raise SystemExit(f"FAILED: {kind}: {problem}\n{out[-2000:]}\n{err[-6000:]}")
        return code == 0


def send(process: int, number: int) -> None:
    """Send a signal, if the process is there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def children_of(process: int) -> list[int]:
    """Ranks of a launcher, in order; none before they are started."""
    files = Path(f"/proc/{process}/task").glob("*/children")
    return sorted(int(word) for file in files for word in file.read_text().split())


def catches(process: int, number: int) -> bool:
    """Whether the process has a handler for the signal."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return True
    mask = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
    return bool(mask >> (number - 1) & 1)


def is_alive(process: int) -> bool:
    """Whether the process runs, or is stopped."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hits", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stream", action="store_true", help="tokenise the corpus while the run trains on it")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; a temporary folder by default")
    options = parser.parse_args()
    home = fresh_home(options.folder)
    num_steps = max(12, options.hits * STEPS_PER_HIT)
    overrides = [
        *TWO_RANKS, *(STREAM if options.stream else []), "checkpoint.keep_last=1", "checkpoint.keep_best=0",
        f"run.cache_dir={home}/cache", f"parallel.heartbeat_seconds={HEARTBEAT_SECONDS}",
        f"parallel.timeout_seconds={TIMEOUT_SECONDS}", "run.prepare_workers=2",
    ]  # fmt: skip
    straight = Run(home, "straight", num_steps, EVERY_STEPS, overrides)
    straight.write_corpus()
    calm = Fire(home, straight, straight.words, random.Random(0), 0, num_steps)
    calm.attempt()
    run = Run(home, "fire", num_steps, EVERY_STEPS, overrides)
    fire = Fire(home, run, run.words, random.Random(options.seed), options.hits, num_steps)
    started, attempts = time.monotonic(), 1
    while not fire.attempt():
        attempts += 1
        if attempts % 10 == 0:
            print(f"{fire.hits.total()} hits, step {max(run.named_steps(), default=0)} of {num_steps}", flush=True)
    seconds = time.monotonic() - started
    ours, theirs = run.rows(), straight.rows()
    if [row["step"] for row in ours] != list(range(1, num_steps + 1)):
        raise SystemExit("FAILED: a step is missing or twice in metrics.jsonl")
    for key in ("data/token_hash", "train/loss"):
        if [row[key] for row in ours] != [row[key] for row in theirs]:
            raise SystemExit(f"FAILED: {key} is another")
    if array_hashes(run) != array_hashes(straight):
        raise SystemExit("FAILED: the final weights differ")
    print(
        f"{fire.hits.total()} hits ({fire.inside_saves} inside a save) in {attempts} attempts, {num_steps} steps, "
        f"{seconds / max(1, fire.hits.total()):.1f} s per hit; from a hit to the end of all processes at most "
        f"{fire.slowest:.0f} s"
    )
    print(json.dumps(dict(sorted(fire.hits.items()))))
    print("every step once; token hash and loss of every step, weights, moments and router state bit-identical")
    remove(home)


if __name__ == "__main__":
    main()
