"""The loop of a run, read from top to bottom: resume, train, evaluate, save, stop, finish."""

from collections.abc import Callable

import torch

from moe_pretrain import data
from moe_pretrain.checkpoint import store
from moe_pretrain.config.schema import Config, to_values
from moe_pretrain.data.rows.micro_batch import MicroBatch
from moe_pretrain.engine.deepspeed_config import Dtype
from moe_pretrain.engine.engine import NonFiniteError, TrainEngine
from moe_pretrain.engine.step_result import StepResult
from moe_pretrain.metrics.router_health import RouterHealth
from moe_pretrain.metrics.step_rows import train_row
from moe_pretrain.metrics.throughput import Stopwatch, peak_flops_per_second
from moe_pretrain.metrics.writer import MetricsWriter
from moe_pretrain.model.size import ModelSize
from moe_pretrain.parallel.mesh import Mesh
from moe_pretrain.schedule.batch_plan import BatchPlan
from moe_pretrain.schedule.budget import BudgetMeter
from moe_pretrain.system.exit_codes import FINISHED, STOPPED, UNSAVED
from moe_pretrain.system.faults import Faults
from moe_pretrain.system.stop_signals import StopRequest
from moe_pretrain.train.corpora import Corpus
from moe_pretrain.train.ending import say_end
from moe_pretrain.train.evaluator import Evaluator
from moe_pretrain.train.recorder import Journal, SickRows, write_facts
from moe_pretrain.train.resume import Course
from moe_pretrain.train.resume_rules import Identity
from moe_pretrain.train.saving import Saving
from moe_pretrain.train.train_state import Progress


