"""Start one run twice on one folder, again and again, and show that exactly one of the two ever writes.

    python scripts/durability/two_starts.py [--rounds 50] [--steps 150] [--seed 0] [--folder DIR]

Each round starts a run twice at the same moment, on random topologies. One must train and the other be refused with a
line that names the first. Then the first is killed with -9, in half of the rounds all but one stopped rank of it, an
orphan, and the run is started a third time: it must wait for the orphan and go on once that one is gone. At the end
every step was done exactly once, on the tokens of an undisturbed run, the newest checkpoint verifies
and nothing half written is left.
"""

import argparse
import os
import random
import signal
import time
from pathlib import Path

from attempts import Run, Topology, fresh_home, import_everything, poll, remove, wait

from moe_pretrain.run_folder import lock as ownership

TOPOLOGIES = [Topology(1, 1), Topology(2, 1), Topology(2, 2)]
EVERY_STEPS = 2
DUEL_SECONDS, PATIENCE_SECONDS = 1.0, 60.0
ORPHAN_SECONDS = 2.0


def wait_until(what: str, condition, run: Run, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"FAILED: {what}: not within {seconds:.0f} s; see {run.log}")
        time.sleep(0.01)


def duel(run: Run, generator: random.Random) -> list[int]:
    """Start twice; the ranks of the one that trains. The other's first rank must have been refused."""
    ownership._WAIT_SECONDS = DUEL_SECONDS
    starts = [run.start(generator.choice(TOPOLOGIES)) for _ in range(2)]
    firsts = {ranks[0]: ranks for ranks in starts}
    ended: dict[int, int] = {}
    wait_until("one of two is refused", lambda: ended.update(poll([r for r in firsts if r not in ended])) or ended, run)
    if len(ended) == 2:
        raise SystemExit(f"FAILED: both starts have ended, with {ended}; see {run.log}")
    (loser,) = ended
    (winner,) = (ranks for first, ranks in firsts.items() if first != loser)
    log = run.log.read_text()
    if not ended[loser] or f"is in use by process {winner[0]} on " not in log:
        raise SystemExit(f"FAILED: the second start ended with {ended[loser]}; see {run.log}")
    if any(code == 0 for code in wait(firsts[loser][1:], PATIENCE_SECONDS)):
        raise SystemExit(f"FAILED: a rank of the second start has trained; see {run.log}")
    return winner


def one_round(home: Path, number: int, num_steps: int, generator: random.Random, hashes: list[str]) -> bool:
    """Whether there was an orphan."""
    run = Run(home, f"twice-{number}", num_steps, EVERY_STEPS)
    winner = duel(run, generator)
    wait_until("the first trains", lambda: len(run.rows()) > 2 * EVERY_STEPS, run)
    orphan = winner[-1] if len(winner) > 1 and generator.random() < 0.75 else None
    if orphan is not None:
        os.kill(orphan, signal.SIGSTOP)
    for process in winner:
        if process != orphan:
            os.kill(process, signal.SIGKILL)
    wait([process for process in winner if process != orphan], PATIENCE_SECONDS)
    before = run.named_steps(), len(run.rows())
    ownership._WAIT_SECONDS = PATIENCE_SECONDS
    third = run.start(generator.choice(TOPOLOGIES))
    if orphan is not None:
        time.sleep(ORPHAN_SECONDS)
        if (run.named_steps(), len(run.rows())) != before:
            raise SystemExit(f"FAILED: the third start wrote while an orphan was alive; see {run.log}")
        os.kill(orphan, signal.SIGKILL)
        wait([orphan], PATIENCE_SECONDS)
    if any(codes := wait(third, 300.0)):
        raise SystemExit(f"FAILED: the third start ended with {codes}; see {run.log}")
    if [row["step"] for row in run.rows()] != list(range(1, num_steps + 1)):
        raise SystemExit("FAILED: a step is missing or twice in metrics.jsonl")
    if [row["data/token_hash"] for row in run.rows()] != hashes:
        raise SystemExit("FAILED: other tokens were read")
    for path in sorted(run.checkpoints.glob("step_*")):
        if path.suffix:
            raise SystemExit(f"FAILED: {path} was left behind")
    run.newest()  # fails on any damage
    return orphan is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--steps", type=int, default=150, help="of each run; they must take longer than a second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; a temporary folder by default")
    options = parser.parse_args()
    import_everything()
    home = fresh_home(options.folder)
    straight = Run(home, "straight", options.steps, EVERY_STEPS)
    straight.prepare()
    if any(codes := wait(straight.start(Topology(1, 1)), 600)):
        raise SystemExit(f"FAILED: the undisturbed run ended with {codes}; see {straight.log}")
    hashes = [row["data/token_hash"] for row in straight.rows()]
    generator = random.Random(options.seed)
    orphans = sum(one_round(home, number, options.steps, generator, hashes) for number in range(options.rounds))
    print(
        f"{options.rounds} runs started twice at once: one trained and one was refused, every time; {orphans} started "
        f"again beside an orphan waited for its end; token hash of every step equal ({hashes[-1]})"
    )
    remove(home)


if __name__ == "__main__":
    main()
