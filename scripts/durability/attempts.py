"""Training runs forked from a process that has done the slow imports, for scripts that start hundreds of them."""

import ctypes
import gc
import hashlib
import importlib
import json
import logging
import os
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from pydoc_data.topics import topics

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it: many ranks share the cores
warnings.simplefilter("ignore")

import torch
import torch.distributed as dist

from moe_pretrain.checkpoint import store
from moe_pretrain.checkpoint.restore import Reader
from moe_pretrain.config.load import load
from moe_pretrain.config.preflight import RunPlan, preflight
from moe_pretrain.config.schema import Config
from moe_pretrain.run_folder.metrics_file import MetricsRow, read_rows
from moe_pretrain.train.build import train
from moe_pretrain.train.corpora import prepare_corpora

TOKENS_PER_STEP = 1024
_TINY = [
    *("model.vocab_size=512", "model.sequence_length=64", "model.num_layers=2", "model.hidden_size=32"),
    *("model.moe.num_experts=4", "model.moe.expert_hidden_size=32", "data=files", "data.validation_fraction=0.1"),
    *(f"batch.global_batch_tokens={TOKENS_PER_STEP}", "schedule.warmup_steps=2", "evaluation.max_rows=16"),
    *("metrics.log_every_steps=1", "metrics.wandb=off", "engine.check_every_steps=10", "engine.device=cpu"),
    *("run.prepare_workers=1", "parallel.timeout_seconds=60"),
]


STREAM = [
    *("streaming.mode=always", "streaming.shard_bytes=20000", "streaming.window_shards=2"),
    *("streaming.validation_shards=3", "streaming.shards_ahead=2", "streaming.cache_shards=8"),
    "data.validation_fraction=0.3",
]
"""Tokenise the corpus while the run trains on it."""
_LAST_ROW_BYTES = 16_000


@dataclass(frozen=True)
class Topology:
    """Spread of an attempt over ranks."""

    ranks: int
    expert_parallel_size: int
    zero_stage: int = 1

    def overrides(self) -> list[str]:
        return [
            f"parallel.expert_parallel_size={self.expert_parallel_size}",
            f"engine.zero_stage={self.zero_stage}",
        ]