class Run:
    """The loop, over parts that each keep what is theirs."""

    def __init__(
        self,
        config: Config,
        plan: BatchPlan,
        size: ModelSize,
        dtype: Dtype,
        meter: BudgetMeter,
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
        folder = config.run.folder
        self._config, self._plan, self._size, self._corpus, self._loader = config, plan, size, corpus, loader
        self._engine, self._mesh, self._meter, self._faults = engine, mesh, meter, faults
        self._stop, self._enter, self._say = stop, enter, say
        self._exhaustion = loader.exhaustion_steps()
        identity = Identity(config, corpus, mesh.world_size)
        self._evaluator = Evaluator(config, plan, corpus, evaluation_sets, engine, stop, enter)
        self._progress = Progress(config.spike, plan.tokens_per_step, meter)
        self._spike: str | None = None  # in the last step, in words
        self._stopwatch = Stopwatch()
        self._peak_flops = peak_flops_per_second(torch.cuda.get_device_name()) if mesh.device.type == "cuda" else None
        layers = [layer.router.layer for layer in engine.model.moe_layers()]
        self._health = RouterHealth(layers, config.metrics.router_health_steps)
        if mesh.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            write_facts(config, size, dtype, corpus, mesh)
        timeout = config.parallel.timeout_seconds
        saver = store.Saver(engine, folder / store.CHECKPOINTS, config.checkpoint, timeout, faults)
        metrics = MetricsWriter(
            config.metrics, folder, plan.num_steps, config.run.name, to_values(config), mesh.is_main
        )
        self._journal = Journal(folder, metrics, self._progress, mesh.is_main)
        self._sick_rows = SickRows(folder, plan.rows_per_step, corpus.fingerprint, mesh.is_main)
        self._saving = Saving(saver, self._progress, identity, loader, self._journal, self._stopwatch, enter)
        self._course = Course(config, engine, self._progress, identity, loader, self._journal, self._sick_rows, say)

    def train(self) -> int:
        """Resume what there is, then train until the budget is spent, the data ends or a signal comes.

        Returns:
            Exit code: FINISHED if the last step and its validation are done and saved, else STOPPED or UNSAVED.
        """
        self._course.resume()
        try:
            code = self._loop()
        except BaseException:
            self._saving.take_outcome(wait=True)
            self._journal.close()  # else wandb would not have what led to this
            raise
        self._saving.take_outcome(wait=True)
        self._enter("report", self._progress.step)
        if code == FINISHED:
            self._journal.event("finished", self._meter.describe_end())
        self._journal.close()
        if self._mesh.is_main:
            say_end(code, self._config, self._corpus, self._loader, self._progress, self._say)
        return code

    def _loop(self) -> int:
        """Train, going back before each spike that is to be undone; the exit code."""
        if self._stop.agreed(self._mesh.device):
            return self._save_and_stop()
        if self._meter.is_over:  # an earlier attempt ended between its last step and its end
            return self._end_step()
        self._stopwatch.start()
        try:
            while True:
                code = self._loop_until_spike()
                if code is not None or (code := self._go_back()) is not None:
                    return code
        except Exception as error:
            # So that whoever compares runs later can tell this one from one that was killed.
            name = "diverged" if isinstance(error, NonFiniteError) else "failed"
            self._journal.event(name, " ".join(str(error).split()))
            raise

    def _loop_until_spike(self) -> int | None:
        """The exit code, or None when a spike is to be undone."""
        batches = self._loader.iterate(self._progress.data_step)
        try:
            for data_step, micro_batches in self._stopwatch.waits(batches):
                if self._progress.rewinds.skips(data_step):
                    continue
                self._train_step(data_step, micro_batches)
                if self._spike is not None and self._can_go_back():
                    return None
                code = self._end_step()
                if code != FINISHED or self._meter.is_over:
                    return code
                self._enter("train.data", self._progress.step)
        finally:
            batches.close()
        self._journal.event("ended", "the source has no rows for another step")
        return self._end_step(is_over=True)

    def _train_step(self, data_step: int, micro_batches: list[MicroBatch]) -> None:
        step = self._progress.step
        learning_rate = self._engine.learning_rate(step)
        if self._faults.due("train.rows", data_step):
            self._poison(micro_batches)
        try:
            result = self._engine.step(step, micro_batches)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}; {self._sick_rows.note(data_step, str(error))}") from error
        self._progress.advance(result.token_hash)
        self._stopwatch.count(self._plan.tokens_per_step)
        flops_per_token = self._charge(result)
        if result.sickness is not None:
            where = self._sick_rows.note(data_step, result.sickness)
            self._journal.event("step_skipped", f"{result.sickness}; {where}")
        self._spike = self._progress.spikes.judge(result.loss)
        if self._spike is not None:
            self._journal.event("loss_spike", f"step {step}: {self._spike}")
        for name, message in self._health.update(result.tokens_per_expert, result.tokens):
            self._journal.event(name, message)
        if self._progress.step % self._config.metrics.log_every_steps == 0 or self._meter.is_over:
            self._log(result, learning_rate, flops_per_token)
        self._note_exhausted(data_step)

    def _poison(self, micro_batches: list[MicroBatch]) -> None:
        """Give every token another label, for tests of what a run does about bad rows."""
        for batch in micro_batches:
            wrong = self._config.model.vocab_size - 1 - batch.labels
            batch.labels.copy_(torch.where(batch.labels == data.IGNORE_INDEX, batch.labels, wrong))

    def _charge(self, result: StepResult) -> float:
        """Add the step to what the run has spent; its FLOPs per token."""
        size = self._size
        if result.tokens_per_expert.numel():
            # Adaptive schemes are charged for the experts they used, not for those expected.
            size = size.with_experts_per_token(result.experts_per_token)
        seconds = self._stopwatch.lap()
        if self._meter.counts_seconds:
            seconds = self._mesh.share(seconds)
        self._meter.charge(size.training_flops_per_token, seconds)
        return size.training_flops_per_token

    def _log(self, result: StepResult, learning_rate: float, flops_per_token: float) -> None:
        """Write a train row of the step, with what it was made at."""
        window, model, ranks = self._stopwatch.read(), self._engine.model, self._mesh.world_size
        row = train_row(result, model, window, learning_rate, flops_per_token, ranks, self._peak_flops)
        for name, use in self._loader.source_use(self._progress.data_step).items():
            row[f"data/{name}/tokens"] = use.rows * self._config.model.sequence_length
            row[f"data/{name}/epochs"] = use.epochs
        row |= {"train/flops_spent": float(self._meter.flops), "train/seconds_spent": self._meter.seconds}
        hashed = f"{self._progress.token_hash % 2**64:016x}"
        self._journal.expect(self._meter.num_steps)
        self._journal.write({**row, "data/token_hash": hashed})

    def _note_exhausted(self, data_step: int) -> None:
        """Record in which step a source of a mixture begins again, or that the run ends because one has been read."""
        for name, first in self._exhaustion.items():
            if first == data_step:
                message = f"source {name} has been read once and begins again in a new order"
                self._journal.event("repeats", message)
            elif first == self._progress.step == self._meter.limit and not self._meter.is_spent:
                planned = self._config.num_steps
                message = f"source {name} has been read: the run ends, {planned} steps were planned"
                self._journal.event("exhausted", message)

    def _end_step(self, is_over: bool = False) -> int:
        """Between two steps, or when the data ``is_over``: evaluate and save where due, and heed a signal."""
        config, progress = self._config, self._progress
        at_end = is_over or self._meter.is_over
        self._saving.take_outcome(wait=False)
        if self._stop.agreed(self._mesh.device):
            return self._save_and_stop()
        # Before the checkpoint, so that a finished run has its last validation.
        if (at_end or progress.step % config.evaluation.every_steps == 0) and progress.validation_loss is None:
            if not self._evaluate():
                return self._save_and_stop()
        if at_end or progress.step % config.checkpoint.every_steps == 0:
            self._saving.save(wait=at_end)
        return UNSAVED if at_end and progress.saved_step != progress.step else FINISHED

    def _evaluate(self) -> bool:
        """Validate on every set and write a row; False if a signal came in between, and nothing is written."""
        with self._stopwatch.paused():
            found = self._evaluator.evaluate(self._progress.step)
            if found is None:
                return False
            drift = self._journal.keep_probe(found.probe)
        self._progress.validation_loss = found.row["validation/loss"]
        self._journal.write({**found.row, **drift})
        return True

    def _save_and_stop(self) -> int:
        """Save what there is and say that a signal ended the run."""
        self._saving.save(wait=True)
        if self._progress.saved_step != self._progress.step:
            return UNSAVED
        self._journal.event("stopped", f"by {self._stop.name}, checkpoint written")
        return STOPPED

    def _can_go_back(self) -> bool:
        return self._config.spike.rewind and len(self._progress.rewinds.taken) < self._config.spike.max_rewinds

    def _go_back(self) -> int | None:
        """Undo the spike of the last step; None to go on training, or an exit code."""
        assert self._spike is not None
        self._saving.take_outcome(wait=True)
        if not self._course.go_back(self._spike):
            code = self._end_step()
            return None if code == FINISHED and not self._meter.is_over else code
        if isinstance(self._corpus, data.StreamedCorpus):
            self._say("a stream cannot be read backwards; the same command goes on")
            return STOPPED
        return None
