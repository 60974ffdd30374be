"""Send signals to a run at random moments, and show that each leaves a complete checkpoint of the step it stopped at.

    python scripts/durability/signal_storm.py [--moments 30] [--seed 0] [--folder DIR]

On 1, 2 and 4 processes in turn: SIGTERM, SIGINT or SIGUSR1 to all ranks or to one, during start-up, training,
evaluation, saving or the report. The ranks must all end with 75 within the grace time (0 if the run was finished
before), and the newest checkpoint must be of the last step in the metrics. A second SIGINT must end a process at once.
"""

import argparse
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

from attempts import Run, Topology, fresh_home, import_everything, moment, remove, wait

from moe_pretrain.checkpoint.store import train_state
from moe_pretrain.system.exit_codes import INTERRUPTED, STOPPED
from moe_pretrain.system.stop_signals import HANDLED

GRACE_SECONDS = 60.0
TOPOLOGIES = [Topology(1, 1), Topology(2, 2), Topology(4, 2)]
PHASES = ("start-up", "training", "saving", "evaluation", "the end")
NUM_STEPS = 30


def await_phase(run: Run, phase: str, generator: random.Random) -> None:
    """Wait until the run is about to be in ``phase``, and a little longer."""
    first = run.step()

    def is_there() -> bool:
        if phase == "saving":
            return run.is_saving()
        if phase == "evaluation":  # it comes after the fifth row, and at the end
            return run.step() - first >= 5 and (run.step() % 5 == 0)
        return run.step() >= (NUM_STEPS if phase == "the end" else first + 1)

    if phase == "start-up":
        return time.sleep(moment(generator, 3.0))
    deadline = time.monotonic() + GRACE_SECONDS
    while not is_there() and run.step() < NUM_STEPS and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(moment(generator, 0.1))


def one_moment(home: Path, number: int, generator: random.Random) -> tuple[str, str]:
    """Start, signal, check, go on to the end; the phase and how it ended."""
    topology = TOPOLOGIES[number % len(TOPOLOGIES)]
    phase = PHASES[number // len(TOPOLOGIES) % len(PHASES)]
    run = Run(home, f"storm-{number}", NUM_STEPS, 1, ["checkpoint.keep_last=2"])
    processes = run.start(topology)
    await_phase(run, phase, generator)
    number_sent = generator.choice(HANDLED)
    targets = processes if generator.random() < 0.5 else [generator.choice(processes)]
    for process in targets:
        os.kill(process, number_sent)
    sent = time.monotonic()
    codes = wait(processes, GRACE_SECONDS)
    seconds = time.monotonic() - sent
    where = f"{number_sent.name} to {len(targets)} of {topology.ranks} ranks, {phase}: {codes}; see {run.log}"
    if -number_sent in codes and not run.folder.exists():
        return phase, "before there was an engine: ended, nothing to save"
    if set(codes) not in ({STOPPED}, {0}):
        raise SystemExit(f"FAILED: {where}")
    found = run.newest()
    rows = run.rows()
    done = rows[-1]["step"] if rows else 0
    if found is not None or rows:
        saved = train_state(found[1]).step if found else None
        if saved != done or (codes[0] == 0 and done != NUM_STEPS):
            raise SystemExit(f"FAILED: {done} steps are done and {saved} are saved, {where}")
    ending = "finished before it" if codes[0] == 0 else "saved and stopped"
    return phase, f"{ending}, at most {int(seconds / 10 + 1) * 10} s"


def second_interrupt(home: Path) -> float:
    """Seconds from a second SIGINT to the end of a rank whose peer is stopped, which waits in a collective for ever."""
    run = Run(home, "interrupts", NUM_STEPS, 1, ["parallel.heartbeat_seconds=600"])
    processes = run.start(Topology(2, 2))
    await_phase(run, "training", random.Random(0))
    os.kill(processes[1], signal.SIGSTOP)
    time.sleep(1.0)
    for _ in range(2):
        os.kill(processes[0], signal.SIGINT)
        time.sleep(0.1)
    sent = time.monotonic()
    (code,) = wait(processes[:1], GRACE_SECONDS)
    seconds = time.monotonic() - sent
    os.kill(processes[1], signal.SIGKILL)
    wait(processes[1:], GRACE_SECONDS)
    if code != INTERRUPTED:
        raise SystemExit(f"FAILED: a second SIGINT ended the rank with {code} after {seconds:.1f} s")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; a temporary folder by default")
    options = parser.parse_args()
    import_everything()
    home = fresh_home(options.folder)
    Run(home, "prepare", NUM_STEPS, 1).prepare()
    generator = random.Random(options.seed)
    endings = Counter(one_moment(home, number, generator) for number in range(options.moments))
    print(f"{options.moments} signals on 1, 2 and 4 processes, every one heeded as it should be:")
    for (phase, ending), count in sorted(endings.items()):
        print(f"  {count:3d} in {phase}: {ending}")
    print(f"a second SIGINT ends a rank that waits for a stopped one in {second_interrupt(home):.1f} s")
    remove(home)


if __name__ == "__main__":
    main()
