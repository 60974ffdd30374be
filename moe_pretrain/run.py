"""The loop of a run and what it keeps between steps: resume, train, evaluate, save, stop, finish."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moe_pretrain import data
from moe_pretrain.batching import BatchPlan
from moe_pretrain.budget import Meter
from moe_pretrain.checkpoint import store
from moe_pretrain.checkpoint.compatibility import changes
from moe_pretrain.checkpoint.manifest import complete_names, step_of
from moe_pretrain.config import Config, ConfigError, to_values
from moe_pretrain.data.packing import MicroBatch
from moe_pretrain.engine.deepspeed_config import Dtype
from moe_pretrain.engine.engine import NonFiniteError, TrainEngine
from moe_pretrain.engine.results import StepResult
from moe_pretrain.evaluation import Evaluator
from moe_pretrain.facts import versions, write_facts
from moe_pretrain.faults import Faults
from moe_pretrain.metrics.probe import Probe, ProbeFiles, routing_drift
from moe_pretrain.metrics.router_health import RouterHealth
from moe_pretrain.metrics.rows import read_rows
from moe_pretrain.metrics.sinks import MetricsWriter
from moe_pretrain.metrics.statistics import train_row
from moe_pretrain.metrics.throughput import Stopwatch, peak_flops_per_second
from moe_pretrain.model.size import ModelSize
from moe_pretrain.parallel.mesh import Mesh
from moe_pretrain.run_data import Corpus
from moe_pretrain.signals import STOPPED, UNSAVED, StopRequest
from moe_pretrain.spikes import Rewind, Rewinds, SpikeDetector
from moe_pretrain.study.report import summarise, write_report

SICK_STEPS = "sick_steps"
FINISHED = 0


class Run:
    """The loop and what it keeps between steps."""

    def __init__(
        self,
        config: Config,
        plan: BatchPlan,
        size: ModelSize,
        dtype: Dtype,
        meter: Meter,
        corpus: Corpus,
        evaluation_sets: dict[str, data.ShardReader],
        loader: data.TrainLoader,
        engine: TrainEngine,
        mesh: Mesh,
        faults: Faults,
        stop: StopRequest,
        enter: Callable[[str, int], None],
        say: Callable[[str], None],
    ):
        """Open the run's folder; every rank makes one, at the same time.

        Args:
            config: The run's configuration.
            plan: Its batches.
            size: Its model's size.
            dtype: What it computes in.
            meter: What counts what it spends, and says when it is over.
            corpus: What it trains on.
            evaluation_sets: Further validation sets by name.
            loader: What yields its micro-batches.
            engine: Its model under DeepSpeed.
            mesh: This rank's place.
            faults: What is injected.
            stop: What is asked to stop, and agrees on it.
            enter: Called with the phase and step that begin.
            say: Prints a line, on the main rank.
        """
        self.config, self.folder, self.plan, self.size = config, config.run.folder, plan, size
        self.corpus, self.engine, self.mesh, self.say = corpus, engine, mesh, say
        self.stop, self.enter, self.loader, self.faults, self.meter = stop, enter, loader, faults, meter
        self.exhaustion = loader.exhaustion_steps()
        self.corpus_facts = data.corpus_facts(config.data, corpus)
        self.probes = ProbeFiles(self.folder)
        self.evaluator = Evaluator(config, plan, corpus, evaluation_sets, engine, stop, enter)
        self.step = 0
        self.token_hash = 0
        self.saved_step: int | None = None
        self.validation_loss: float | None = None  # at this very step
        self.rewinds, self.spikes = Rewinds(), SpikeDetector(config.spike)
        self.spike: str | None = None  # in the last step, in words
        self.stopwatch = Stopwatch()
        self.peak_flops = peak_flops_per_second(torch.cuda.get_device_name()) if mesh.device.type == "cuda" else None
        layers = [layer.router.layer for layer in engine.model.moe_layers()]
        self.health = RouterHealth(layers, config.metrics.router_health_steps)
        if mesh.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_facts(config, size, dtype, corpus, mesh)
        self.saver = store.Saver(
            engine, self.folder / store.CHECKPOINTS, config.checkpoint, config.parallel.timeout_seconds, faults
        )
        self.metrics = MetricsWriter(
            config.metrics, self.folder, plan.num_steps, config.run.name, to_values(config), mesh.is_main
        )

    @property
    def tokens(self) -> int:
        """Tokens consumed so far."""
        return self.step * self.plan.tokens_per_step

    @property
    def data_step(self) -> int:
        """Where the next step reads, in steps of the data's order: ahead of ``step`` by what was left out."""
        return self.rewinds.data_step(self.step)

    def resume(self) -> None:
        """Go on from the newest good checkpoint, as ``checkpoint.resume`` asks."""
        policy = self.config.checkpoint.resume
        warnings: list[str] = []
        self.rewinds = Rewinds(self.mesh.share(Rewinds.read(self.folder).taken if self.mesh.is_main else None))
        found = self._newest(warnings.append)
        if found is None and policy == "must":
            raise ConfigError(
                f"checkpoint.resume=must needs a good checkpoint in {self.folder / store.CHECKPOINTS}; there is none"
                + "".join(f"; {warning}" for warning in warnings)
            )
        if found is not None and policy == "never":
            raise ConfigError(f"checkpoint.resume=never, but {found[0]} exists; choose another run.name")
        if found is None:
            self._leave_course(-1)
            self._forget_after(0)
            self._report_damage(warnings)
            self.say(f"starting {self.folder}")
            if self.config.checkpoint.warm_start is not None:
                self._warm_start(Path(self.config.checkpoint.warm_start))
            return
        path, manifest = found
        allowed = self._refuse_changes(manifest["state"], path)
        self.loader.restore(manifest["state"].get("stream"))
        self._go_on_from(path, manifest)
        self._report_damage(warnings)
        self._event("resumed", f"from {path.name} on {self.mesh.world_size} ranks")
        if "flops" not in manifest["state"]:
            self._event("budget", f"{path.name} does not say what it spent: FLOPs are taken as expected, seconds as 0")
        if allowed:
            self._event("changed", f"since {path.name}: {', '.join(allowed)}")

    def _newest(self, warn: Callable[[str], None], latest: float = math.inf) -> tuple[Path, dict[str, Any]] | None:
        """The newest good checkpoint on the run's course, of ``latest`` steps at most."""

        def accept(state: dict[str, Any]) -> bool:
            return state["step"] <= latest and self.rewinds.accept(state)

        return store.agree_on_newest(self.folder / store.CHECKPOINTS, self.mesh, warn, accept)

    def _go_on_from(self, path: Path, manifest: dict[str, Any]) -> None:
        """Take over a checkpoint's state."""
        state = manifest["state"]
        recorded = [Rewind(**fields) for fields in state.get("rewinds", [])]
        if len(recorded) > len(self.rewinds.taken):
            self.rewinds = Rewinds(recorded)
        self._leave_course(state["step"])
        store.restore(self.engine, path, manifest)
        self.step, self.token_hash = state["step"], state["token_hash"]
        self.saved_step, self.validation_loss = self.step, state.get("validation_loss")
        self.spikes.restore(state.get("spikes"))
        self.meter.restore(self.step, state.get("flops"), state.get("train_seconds"))
        self._forget_after(self.step)

    def _leave_course(self, step: int) -> None:
        """After rewinds, checkpoints of later steps are of a course that was left: they make room for new ones."""
        if self.rewinds.taken:
            if self.mesh.is_main:
                store.discard_after(self.folder / store.CHECKPOINTS, step)
            self.mesh.share(None)  # no rank goes on before that is done

    def _warm_start(self, where: Path) -> None:
        """Begin with the weights of another run."""
        path = store.locate(where)
        manifest = store.agree_on(path, self.mesh)
        tokenizer = manifest["state"].get("tokenizer")
        if tokenizer != self.corpus.tokenizer.fingerprint:
            raise ConfigError(
                f"checkpoint.warm_start={path} must be of this run's tokenizer {self.corpus.tokenizer.fingerprint}; it "
                f"is of {tokenizer or 'an unknown one'}"
            )
        became = store.warm_start(self.engine, path, manifest)
        words = [f"{len(became.loaded)} weights of {path}"]
        for names, said in ((became.fresh, "start anew"), (became.left, "left behind")):
            if names:
                words.append(f"{said}: {', '.join(names)}")
        self._event("warm_start", "; ".join(words))

    def _forget_after(self, step: int) -> None:
        """Go on from ``step``: what was written down of later steps is of no use."""
        self.metrics.resume(step)
        if self.mesh.is_main:
            self.probes.remove_after(step)

    def _report_damage(self, warnings: list[str]) -> None:
        for warning in warnings:
            self._event("checkpoint_damaged", warning)

    def _refuse_changes(self, state: dict[str, Any], path: Path) -> list[str]:
        """Raise if what must stay the same over a resume has changed; else what has changed and may."""
        found = changes(state["config"], to_values(self.config))
        if found.refused:
            raise ConfigError(
                f"{', '.join(found.refused)}, with which {path} was made; choose another run.name to start anew"
                + (f" (these differ too, and may: {', '.join(found.allowed)})" if found.allowed else "")
            )
        if state["corpus_fingerprint"] != self.corpus.fingerprint:
            raise ConfigError(
                f"data: the corpus has changed since {path} was made: "
                f"{data.explain_change(state.get('corpus_facts', {}), self.corpus_facts)}; choose another run.name to "
                "start anew"
            )
        return found.allowed

    def loop(self) -> int:
        """Train until the budget is spent, the data ends or a signal comes.

        Returns:
            Exit code: FINISHED if the last step and its validation are done and saved, else STOPPED or UNSAVED.
        """
        if self.stop.agreed(self.mesh.device):
            return self._stop()
        if self.meter.is_over:  # an earlier attempt ended between its last step and its end
            return self._end_step()
        self.stopwatch.start()
        try:
            while True:
                code = self._loop_until_spike()
                if code is not None or (code := self._rewind()) is not None:
                    return code
        except Exception as error:
            # So that whoever compares runs later can tell this one from one that was killed.
            name = "diverged" if isinstance(error, NonFiniteError) else "failed"
            self._event(name, " ".join(str(error).split()))
            raise

    def _loop_until_spike(self) -> int | None:
        """The exit code, or None when a spike is to be undone."""
        batches = self.loader.iterate(self.data_step)
        try:
            for data_step, micro_batches in self.stopwatch.waits(batches):
                if self.rewinds.skips(data_step):
                    continue
                self._train_step(data_step, micro_batches)
                if self.spike is not None and self._can_rewind():
                    return None
                code = self._end_step()
                if code != FINISHED or self.meter.is_over:
                    return code
                self.enter("train.data", self.step)
        finally:
            batches.close()
        self._event("ended", "the source has no rows for another step")
        return self._end_step(is_over=True)

    def _can_rewind(self) -> bool:
        return self.config.spike.rewind and len(self.rewinds.taken) < self.config.spike.max_rewinds

    def _rewind(self) -> int | None:
        """Go back before the spike of the last step, whose rows are left out from now on.

        Returns:
            None to go on training, or an exit code.
        """
        self._take_outcome(wait=True)
        stop = self.rewinds.data_step(self.step - 1) + 1
        first = max(0, stop - self.config.spike.skip_steps)
        found = self._newest(lambda warning: None, self.step - self.config.spike.skip_steps)
        if found is None:
            self._event("not_rewound", f"step {self.step - 1}: no checkpoint lies before the rows to be skipped")
            code = self._end_step()
            return None if code == FINISHED and not self.meter.is_over else code
        path, manifest = found
        back = manifest["state"]["step"]
        rewinds = Rewinds([*self.rewinds.taken, Rewind(back, first, stop)])
        if self.mesh.is_main:
            rewinds.write(self.folder)
        where = self._save_positions(stop - 1, "spike")
        said = f"step {self.step - 1}: {self.spike}; went back to {path.name}; {where}"
        self.rewinds = rewinds
        self._go_on_from(path, manifest)
        self._event("rewound", f"{said}; the rows of steps {first} to {stop - 1} of the data are left out")
        if isinstance(self.corpus, data.StreamedCorpus):
            self.say("a stream cannot be read backwards; the same command goes on")
            return STOPPED
        return None

    def _train_step(self, data_step: int, micro_batches: list[MicroBatch]) -> None:
        step = self.step
        learning_rate = self.engine.learning_rate(step)
        if self.faults.due("train.rows", data_step):
            for batch in micro_batches:
                wrong = self.config.model.vocab_size - 1 - batch.labels
                batch.labels.copy_(torch.where(batch.labels == data.IGNORE_INDEX, batch.labels, wrong))
        try:
            result = self.engine.step(step, micro_batches)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}; {self._save_positions(data_step, str(error))}") from error
        self.step = step + 1
        self.validation_loss = None
        self.token_hash = data.wrap_to_int64(self.token_hash + result.token_hash)
        self.stopwatch.count(self.plan.tokens_per_step)
        flops_per_token = self._charge(result)
        if result.sickness is not None:
            self._event("step_skipped", f"{result.sickness}; {self._save_positions(data_step, result.sickness)}")
        self.spike = self.spikes.judge(result.loss)
        if self.spike is not None:
            self._event("loss_spike", f"step {step}: {self.spike}")
        for name, message in self.health.update(result.tokens_per_expert, result.tokens):
            self._event(name, message)
        if self.step % self.config.metrics.log_every_steps == 0 or self.meter.is_over:
            self.log(result, learning_rate, flops_per_token)
        self._note_exhausted(data_step)

    def _charge(self, result: StepResult) -> float:
        """Add the step to what the run has spent; its FLOPs per token."""
        size = self.size
        if result.tokens_per_expert.numel():
            # Adaptive schemes are charged for the experts they used, not for those expected.
            size = size.with_experts_per_token(result.experts_per_token)
        seconds = self.stopwatch.lap()
        if self.meter.counts_seconds:
            seconds = self.mesh.share(seconds)
        self.meter.charge(size.training_flops_per_token, seconds)
        return size.training_flops_per_token

    def _note_exhausted(self, step: int) -> None:
        """Record in which step a source of a mixture begins again, or that the run ends because one has been read."""
        for name, first in self.exhaustion.items():
            if first == step:
                self._event("repeats", f"source {name} has been read once and begins again in a new order")
            elif first == self.step == self.meter.limit and not self.meter.is_spent:
                planned = self.config.num_steps
                self._event("exhausted", f"source {name} has been read: the run ends, {planned} steps were planned")

    def _save_positions(self, step: int, reason: str) -> str:
        """Write down which rows a sick step read, so that it can be replayed; in words, where."""
        first = step * self.plan.rows_per_step
        rows = {"first_row": first, "last_row": first + self.plan.rows_per_step - 1}
        path = self.folder / SICK_STEPS / f"step_{step:08d}.json"
        facts = {
            "step": step,
            "reason": reason,
            **rows,
            "corpus_fingerprint": self.corpus.fingerprint,
            "replay": f"resume from a checkpoint of at most {step} steps: step {step} reads these rows again",
        }
        if self.mesh.is_main:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(facts, indent=2) + "\n")
            except OSError as error:
                return f"rows {first} to {rows['last_row']} of the run's order ({path} cannot be written: {error})"
        return f"its rows are in {path}"

    def _end_step(self, is_over: bool = False) -> int:
        """Between two steps, or when the data ``is_over``: evaluate and save where due, and heed a signal."""
        config, at_end = self.config, is_over or self.meter.is_over
        self._take_outcome(wait=False)
        if self.stop.agreed(self.mesh.device):
            return self._stop()
        # Before the checkpoint, so that a finished run has its last validation.
        if (at_end or self.step % config.evaluation.every_steps == 0) and self.validation_loss is None:
            if not self.evaluate():
                return self._stop()
        if at_end or self.step % config.checkpoint.every_steps == 0:
            self.save(wait=at_end)
        return UNSAVED if at_end and self.saved_step != self.step else FINISHED

    def _stop(self) -> int:
        """Save what there is and say that a signal ended the run."""
        self.save(wait=True)
        if self.saved_step != self.step:
            return UNSAVED
        self._event("stopped", f"by {self.stop.name}, checkpoint written")
        return STOPPED

    def log(self, result: StepResult, learning_rate: float, flops_per_token: float) -> None:
        """Write a train row of the step, with what it was made at."""
        window = self.stopwatch.read()
        row = train_row(
            result,
            self.engine.model,
            window,
            learning_rate,
            flops_per_token,
            self.mesh.world_size,
            self.peak_flops,
        )
        for name, use in self.loader.source_use(self.data_step).items():
            row[f"data/{name}/tokens"] = use.rows * self.config.model.sequence_length
            row[f"data/{name}/epochs"] = use.epochs
        row |= {"train/flops_spent": float(self.meter.flops), "train/seconds_spent": self.meter.seconds}
        hashed = f"{self.token_hash % 2**64:016x}"
        self.metrics.expect(self.meter.num_steps)
        self.metrics.write({"step": self.step, "tokens": self.tokens, **row, "data/token_hash": hashed})

    def evaluate(self) -> bool:
        """Validate on every set and write a row; False if a signal came in between, and nothing is written."""
        with self.stopwatch.paused():
            found = self.evaluator.evaluate(self.step)
            if found is None:
                return False
            drift = self._keep_probe(found.probe) if self.mesh.is_main else {}
        self.validation_loss = found.row["validation/loss"]
        self.metrics.write({"step": self.step, "tokens": self.tokens, **found.row, **drift})
        return True

    def _keep_probe(self, probe: Probe) -> dict[str, float]:
        """Write the probe beside the run's others; the drift of routes since the one before, for the metrics."""
        drift: dict[int, float] = {}
        try:
            before = self.probes.newest(self.step - 1)
            if before is not None:
                drift = routing_drift(before, probe)
                if before.fingerprint != probe.fingerprint:
                    self._event("probe_changed", f"the validation rows are not those of step {before.step}: no drift")
            self.probes.write(probe)
            checkpoints = complete_names(self.folder / store.CHECKPOINTS)
            self.probes.remove_before(step_of(checkpoints[-1]) or 0 if checkpoints else 0)
        except (OSError, ValueError) as error:
            self._event("probe_failed", f"losses by document and routes are not complete: {error}")
        return {f"moe/layer_{layer:02d}/routing_drift": share for layer, share in drift.items()}

    def save(self, wait: bool) -> None:
        """Begin a checkpoint of this step, once the one before is complete; ``wait`` for this one too."""
        with self.stopwatch.paused():
            self._take_outcome(wait=True)
            if self.saved_step != self.step:
                self.enter("save", self.step)
                self.saver.save(self._state(), before_commit=self.metrics.sync)
                self._take_outcome(wait=wait)

    def _state(self) -> dict[str, Any]:
        loss = self.validation_loss
        return {
            "step": self.step,
            "tokens": self.tokens,
            "token_hash": self.token_hash,
            "flops": self.meter.flops,
            "train_seconds": self.meter.seconds,
            "validation_loss": loss if loss is not None and math.isfinite(loss) else None,
            "corpus_fingerprint": self.corpus.fingerprint,
            "corpus_facts": self.corpus_facts,
            "tokenizer": self.corpus.tokenizer.fingerprint,
            "stream": self.loader.state(self.data_step),
            "rewinds": self.rewinds.state(),
            "spikes": self.spikes.state(),
            "config": to_values(self.config),
            "world_size": self.mesh.world_size,
            "versions": versions(),
        }

    def _take_outcome(self, wait: bool) -> None:
        """Hear what became of the last save, if that is known or is to be waited for, and say it."""
        outcome = self.saver.take(wait)
        if outcome is None:
            return
        if outcome.path is None:
            left = f"step {self.saved_step}" if self.saved_step is not None else "none"
            self._event(
                "checkpoint_failed",
                f"step {outcome.step} is NOT saved: {outcome.problem}; last good checkpoint: {left}; training goes on",
            )
            return
        self.saved_step = outcome.step
        self._event(
            "checkpoint",
            f"{outcome.path.name} written in {outcome.seconds:.1f} s, of which training waited "
            f"{outcome.staging_seconds:.2f} s",
        )
        if outcome.problem is not None:
            self._event("checkpoint_not_removed", outcome.problem)

    def _event(self, name: str, message: str) -> None:
        self.metrics.event(self.step, self.tokens, name, message)

    def close(self) -> None:
        """Wait for the save that is being written, also when the run failed."""
        self._take_outcome(wait=True)

    def finish(self, code: int) -> None:
        """Close the sinks, write the report, say where things are."""
        self.enter("report", self.step)
        if code == FINISHED:
            self._event("finished", self.meter.describe_end())
        self.metrics.close()
        if not self.mesh.is_main:
            return
        self.say(f"run folder: {self.folder}")
        for name, use in self.loader.source_use(self.data_step).items():
            tokens = use.rows * self.config.model.sequence_length
            self.say(f"source {name}: {tokens:,} tokens, {use.epochs:.2f} epochs")
        if code == STOPPED:
            self.say(f"stopped at step {self.step}; the same command goes on from there")
        if code == UNSAVED:
            self.say(f"step {self.step} could not be saved; the same command goes on from step {self.saved_step or 0}")
        if not any(row["kind"] == "train" for row in read_rows(self.folder / "metrics.jsonl")):
            return  # stopped before the first row: there is nothing to report yet
        try:
            report = write_report(self.folder)
        except (OSError, ValueError) as error:
            return self.say(f"the report could not be written: {error}")
        summary = summarise(self.folder)
        if code == FINISHED:
            self.say(
                f"done: {self.step} steps, {self.tokens:,} tokens; validation loss "
                f"{summary['final_validation_loss']:.3f} nats/token, unigram entropy "
                f"{self.corpus.unigram_entropy:.3f} nats/token"
            )
            self.say(f"spent: {self.meter.describe_spending()}")
            if matched := self.config.budget.matched:
                share = self.meter.flops / self.tokens / matched.reference["flops_per_token"] - 1
                self.say(f"measured FLOPs per token against those of the reference of budget.match: {share:+.2%}")
        self.say(f"report:     {report}")
