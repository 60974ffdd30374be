"""Train on two hosts, cut the cable between them, and go on: both sides must end by themselves and say who is silent.

    python scripts/durability/two_hosts.py [--launch variables|torchrun|rendezvous] [--ranks-per-host 1] [--heartbeat 5]

The hosts are network namespaces of this machine (root and iproute2), with a name and an address each and a cable (veth)
between; they share the disk. The experts are spread over both. Their names resolve to 127.0.1.1, as on a fresh Debian.
A cut cable is the worst case: no error reaches either side. Each must end within the heartbeat and ten seconds, with a
code other than 0 and a line that names the other; the same command then goes on from the last checkpoint, and every
step has read the tokens of a run that nobody disturbed.

``--launch`` is how the ranks start: with the variables RANK, WORLD_SIZE, MASTER_ADDR; with torchrun and a fixed master;
with torchrun and a rendezvous (``c10d``), whose agent on the second host still waits for the first one minutes after
its workers have ended, and is killed here.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

REPOSITORY = Path(__file__).parents[2]
SKIPPED = 77
STEPS, CUT_AT, EVERY_STEPS = 100, 20, 5
MARGIN_SECONDS = 30.0
PATIENCE_SECONDS = 240.0
PORT = 29511
TINY = [
    *("model.vocab_size=512", "model.sequence_length=64", "model.num_layers=2", "model.hidden_size=32"),
    *("model.moe.num_experts=4", "model.moe.expert_hidden_size=32", "data=files", "data.paths=[corpus.jsonl]"),
    *("data.validation_fraction=0.1", "batch.global_batch_tokens=1024", f"budget.tokens={STEPS * 1024}"),
    *("schedule.warmup_steps=2", "evaluation.max_rows=16", "evaluation.every_steps=1000", "engine.device=cpu"),
    *(f"checkpoint.every_steps={EVERY_STEPS}", "metrics.log_every_steps=1", "metrics.wandb=off"),
    "run.prepare_workers=1",
]


class Hosts:
    """Two namespaces and the cable between them."""

    def __init__(self) -> None:
        self.names = [f"host-{letter}" for letter in "ab"]
        self.addresses = ["10.77.0.1", "10.77.0.2"]
        self._spaces = [f"moe{os.getpid()}{letter}" for letter in "ab"]

    def __enter__(self) -> "Hosts":
        first, second = self._spaces
        for space in self._spaces:
            _ip("netns", "add", space)
        _ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for space, address in zip(self._spaces, self.addresses, strict=True):
            _ip("-n", space, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                _ip("-n", space, "link", "set", device, "up")
        return self

    def __exit__(self, *error: object) -> None:
        for space in self._spaces:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True)

    def cable(self, state: str) -> None:
        _ip("-n", self._spaces[1], "link", "set", "cable", state)

    def start(self, number: int, home: Path, words: list[str], log: Path) -> subprocess.Popen[bytes]:
        """Run ``words`` on a host; the process has a session of its own."""
        names = home / "hosts"
        names.write_text("127.0.0.1 localhost\n" + "".join(f"127.0.1.1 {name}\n" for name in self.names))
        prepare = f"mount --bind {shlex.quote(str(names))} /etc/hosts && hostname {self.names[number]}"
        inside = f"{prepare} && exec {shlex.join(words)}"
        with log.open("w", encoding="utf-8") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self._spaces[number], "unshare", "--uts", "--mount", "sh", "-c", inside],
                cwd=home,
                env=_environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def why_not() -> str | None:
    """Reason why two hosts cannot be made here; None if they can."""
    if os.geteuid():
        return "network namespaces need root"
    for program in ("ip", "unshare", "mount"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    try:
        with Hosts() as hosts, tempfile.TemporaryDirectory() as folder:
            if code := hosts.start(0, Path(folder), ["true"], Path(folder) / "log").wait():
                return (
                    f"a namespace with a name of its own cannot be made: {(Path(folder) / 'log').read_text() or code}"
                )
    except subprocess.CalledProcessError as error:
        return f"{shlex.join(error.cmd)}: {error.stderr.strip()}"
    return None


def launch_words(launch: str, number: int, ranks_per_host: int, master: str, address: str) -> list[list[str]]:
    """Command to start on host ``number``: one, or one per rank."""
    program = [sys.executable, "-m", "moe_pretrain"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    torchrun += ["--nproc-per-node", str(ranks_per_host), "--local-addr", address]
    if launch == "torchrun":
        place = ["--node-rank", str(number), "--master-addr", master, "--master-port", str(PORT)]
        return [[*torchrun, *place, "-m", "moe_pretrain"]]
    if launch == "rendezvous":
        place = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{master}:{PORT}", "--rdzv-id", "two-hosts"]
        return [[*torchrun, *place, "--rdzv-conf", f"is_host={1 - number}", "-m", "moe_pretrain"]]
    shared = ["env", f"WORLD_SIZE={2 * ranks_per_host}", f"MASTER_ADDR={master}", f"MASTER_PORT={PORT}"]
    ranks = range(number * ranks_per_host, (number + 1) * ranks_per_host)
    return [[*shared, f"RANK={rank}", f"LOCAL_RANK={rank % ranks_per_host}", *program] for rank in ranks]


class Attempt:
    """One start of the run on both hosts."""

    def __init__(self, hosts: Hosts, home: Path, name: str, launch: str, ranks_per_host: int, words: list[str]):
        self._processes: list[tuple[int, subprocess.Popen[bytes]]] = []
        self._logs: list[tuple[int, Path]] = []
        for number, address in enumerate(hosts.addresses):
            commands = launch_words(launch, number, ranks_per_host, hosts.addresses[0], address)
            for place, command in enumerate(commands):
                log = home / f"{name}-{hosts.names[number]}-{place}.log"
                self._processes.append((number, hosts.start(number, home, [*command, "train", *words], log)))
                self._logs.append((number, log))

    def text(self, number: int) -> str:
        """Output of a host's processes."""
        return "".join(log.read_text() for host, log in self._logs if host == number)

    def is_over(self) -> bool:
        return all(process.poll() is not None for _, process in self._processes)

    def codes(self, seconds: float) -> list[int]:
        """Exit codes, host by host; -9 for what had to be killed after ``seconds``."""
        deadline = time.monotonic() + seconds
        while not self.is_over() and time.monotonic() < deadline:
            time.sleep(0.05)
        self.kill()
        return [process.wait() for _, process in self._processes]

    def kill(self) -> None:
        for _, process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def rows_of(home: Path, name: str, kind: str = "train") -> list[dict]:
    path = home / "outputs" / name / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in (json.loads(line) for line in lines if line.endswith("}")) if row["kind"] == kind]


