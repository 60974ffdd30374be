"""The route of a run, read from top to bottom: build each part in order, then the loop.

The only file that knows all others. ``train`` runs in every worker process; ``cli`` starts the workers.
"""

import json
import os
import platform
import secrets
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from moe_pretrain import data
from moe_pretrain.allocator import keep_freed_memory
from moe_pretrain.batching import BatchPlan, plan_batches
from moe_pretrain.checkpoint import store
from moe_pretrain.config import Config, ConfigError, to_values
from moe_pretrain.engine.deepspeed_config import Dtype, EngineConfig
from moe_pretrain.engine.engine import NonFiniteError, StepResult, TrainEngine
from moe_pretrain.metrics.rows import read_rows
from moe_pretrain.metrics.sinks import MetricsWriter
from moe_pretrain.metrics.statistics import evaluation_row, mixed_evaluation_row, train_row
from moe_pretrain.metrics.throughput import Stopwatch, peak_flops_per_second
from moe_pretrain.model.decoder import DecoderLM
from moe_pretrain.model.init import initialise
from moe_pretrain.model.size import ModelSize, model_size
from moe_pretrain.moe import expert_gate, num_routed_experts
from moe_pretrain.parallel.deepspeed_moe import prepare_experts
from moe_pretrain.parallel.mesh import Mesh, build_mesh, launched_world_size
from moe_pretrain.run_data import Corpora, Corpus, describe_corpus, end_when_exhausted, prepare_corpora
from moe_pretrain.signals import StopRequest
from moe_pretrain.study.report import summarise, write_report

CHECKPOINTS = "checkpoints"
TOKENS_COUNTED = 4_000_000
"""Tokens at the start of the run from which routers learn how often each id occurs."""
_MUST_STAY = ("model", "router", "data", "tokenizer", "packing", "seed")


def train(config: Config) -> int:
    """Train ``config`` to its last step, going on from its newest checkpoint if there is one.

    Returns:
        Exit code: 0 when the run is finished, ``signals.STOPPED`` when a signal ended it after a checkpoint.
    """
    check(config, launched_world_size() or 1)
    folder = config.run.folder
    device_type, dtype = resolve_device(config.engine)
    if device_type == "cpu":
        keep_freed_memory()
    # wandb's own logs stay in the run folder, like everything of a run.
    os.environ.setdefault("WANDB_CACHE_DIR", str((folder / "wandb" / "cache").resolve()))
    mesh = build_mesh(config.parallel, device_type)
    say = print if mesh.is_main else _silent
    plan = plan_batches(config.batch, config.model.sequence_length, mesh.world_size)
    size = model_size(config.model, config.router)
    say(_describe_run(config, plan, size, mesh, dtype))

    corpus, evaluation_sets = _prepare_corpora(config, mesh, say)
    if corpus.tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} must be at least the tokenizer's {corpus.tokenizer.vocab_size}"
        )
    loader = data.TrainLoader(
        corpus.train,
        config.model.sequence_length,
        plan.rows_per_step,
        plan.micro_batch_size,
        mesh.rank,
        mesh.world_size,
        config.seed,
        config.packing.isolate_documents,
        method=config.packing.method,
        reset_positions=config.packing.reset_positions,
    )
    if isinstance(config.data, data.MixtureConfig):
        plan = end_when_exhausted(plan, config.data, loader)
    describe_corpus(corpus, plan, loader, say)

    model = DecoderLM(config.model, config.router, mesh.shard)
    initialise(model, config.seed)
    _tell_token_counts(model, loader, plan, mesh)
    if competition := _describe_competition(config.router.name, model):
        say(competition)
    prepare_experts(model, config.parallel.expert_parallel_size)
    engine = TrainEngine(
        model,
        config.engine,
        dtype,
        config.optimizer,
        lambda step: config.schedule.factor(step, plan.num_steps),
        plan,
        mesh,
        config.seed,
    )

    run = _Run(config, folder, plan, size, corpus, evaluation_sets, loader, engine, mesh, say)
    run.resume()
    with StopRequest(mesh) as stop:
        finished = run.loop(stop)
    run.finish(finished)
    return 0 if finished else stop.exit_code


