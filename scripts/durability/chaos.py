"""Kill a run with -9 at random moments, again and again, and show that it ends as if nobody had.

    python scripts/durability/chaos.py [--kills 50] [--seed 0] [--fixed | --alone | --elastic] [--keep-last N]
                                       [--stream] [--folder DIR]

A run on 1 to 4 processes is killed (one rank, or all; half of the time while a checkpoint is being written, and every
eighth time before it has done a step) and started again, each time on a random topology, or always on two processes
(``--fixed``) or one (``--alone``). After every kill the newest checkpoint must verify and be no older than the newest
complete one before it. At the end every step was done exactly once on the tokens of the uninterrupted run; on the same
topology, and with ``--elastic`` (``engine.determinism=elastic``) on random ones, the losses, weights, moments and
router state are equal bit for bit. With ``--stream`` the corpus is tokenised while the run trains on it. Runs are
forked from a process that has imported everything, so that a kill costs about a second of processor time.
"""

import argparse
import os
import random
import signal
import time
from pathlib import Path

from attempts import STREAM, Run, Topology, array_hashes, fresh_home, import_everything, moment, poll, remove, wait

from moe_pretrain.checkpoint.store import train_state

EVERY_STEPS = 2
STEPS_PER_KILL = 6
TOPOLOGIES = [Topology(1, 1), Topology(2, 1), Topology(2, 2), Topology(2, 2, 2), Topology(4, 2), Topology(1, 1, 0)]
FIXED, ALONE = Topology(2, 2), Topology(1, 1)
ELASTIC_TOPOLOGIES = [*TOPOLOGIES, Topology(4, 4, 2), Topology(4, 1, 0), Topology(4, 2, 2)]
ELASTIC = ["engine.determinism=elastic", "batch.micro_batch_size=2"]
EARLY_STEPS, EARLY_TOLERANCE = 20, 1e-5
"""Relative difference of a step's loss on other topologies while it is rounding alone."""
LATE_TOLERANCE = 5e-2
"""Later, rounding sends single tokens to other experts: two undisturbed runs on two topologies part as far too."""


class Chaos:
    def __init__(self, run: Run, generator: random.Random, topologies: list[Topology], num_kills: int, num_steps: int):
        self.run, self.generator, self.topologies = run, generator, topologies
        self.num_kills, self.num_steps = num_kills, num_steps
        self.kills = self.inside_saves = self.of_one_rank = self.at_start = self.done_again = 0
        self.step_at_start = 0
        self.used: set[Topology] = set()

    def attempt(self) -> bool:
        """Start the run; kill it if kills are left. Whether it came to its end."""
        topology = self.generator.choice(self.topologies)
        self.used.add(topology)
        self.step_at_start = self.run.step()
        processes = self.run.start(topology)
        if self.kills < self.num_kills:
            ended = self.await_moment(processes)
            if not ended:
                self.kill(processes)
                return False
        else:
            ended = dict(zip(processes, wait(processes, 600), strict=True))
        codes = [*ended.values(), *wait([process for process in processes if process not in ended], 60)]
        if any(codes):
            raise SystemExit(f"FAILED: an attempt nobody killed ended with {codes}; see {self.run.log}")
        return True

    def await_moment(self, processes: list[int]) -> dict[int, int]:
        """Wait for a random moment: during start-up, a random number of steps later, or inside a save."""
        done_before = self.run.step()
        if self.generator.random() < 0.125:
            time.sleep(moment(self.generator, 1.0))
            return poll(processes)
        fair_share = (self.num_steps - done_before) // (self.num_kills - self.kills)  # steps are left for the last kill
        wanted = self.generator.randrange(max(1, min(2 * STEPS_PER_KILL, 2 * fair_share - 4)))
        started = time.monotonic()
        while self.run.step() < done_before + wanted:
            ended = poll(processes)
            if ended:
                return ended
            if wanted < 2 and time.monotonic() - started > moment(self.generator, 5.0):
                break
            time.sleep(0.002)
        if self.generator.random() < 0.5:
            deadline = time.monotonic() + 5.0
            while not self.run.is_saving() and time.monotonic() < deadline:
                ended = poll(processes)
                if ended:
                    return ended
                time.sleep(0.001)
            time.sleep(moment(self.generator, 0.02))
        else:
            time.sleep(moment(self.generator, 0.2))
        return poll(processes)

    def kill(self, processes: list[int]) -> None:
        complete = max(self.run.named_steps(), default=0)
        self.at_start += self.run.step() == self.step_at_start
        self.inside_saves += self.run.is_saving()
        self.kills += 1
        if len(processes) > 1 and self.generator.random() < 0.5:
            self.of_one_rank += 1
            os.kill(self.generator.choice(processes), signal.SIGKILL)
            time.sleep(moment(self.generator, 1.0))  # what the others do meanwhile must do no harm either
        for process in processes:
            os.kill(process, signal.SIGKILL)
        wait(processes, 60)
        found = self.run.newest()
        left = train_state(found[1]).step if found else 0
        if left < complete:
            raise SystemExit(f"FAILED: step {complete} was complete, and after the kill only {left} is left")
        self.done_again += self.run.step() - left