def wait_until(what: str, condition, seconds: float, attempt: Attempt) -> float:
    """Wait; the seconds it took."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > seconds:
            fail(f"{what}: not within {seconds:.0f} s", attempt)
        time.sleep(0.05)
    return time.monotonic() - started


def fail(reason: str, attempt: Attempt) -> None:
    for number in (0, 1):
        print(f"--- host {number} ---\n{attempt.text(number)[-4000:]}")
    attempt.kill()
    raise SystemExit(f"FAILED: {reason}")


@contextlib.contextmanager
def working_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="moe-pretrain-") as folder:
        rows = "".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics))
        (Path(folder) / "corpus.jsonl").write_text(rows)
        yield Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launch", choices=("variables", "torchrun", "rendezvous"), default="variables")
    parser.add_argument("--ranks-per-host", type=int, default=1)
    parser.add_argument("--heartbeat", type=int, default=5, help="parallel.heartbeat_seconds")
    options = parser.parse_args()
    if reason := why_not():
        print(f"SKIPPED: {reason}")
        raise SystemExit(SKIPPED)
    ranks = 2 * options.ranks_per_host
    words = [*TINY, "batch.micro_batch_size=4", f"parallel.heartbeat_seconds={options.heartbeat}"]
    spread = [f"parallel.expert_parallel_size={ranks}", "run.name=two-hosts"]
    with working_folder() as home, Hosts() as hosts:
        straight = [sys.executable, "-m", "moe_pretrain", "train", *words, "run.name=straight"]
        undisturbed = subprocess.run(
            straight, cwd=home, env=_environment(), capture_output=True, text=True, timeout=600
        )
        if undisturbed.returncode:
            raise SystemExit(f"FAILED: the undisturbed run ended with {undisturbed.returncode}: {undisturbed.stderr}")

        attempt = Attempt(hosts, home, "first", options.launch, options.ranks_per_host, [*words, *spread])
        try:
            wait_until("training", lambda: len(rows_of(home, "two-hosts")) >= CUT_AT or attempt.is_over(), 240, attempt)
            if attempt.is_over():
                fail("it ended before the cable was cut", attempt)
            hosts.cable("down")
            limit = options.heartbeat + MARGIN_SECONDS
            silent = ["sign of life for", "no answer for"]
            seconds = [
                wait_until(
                    f"{hosts.names[number]} names the other",
                    lambda n=number: silent[n] in attempt.text(n),
                    limit,
                    attempt,
                )
                for number in (0, 1)
            ]
            codes = attempt.codes(MARGIN_SECONDS)
            may_linger = options.launch == "rendezvous"
            if any(code == 0 or (code == -signal.SIGKILL and not may_linger) for code in codes):
                fail(f"the attempt whose cable was cut ended with {codes}", attempt)
            lines = [
                next(line for line in attempt.text(number).splitlines() if silent[number] in line) for number in (0, 1)
            ]
            others = ", ".join(str(rank) for rank in range(options.ranks_per_host, ranks))
            named = f"rank{'s' if ',' in others else ''} {others} on {hosts.names[1]}, last seen at step "
            if named not in lines[0] or f"rank 0 on {hosts.names[0]} was last seen at step " not in lines[1]:
                fail(f"the silent side is not named: {lines}", attempt)
            done = rows_of(home, "two-hosts")[-1]["step"]
            print(f"cable cut after step {done}; in {sum(seconds):.0f} s both had named the other; exit codes {codes}:")
            for name, line in zip(hosts.names, lines, strict=True):
                print(f"  {name}: {line}")

            hosts.cable("up")
            attempt = Attempt(hosts, home, "second", options.launch, options.ranks_per_host, [*words, *spread])
            codes = attempt.codes(PATIENCE_SECONDS)
            if any(codes):
                fail(f"the second attempt ended with {codes}", attempt)
        finally:
            attempt.kill()
        (resumed,) = [row for row in rows_of(home, "two-hosts", "event") if row["event"] == "resumed"]
        ours, theirs = rows_of(home, "two-hosts"), rows_of(home, "straight")
        if [row["step"] for row in ours] != list(range(1, STEPS + 1)):
            fail("a step is missing or twice in metrics.jsonl", attempt)
        if [row["data/token_hash"] for row in ours] != [row["data/token_hash"] for row in theirs]:
            fail("other tokens were read", attempt)
        if not done - 2 * EVERY_STEPS <= resumed["step"] <= done:
            fail(f"it went on from step {resumed['step']} and not from the last checkpoint", attempt)
        print(
            f"the same command went on from step {resumed['step']} on {ranks} ranks to step {STEPS}; token hash of "
            f"every step equal to the undisturbed run's ({ours[-1]['data/token_hash']})"
        )


if __name__ == "__main__":
    main()