def _prepare_corpora(config: Config, mesh: Mesh, say: Callable[[str], None]) -> Corpora:
    """Tokenise on the first rank, then open the result on all.

    The others wait in a collective that the first rank joins with every line of progress, so hours of tokenising do not
    look like a rank that hangs.
    """
    number = torch.zeros((), device=mesh.device, dtype=torch.int64)  # of the run; 0 while the first rank is at work
    if not mesh.is_main:
        while not number:
            dist.all_reduce(number)
        return prepare_corpora(config, say, False, int(number))

    def report(line: str) -> None:
        say(line)
        if not number:
            dist.all_reduce(torch.zeros_like(number))

    drawn = 1 + secrets.randbelow(2**31)
    corpora = prepare_corpora(config, report, True, drawn)
    number.fill_(drawn)
    dist.all_reduce(number.clone())
    return corpora


def _tell_token_counts(model: DecoderLM, loader: data.TrainLoader, plan: BatchPlan, mesh: Mesh) -> None:
    """Tell routers that ask how often each token id occurs in the first rows of the run, the same on any topology."""
    routers = [layer.router for layer in model.moe_layers() if layer.router.needs_token_counts]
    if not routers:
        return
    counts = torch.zeros(model.config.vocab_size, dtype=torch.int64)
    # Of a stream only the first step is sure to be there.
    steps = 1 if loader.num_rows is None else min(plan.num_steps, -(-TOKENS_COUNTED // plan.tokens_per_step))
    for step in range(steps):
        loader.reach(step)
        for batch in loader.micro_batches(step):
            counts += torch.bincount(batch.input_ids[batch.document_ids >= 0], minlength=len(counts))
    counts = counts.to(mesh.device)
    dist.all_reduce(counts)
    for router in routers:
        router.use_token_counts(counts)


def check(config: Config, world_size: int) -> None:
    """Everything that can be refused before a process group or a corpus exists.

    Raises:
        ValueError: One line naming the field.
    """
    plan_batches(config.batch, config.model.sequence_length, world_size)
    moe = config.model.moe
    config.parallel.check(world_size, num_routed_experts(moe, config.router))
    device, dtype = resolve_device(config.engine)
    if dtype == "bfloat16" and config.engine.zero_stage == 0:
        raise ValueError("engine.zero_stage=0 must be 1 or 2 with engine.dtype=bfloat16")
    if device == "cuda" and dtype == "bfloat16":
        widths = {"model.hidden_size": config.model.hidden_size}
        rank = expert_gate(moe, config.router)
        if rank is None:
            widths["model.moe.expert_hidden_size"] = moe.expert_hidden_size
        else:
            name = "model.moe.gate_rank" if moe.gate_rank else "router.gate_rank"
            widths |= {name: rank, "model.moe.expert_width_multiple": moe.expert_width_multiple}
        for name, width in widths.items():
            if width % 8:
                raise ValueError(
                    f"{name}={width} must be a multiple of 8 on a GPU in bfloat16: grouped_mm needs 16 bytes"
                )


def resolve_device(config: EngineConfig) -> tuple[str, Dtype]:
    """``auto`` to what this machine has: a GPU with bfloat16, else the CPU with float32."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("engine.device=cuda must be auto or cpu: torch finds no CUDA device")
    if config.dtype == "auto":
        return device, "bfloat16" if device == "cuda" else "float32"
    return device, config.dtype


class _Run:
    """The loop and what it keeps between steps."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        plan: BatchPlan,
        size: ModelSize,
        corpus: Corpus,
        evaluation_sets: dict[str, data.ShardReader],
        loader: data.TrainLoader,
        engine: TrainEngine,
        mesh: Mesh,
        say: Callable[[str], None],
    ):
        self.config, self.folder, self.plan, self.size = config, folder, plan, size
        self.corpus, self.engine, self.mesh, self.say = corpus, engine, mesh, say
        self.evaluation_sets, self.loader = evaluation_sets, loader
        self.exhaustion = loader.exhaustion_steps()
        self.corpus_facts = data.corpus_facts(config.data, corpus)
        self.step = 0
        self.token_hash = 0
        self.saved_step: int | None = None
        self.stopwatch = Stopwatch()
        peak = peak_flops_per_second(torch.cuda.get_device_name()) if mesh.device.type == "cuda" else None
        self.peak_flops = peak
        if mesh.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            _write_run_facts(folder, config, size, corpus, mesh)
        self.metrics = MetricsWriter(
            config.metrics, folder, plan.num_steps, config.run.name, to_values(config), mesh.is_main
        )

    @property
    def tokens(self) -> int:
        return self.step * self.plan.tokens_per_step

    def resume(self) -> None:
        """Go on from the newest good checkpoint, as ``checkpoint.resume`` asks."""
        policy = self.config.checkpoint.resume
        found = store.newest(self.folder / CHECKPOINTS, self.say)
        if found is None and policy == "must":
            raise ConfigError(
                f"checkpoint.resume=must needs a good checkpoint in {self.folder / CHECKPOINTS}; there is none"
            )
        if found is not None and policy == "never":
            raise ConfigError(f"checkpoint.resume=never, but {found[0]} exists; choose another run.name")
        if found is None:
            self.metrics.resume(0)
            self.say(f"starting {self.folder}")
            return
        path, manifest = found
        state = manifest["state"]
        self.loader.restore(state.get("stream"))
        _refuse_changes(state, self.config, self.corpus.fingerprint, self.corpus_facts, path)
        store.restore(self.engine, path, manifest)
        self.step, self.token_hash = state["step"], state["token_hash"]
        self.saved_step = self.step
        if state["tokens"] != self.tokens:
            raise ConfigError(
                f"batch.global_batch_tokens={self.plan.tokens_per_step} must stay "
                f"{state['tokens'] // max(1, self.step)}, with which {path} was made"
            )
        self.metrics.resume(self.step)
        self.metrics.event(self.step, self.tokens, "resumed", f"from {path.name} on {self.mesh.world_size} ranks")

    def loop(self, stop: StopRequest) -> bool:
        """Train until the last step, the end of the data or a signal; False if it was a signal."""
        config, first, last = self.config, self.step, self.plan.num_steps
        if self.step >= last:
            return True
        batches = self.loader.iterate(self.step)
        try:
            for step, micro_batches in self.stopwatch.waits(batches):
                result = self.engine.step(step, micro_batches)
                self.step = step + 1
                self.token_hash = data.wrap_to_int64(self.token_hash + result.token_hash)
                self.stopwatch.count(self.plan.tokens_per_step)
                if self.step % config.metrics.log_every_steps == 0 or self.step == last:
                    self.log(result)
                at_end = self.step == last
                self.note_exhausted(step, at_end)
                stopping = stop.agreed() and not at_end
                # Before the checkpoint, so that a finished run has its last validation.
                if not stopping and (at_end or self.step % config.evaluation.every_steps == 0):
                    self.evaluate()
                if stopping or at_end or self.step % config.checkpoint.every_steps == 0:
                    self.save()
                if stopping:
                    self.metrics.event(self.step, self.tokens, "stopped", f"by {stop.name}, checkpoint written")
                    return False
                if at_end:
                    return True
        except Exception as error:
            # So that whoever compares runs later can tell this one from one that was killed.
            name = "diverged" if isinstance(error, NonFiniteError) else "failed"
            self.metrics.event(self.step, self.tokens, name, " ".join(str(error).split()))
            raise
        finally:
            batches.close()
        self.metrics.event(self.step, self.tokens, "ended", "the source has no rows for another step")
        if self.step > first and self.step % config.evaluation.every_steps:
            self.evaluate()
        self.save()
        return True

    def log(self, result: StepResult) -> None:
        window = self.stopwatch.read()
        size = self.size
        if result.tokens_per_expert.numel():
            # Adaptive schemes are charged for the experts they used, not for those expected.
            size = size.with_experts_per_token(result.experts_per_token)
        row = train_row(
            result,
            self.engine.model,
            window,
            self.engine.learning_rate(self.step - 1),
            size.training_flops_per_token,
            self.mesh.world_size,
            self.peak_flops,
        )
        for name, use in self.loader.source_use(self.step).items():
            row[f"data/{name}/tokens"] = use.rows * self.config.model.sequence_length
            row[f"data/{name}/epochs"] = use.epochs
        hashed = f"{self.token_hash % 2**64:016x}"
        self.metrics.write({"step": self.step, "tokens": self.tokens, **row, "data/token_hash": hashed})

    def note_exhausted(self, step: int, at_end: bool) -> None:
        """Record in which step a source of a mixture begins again, or that the run ends because one has been read."""
        for name, first in self.exhaustion.items():
            if first == step:
                message = f"source {name} has been read once and begins again in a new order"
                self.metrics.event(self.step, self.tokens, "repeats", message)
            elif at_end and first == self.step < self.config.batch.num_steps:
                message = f"source {name} has been read: the run ends, {self.config.batch.num_steps} steps were planned"
                self.metrics.event(self.step, self.tokens, "exhausted", message)

    def evaluate(self) -> None:
        sets, corpus = self.evaluation_sets, self.corpus
        with self.stopwatch.paused():
            losses = {name: self.evaluate_on(reader) for name, reader in sets.items()}
            sizes = {name: _bytes_per_token(reader) for name, reader in sets.items()}
            if isinstance(corpus, data.TokenizedMixture):
                row = mixed_evaluation_row(losses, sizes, corpus.shares)
            else:
                row = evaluation_row(self.evaluate_on(corpus.validation), _bytes_per_token(corpus.validation))
        for name, loss in losses.items():
            own = evaluation_row(loss, sizes[name])
            row |= {key.replace("validation/", f"validation/{name}/"): value for key, value in own.items()}
        self.metrics.write({"step": self.step, "tokens": self.tokens, **row})

    def evaluate_on(self, reader: data.ShardReader) -> float:
        """Mean nats per token of one set."""
        batches = data.validation_batches(
            reader,
            self.config.model.sequence_length,
            self.plan.micro_batch_size,
            self.mesh.rank,
            self.mesh.world_size,
            self.config.evaluation.max_rows,
            self.config.packing.isolate_documents,
            self.config.packing.reset_positions,
        )
        return self.engine.evaluate(batches).loss

    def save(self) -> None:
        if self.saved_step == self.step:
            return
        with self.stopwatch.paused():
            self.metrics.sync()
            started = time.perf_counter()
            state = {
                "step": self.step,
                "tokens": self.tokens,
                "token_hash": self.token_hash,
                "corpus_fingerprint": self.corpus.fingerprint,
                "corpus_facts": self.corpus_facts,
                "stream": self.loader.state(self.step),
                "config": to_values(self.config),
                "world_size": self.mesh.world_size,
                "versions": _versions(),
            }
            path = store.save(self.engine, self.folder / CHECKPOINTS, state, self.config.checkpoint.keep_last)
            self.saved_step = self.step
            seconds = time.perf_counter() - started
        self.metrics.event(self.step, self.tokens, "checkpoint", f"{path.name} written in {seconds:.1f} s")

    def finish(self, finished: bool) -> None:
        """Close the sinks, write the report, say where things are."""
        if finished:
            self.metrics.event(self.step, self.tokens, "finished", f"after {self.step} steps")
        self.metrics.close()
        if not self.mesh.is_main:
            return
        self.say(f"run folder: {self.folder}")
        for name, use in self.loader.source_use(self.step).items():
            tokens = use.rows * self.config.model.sequence_length
            self.say(f"source {name}: {tokens:,} tokens, {use.epochs:.2f} epochs")
        if not finished:
            self.say(f"stopped at step {self.step}; the same command goes on from there")
        if not any(row["kind"] == "train" for row in read_rows(self.folder / "metrics.jsonl")):
            return  # stopped before the first row: there is nothing to report yet
        report = write_report(self.folder)
        summary = summarise(self.folder)
        if finished:
            self.say(
                f"done: {self.step} steps, {self.tokens:,} tokens; validation loss "
                f"{summary['final_validation_loss']:.3f} nats/token, unigram entropy "
                f"{self.corpus.unigram_entropy:.3f} nats/token"
            )
        self.say(f"report:     {report}")


def _refuse_changes(
    state: dict[str, Any], config: Config, fingerprint: str, corpus_facts: dict[str, Any], path: Path
) -> None:
    """Raise if what must stay the same over a resume has changed."""
    now = json.loads(json.dumps(to_values(config)))
    for part in _MUST_STAY:
        for name, (then_value, now_value) in _differences(part, state["config"].get(part), now[part]).items():
            if name in ("model.recompute", "model.cross_entropy_chunk_tokens"):
                continue  # change speed and memory, not the run
            raise ConfigError(
                f"{name}={now_value} must stay {then_value}, with which {path} was made; choose another run.name to "
                "start anew"
            )
    if state["corpus_fingerprint"] != fingerprint:
        raise ConfigError(
            f"data: the corpus has changed since {path} was made: "
            f"{data.explain_change(state.get('corpus_facts', {}), corpus_facts)}; choose another run.name to start anew"
        )


def _differences(name: str, then: Any, now: Any) -> dict[str, tuple[Any, Any]]:
    if isinstance(then, dict) and isinstance(now, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted(then.keys() | now.keys()):
            found.update(_differences(f"{name}.{key}", then.get(key), now.get(key)))
        return found
    return {} if then == now else {name: (then, now)}


def _bytes_per_token(reader: data.ShardReader) -> float | None:
    """None for a corpus that came as tokens."""
    return reader.text_bytes / reader.num_tokens if reader.text_bytes else None


def _describe_run(config: Config, plan: BatchPlan, size: ModelSize, mesh: Mesh, dtype: Dtype) -> str:
    ranks = f"{mesh.world_size} rank{'s' if mesh.world_size > 1 else ''}"
    return (
        f"{config.run.name}: {size.total_parameters / 1e6:,.1f}M parameters, "
        f"{size.active_parameters / 1e6:,.1f}M active; "
        f"{plan.num_steps} steps of {plan.tokens_per_step:,} tokens ({plan.accumulation} micro-batches of "
        f"{plan.micro_batch_size} rows on each of {ranks}, {mesh.device.type}, {dtype}, expert parallel "
        f"{mesh.shard.size}, ZeRO {config.engine.zero_stage})"
    )


def _describe_competition(name: str, model: DecoderLM) -> str | None:
    """A loud line for a scheme whose routes in training depend on later tokens; None for the others."""
    routers = [layer.router for layer in model.moe_layers()]
    if all(router.causal_in_training for router in routers):
        return None
    evaluation = (
        "evaluation is causal: judge by the validation loss"
        if all(router.causal_in_evaluation for router in routers)
        else "so is evaluation: neither loss is that of a language model that generates"
    )
    return (
        f"NOT CAUSAL IN TRAINING: with router={name} the tokens of a micro-batch compete, so a token's experts depend "
        f"on later tokens, on other sequences and on the micro-batch's size; {evaluation}"
    )


def _write_run_facts(folder: Path, config: Config, size: ModelSize, corpus: Corpus, mesh: Mesh) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(to_values(config))), sort_keys=False))
    device = torch.cuda.get_device_name() if mesh.device.type == "cuda" else platform.processor() or "cpu"
    facts = {
        "total_parameters": size.total_parameters,
        "active_parameters": size.active_parameters,
        "flops_per_token": size.training_flops_per_token,
        "unigram_entropy": corpus.unigram_entropy,
        "corpus_fingerprint": corpus.fingerprint,
        "versions": _versions(),
        "device": device,
    }
    (folder / "summary.json").write_text(json.dumps(facts, indent=2))


def _versions() -> dict[str, str]:
    packages = ("moe_pretrain", "torch", "deepspeed", "transformers", "datasets")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _silent(line: str) -> None:
    """What ranks other than the first say."""