def check(run: Run, straight: Run, num_steps: int, exact: bool) -> list[str]:
    """Compare with the uninterrupted run; what was found equal."""
    ours, theirs = run.rows(), straight.rows()
    if [row["step"] for row in ours] != list(range(1, num_steps + 1)):
        raise SystemExit("FAILED: a step is missing or twice in metrics.jsonl")
    hashes = [[row["data/token_hash"] for row in rows] for rows in (ours, theirs)]
    if hashes[0] != hashes[1]:
        raise SystemExit("FAILED: other tokens were read")
    found = [f"token hash of every step equal ({hashes[0][-1]})"]
    differences = [abs(a["train/loss"] / b["train/loss"] - 1) for a, b in zip(ours, theirs, strict=True)]
    early, late = max(differences[:EARLY_STEPS]), max(differences)
    if early > (0 if exact else EARLY_TOLERANCE) or late > (0 if exact else LATE_TOLERANCE):
        raise SystemExit(f"FAILED: the losses differ by {early:.1e} early and {late:.1e} at most")
    found.append(f"largest relative difference of a loss {early:.1e} in {EARLY_STEPS} steps, {late:.1e} in all")
    if exact:
        if array_hashes(run) != array_hashes(straight):
            raise SystemExit("FAILED: the final weights differ")
        found.append("final weights, moments and router state bit-identical")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--fixed", action="store_true", help="always 2 ranks, expert parallel 2")
    modes.add_argument("--alone", action="store_true", help="always 1 process")
    modes.add_argument("--elastic", action="store_true", help="random topologies that must end with the same bits")
    parser.add_argument("--keep-last", type=int, default=None, help="checkpoint.keep_last, with keep_best=0")
    parser.add_argument("--stream", action="store_true", help="tokenise the corpus while the run trains on it")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; a temporary folder by default")
    options = parser.parse_args()
    import_everything()
    home = fresh_home(options.folder)
    num_steps = max(6, options.kills * STEPS_PER_KILL)
    overrides = [*(ELASTIC if options.elastic else []), *(STREAM if options.stream else [])]
    if options.keep_last is not None:
        overrides += [f"checkpoint.keep_last={options.keep_last}", "checkpoint.keep_best=0"]
    topologies = ELASTIC_TOPOLOGIES if options.elastic else TOPOLOGIES
    if is_same := options.fixed or options.alone:
        topologies = [FIXED if options.fixed else ALONE]
    straight = Run(home, "straight", num_steps, EVERY_STEPS, overrides)
    straight.write_corpus() if options.stream else straight.prepare()
    codes = wait(straight.start(ALONE if options.alone else FIXED), 3600)
    if any(codes):
        raise SystemExit(f"FAILED: the uninterrupted run ended with {codes}; see {straight.log}")
    run = Run(home, "chaos", num_steps, EVERY_STEPS, overrides)
    chaos = Chaos(run, random.Random(options.seed), topologies, options.kills, num_steps)
    started = time.monotonic()
    while not chaos.attempt():
        if chaos.kills % 10 == 0:
            print(f"{chaos.kills} kills, step {max(run.named_steps(), default=0)} of {num_steps}", flush=True)
    seconds = time.monotonic() - started
    print(
        f"{chaos.kills} kills with -9 ({chaos.inside_saves} inside a save, {chaos.at_start} before a step was done, "
        f"{chaos.of_one_rank} of one rank first) on {len(chaos.used)} topologies, {num_steps} steps and "
        f"{chaos.done_again} done again, {seconds / max(1, chaos.kills):.1f} s per kill"
    )
    for line in check(run, straight, num_steps, exact=is_same or options.elastic):
        print(line)
    remove(home)


if __name__ == "__main__":
    main()