def import_everything() -> None:
    """Pay for imports once, in the process that forks; DeepSpeed and torch import late otherwise."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for late in ("deepspeed.runtime.zero.muon.muon_optimizer", "torch._dynamo", "torch._inductor.compile_fx"):
        importlib.import_module(late)
    gc.freeze()


class Run:
    """One run's folder, and the attempts at finishing it."""

    def __init__(self, home: Path, name: str, num_steps: int, every_steps: int, overrides: Sequence[str] = ()):
        self.folder = home / "outputs" / name
        self.checkpoints = self.folder / "checkpoints"
        self.log = home / f"{name}.log"
        self._home = home
        self._overrides = [
            *_TINY,
            f"data.paths=[{home}/corpus.jsonl]",
            f"run.output_dir={home}/outputs",
            f"run.name={name}",
            f"budget.tokens={num_steps * TOKENS_PER_STEP}",
            f"checkpoint.every_steps={every_steps}",
            f"evaluation.every_steps={every_steps * 5}",
            *overrides,
        ]
        self._count = 0
        self._plans: dict[Topology, tuple[Config, RunPlan]] = {}

    @property
    def words(self) -> list[str]:
        """Overrides of the run's command."""
        return list(self._overrides)

    def write_corpus(self) -> None:
        """Write the text that the run trains on."""
        rows = "".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics))
        (self._home / "corpus.jsonl").write_text(rows)

    def prepare(self) -> None:
        """Write and tokenise the corpus, in a process of its own."""
        self.write_corpus()
        (code,) = wait([_fork(lambda: prepare_corpora(load(self._overrides), print) and 0, self.log)], 300)
        if code:
            raise SystemExit(f"the corpus could not be prepared; see {self.log}")

    def start(self, topology: Topology) -> list[int]:
        """Fork the ranks of one attempt; their process ids."""
        self._count += 1
        meeting = self._home / f"store_{self.folder.name}_{self._count}"
        if topology not in self._plans:
            config = load([*self._overrides, *topology.overrides()])
            self._plans[topology] = config, preflight(config, topology.ranks)
        config, plan = self._plans[topology]

        def rank_body(rank: int) -> int:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(topology.ranks))
            # Handlers of the run are not there yet; a signal now must not be lost on one rank and heeded by another.
            meeting_point = dist.FileStore(str(meeting), topology.ranks)
            seconds = timedelta(seconds=60)
            dist.init_process_group("gloo", store=meeting_point, rank=rank, world_size=topology.ranks, timeout=seconds)
            return train(config, plan)

        return [_fork(lambda rank=rank: rank_body(rank), self.log) for rank in range(topology.ranks)]

    def rows(self, kind: str = "train") -> list[MetricsRow]:
        return [row for row in read_rows(self.folder / "metrics.jsonl") if row["kind"] == kind]

    def step(self) -> int:
        """Step of the last training row that is whole; asked hundreds of times a second, so the end alone is read."""
        try:
            with (self.folder / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _LAST_ROW_BYTES))
                lines = file.read().split(b"\n")[:-1]
        except FileNotFoundError:
            return 0
        for line in reversed(lines):
            if b'"kind": "train"' in line and line.startswith(b"{"):
                return int(json.loads(line)["step"])
        return 0

    def newest(self) -> tuple[Path, dict] | None:
        """The newest checkpoint that verifies; any damage is an error here, since nobody damaged one."""
        return store.newest(self.checkpoints, _fail)

    def named_steps(self) -> list[int]:
        """Steps of the checkpoints that have their name."""
        return sorted(int(path.name[5:]) for path in self.checkpoints.glob("step_*") if path.name[5:].isdigit())

    def is_saving(self) -> bool:
        return any(self.checkpoints.glob("step_*.tmp"))


def _fail(line: str) -> None:
    raise SystemExit(f"FAILED: {line}")


def _fork(body: Callable[[], int | None], log: Path) -> int:
    """A child that runs ``body``, writes to ``log`` and dies with its parent; its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = body() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def poll(processes: list[int]) -> dict[int, int]:
    """Exit codes of the processes that have ended and were not reaped yet, by id; negative for a signal."""
    ended = {}
    for process in processes:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            ended[process] = os.waitstatus_to_exitcode(status)
    return ended


def wait(processes: list[int], seconds: float) -> list[int]:
    """Exit codes of all, in order; what is left after ``seconds`` is killed."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(processes):
        codes |= poll([process for process in processes if process not in codes])
        if time.monotonic() > deadline:
            for process in processes:
                if process not in codes:
                    os.kill(process, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.005)
    return [codes[process] for process in processes]


def fresh_home(folder: Path | None) -> Path:
    """An empty folder to work in."""
    import tempfile

    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="moe-pretrain-", dir=folder))


def remove(home: Path) -> None:
    shutil.rmtree(home, ignore_errors=True)


def array_hashes(run: Run) -> dict[tuple[str, str], str]:
    """Hash of every array (weights, moments, router state) of the run's last checkpoint, whatever ranks wrote it."""
    found = run.newest()
    assert found is not None
    reader = Reader(*found)
    hashes = {}
    for name, intervals in reader.arrays().items():
        parts = [reader.part(own, 0, own.length) for own in sorted(intervals, key=lambda own: own.start)]
        hashes[name] = hashlib.sha256(torch.cat(parts).numpy().tobytes()).hexdigest()
    return hashes


def moment(generator: random.Random, longest: float) -> float:
    """A random duration, short ones as likely as long ones on every scale."""
    return longest * generator.random() ** 3
