"""The training loop of a run, read from top to bottom: resume, train, validate, save, stop, finish."""

import math
from collections.abc import Sequence

import torch

from moe_pretrain.checkpoint.store import TrainState, updates_made
from moe_pretrain.config.preflight import RunPlan
from moe_pretrain.config.schema import Config
from moe_pretrain.data import IGNORE_INDEX
from moe_pretrain.data.rows.micro_batch import MicroBatch
from moe_pretrain.engine.engine import NonFiniteError, TrainEngine
from moe_pretrain.engine.step_result import StepResult
from moe_pretrain.metrics.router_health import RouterHealth
from moe_pretrain.metrics.step_rows import train_row
from moe_pretrain.metrics.throughput import Stopwatch, peak_flops_per_second
from moe_pretrain.run_folder.provenance import write_overrides
from moe_pretrain.schedule.learning_rate import describe_last_rate
from moe_pretrain.system.exit_codes import FINISHED, NOT_FINITE, STOPPED, UNSAVED
from moe_pretrain.train.context import RunContext
from moe_pretrain.train.corpora import RunData
from moe_pretrain.train.ending import say_end
from moe_pretrain.train.evaluator import Evaluator
from moe_pretrain.train.progress import RunProgress
from moe_pretrain.train.recorder import RunRecorder, write_facts
from moe_pretrain.train.resume import Resumer
from moe_pretrain.train.saving import CheckpointSaving
from moe_pretrain.train.task_evaluator import RunTasks


class Trainer:
    """A run on one rank: its parts, and the order in which they act.

    Attributes:
        config: Resolved configuration.
        plan: Batches, device, dtype and model size.
        data: Corpus, evaluation sets, loader and budget meter.
        engine: Model and optimizer under DeepSpeed.
        context: Ranks, signals, faults and output.
        exhaustion_steps: Step in which each source of a mixture begins again.
        progress: Counters that each step advances.
        stopwatch: Speed, without the time of validation and checkpoints.
        router_health: Detector of routers that send no tokens to some experts.
        recorder: Metrics rows, events, probes and notes in the run's folder.
        evaluator: Validation on all sets.
        tasks: Tasks of the harness, which may be none.
        resumer: Checkpoints that the run begins from, goes on from and goes back to.
        saving: Checkpoints that the run writes.
    """

    def __init__(
        self,
        config: Config,
        plan: RunPlan,
        data: RunData,
        engine: TrainEngine,
        context: RunContext,
        tasks: RunTasks,
    ):
        """Open the run's folder; every rank makes one, at the same time."""
        self.config, self.plan, self.data, self.engine, self.context = config, plan, data, engine, context
        self.exhaustion_steps = data.loader.exhaustion_steps()
        self.progress = RunProgress(config.spike, plan.batches.tokens_per_step, data.meter)
        self.stopwatch = Stopwatch()
        layers = [layer.router.layer for layer in engine.model.moe_layers()]
        self.router_health = RouterHealth(layers, config.metrics.router_health_steps, config.metrics.collapse_ratio)
        self.recorder = RunRecorder(config, plan, data, context.mesh, self.progress)
        self.evaluator, self.tasks = Evaluator(config, plan, data, engine, context), tasks
        self.saving = CheckpointSaving(config, engine, context, self.progress, self.recorder)
        self.resumer = Resumer(config, data, engine, context, self.progress, self.recorder, self.saving)

    def train(self, overrides: Sequence[str] = ()) -> int:
        """Resume the newest checkpoint, then train until the budget is spent, the data ends or a signal comes.

        Args:
            overrides: Words of the command line, for the run's folder.

        Returns:
            Exit code: FINISHED if the last step and its validation are done and saved, NOT_FINITE if they are but came
            to nothing, else STOPPED or UNSAVED.
        """
        self.resumer.resume()
        if excess := self.data.meter.describe_excess():
            self.recorder.event("budget", excess)
        if self.context.mesh.is_main:  # not before: settings that were refused are not the run's
            write_facts(self.config, self.plan, self.data, self.context.mesh)
            write_overrides(self.config.run.folder, overrides)
        try:
            code = self._train_to_the_end()
        except BaseException:
            self.saving.take_outcome(wait=True)
            self.recorder.close()  # else wandb would not have what led to this
            raise
        self.saving.take_outcome(wait=True)
        self.context.enter("report", self.progress.step)
        if code == FINISHED:
            code = self._finish()
        self.recorder.close()
        if self.context.mesh.is_main:
            say_end(code, self.config, self.data, self.progress, self.context.say)
        return code

    def _finish(self) -> int:
        """Record the end of the run with everything that makes it less than it seems; the exit code."""
        progress, meter = self.progress, self.data.meter
        updates: int = self.context.mesh.on_main(lambda: updates_made(self.engine))
        progress.skipped = progress.step - updates
        notes = [meter.describe_end(), describe_last_rate(self.config.schedule, progress.step, meter.num_steps)]
        if progress.skipped:
            notes.append(f"{progress.skipped} of {progress.step} steps were SKIPPED, and changed nothing")
        loss = progress.validation_loss
        if loss is None or not math.isfinite(loss):
            notes.append("THE LAST VALIDATION IS NOT FINITE")
        is_untrained = progress.skipped == progress.step > 0
        # A model that nothing has changed must not be compared with those that were trained.
        self.recorder.event("diverged" if is_untrained else "finished", "; ".join(filter(None, notes)))
        return FINISHED if progress.has_result or not progress.step else NOT_FINITE

    def _train_to_the_end(self) -> int:
        """Train, going back before each spike that is to be undone; the exit code."""
        if self.context.agree_to_stop():
            return self._save_and_stop()
        if self.data.meter.is_over:  # an earlier attempt ended between its last step and its end
            return self._end_step()
        self.stopwatch.start()
        try:
            while True:
                code, spike = self._train_until_spike()
                if spike is not None:
                    code = self._undo(spike)
                if code is not None:
                    return code
        except Exception as error:
            # So that whoever compares runs later can tell this one from one that was killed.
            name = "diverged" if isinstance(error, NonFiniteError) else "failed"
            self.recorder.event(name, " ".join(str(error).split()))
            raise

    def _train_until_spike(self) -> tuple[int | None, str | None]:
        """Step after step; the exit code at the end, or in words a spike that is to be undone."""
        progress = self.progress
        if not self._evaluate():  # a stop at this very step came before it
            return self._save_and_stop(), None
        batches = self.data.loader.iterate(progress.data_step)
        try:
            for data_step, micro_batches in self.stopwatch.waits(batches):
                if progress.rewinds.skips(data_step):
                    continue
                learning_rate = self.engine.learning_rate(progress.step)
                result = self._optimizer_step(data_step, micro_batches)
                progress.advance(result.token_hash)
                flops_per_token = self._charge(result)
                spike = self._judge(result, data_step)
                if progress.step % self.config.metrics.log_every_steps == 0 or self.data.meter.is_over:
                    self._log(result, learning_rate, flops_per_token)
                self._record_exhausted_sources(data_step)
                if spike is not None and self._may_rewind():
                    return None, spike
                code = self._end_step()
                if code != FINISHED or self.data.meter.is_over:
                    return code, None
                self.context.enter("train.data", progress.step)
        finally:
            batches.close()
        self.recorder.event("ended", "the source has no rows for another step")
        return self._end_step(is_over=True), None

    def _optimizer_step(self, data_step: int, micro_batches: list[MicroBatch]) -> StepResult:
        """Forward, backward and update; if the result is not finite, the rows are noted."""
        if self.context.faults.due("train.rows", data_step):
            _poison(micro_batches, self.config.model.vocab_size)
        try:
            return self.engine.step(self.progress.step, micro_batches)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}; {self.recorder.bad_rows.note(data_step, str(error))}") from error

    def _charge(self, result: StepResult) -> float:
        """Add the step to the budget's meter; its FLOPs per token."""
        self.stopwatch.count(self.plan.batches.tokens_per_step)
        size, meter = self.plan.size, self.data.meter
        if result.tokens_per_expert.numel():
            # Adaptive schemes are charged for the experts they used, not for those expected.
            size = size.with_experts_per_token(result.mean_experts_run)
            if self.config.router.merges_experts and (merges := float(torch.stack([*result.sums]).mean())):
                size = size.with_tokens_per_merge(result.tokens / merges)
        seconds = self.stopwatch.lap()
        if meter.counts_seconds:
            seconds = self.context.mesh.share(seconds)
        meter.charge(size.training_flops_per_token, seconds)
        return size.training_flops_per_token

    def _judge(self, result: StepResult, data_step: int) -> str | None:
        """Record whatever is wrong with the finished step; in words, the loss spike that begins with it."""
        if result.sickness is not None:
            where = self.recorder.bad_rows.note(data_step, result.sickness)
            self.recorder.event("step_skipped", f"{result.sickness}; {where}")
        spike = self.progress.spikes.judge(result.loss)
        if spike is not None:
            self.recorder.event("loss_spike", f"step {self.progress.step - 1}: {spike}")
        free = [layer.router.free_slots for layer in self.engine.model.moe_layers()]
        for name, message in self.router_health.update(result.tokens_per_expert, result.tokens, free):
            self.recorder.event(name, message)
        return spike

    def _log(self, result: StepResult, learning_rate: float, flops_per_token: float) -> None:
        """Write the train row of the finished step, which was made at this learning rate and cost."""
        mesh, meter, progress = self.context.mesh, self.data.meter, self.progress
        peak = peak_flops_per_second(torch.cuda.get_device_name()) if mesh.device.type == "cuda" else None
        window = self.stopwatch.read()
        row = train_row(result, self.engine.model, window, learning_rate, flops_per_token, mesh.world_size, peak)
        for name, use in self.data.loader.source_use(progress.data_step).items():
            row[f"data/{name}/tokens"] = use.rows * self.config.model.sequence_length
            row[f"data/{name}/epochs"] = use.epochs
        row |= {"train/flops_spent": float(meter.flops), "train/seconds_spent": meter.seconds}
        self.recorder.expect(meter.num_steps)
        self.recorder.write({**row, "data/token_hash": f"{progress.token_hash % 2**64:016x}"})

    def _record_exhausted_sources(self, data_step: int) -> None:
        """Record in which step a source of a mixture begins again, or that the run ends because one has been read."""
        meter = self.data.meter
        for name, first in self.exhaustion_steps.items():
            if first == data_step:
                self.recorder.event("repeats", f"source {name} has been read once and begins again in a new order")
            elif first == self.progress.step == meter.limit and not meter.is_spent:
                planned = self.config.num_steps
                message = f"source {name} has been read: the run ends, {planned} steps were planned"
                self.recorder.event("exhausted", message)

    def _end_step(self, is_over: bool = False) -> int:
        """Between two steps, or when the data ``is_over``: validate and save where due, and heed a signal."""
        config, progress = self.config, self.progress
        at_end = is_over or self.data.meter.is_over
        self.saving.take_outcome(wait=False)
        if self.context.agree_to_stop():
            return self._save_and_stop()
        # Before the checkpoint, so that a finished run has its last validation.
        if not self._evaluate(at_end):
            return self._save_and_stop()
        if at_end or progress.step % config.checkpoint.every_steps == 0:
            self._save(wait=at_end)
        return UNSAVED if at_end and progress.saved_step != progress.step else FINISHED

    def _evaluate(self, at_end: bool = False) -> bool:
        """Validate and ask tasks, where they are due; False if a signal came in between."""
        if self._validation_is_due(at_end) and not self._validate():
            return False
        mesh, step = self.context.mesh, self.progress.step
        if not self.tasks.is_step(step, at_end) or mesh.on_main(self.recorder.has_tasks):
            return True
        with self.stopwatch.paused():
            results = self.tasks.evaluate(self.engine, self.data.corpus.tokenizer, self.plan, self.context, step)
            if results is None:
                return False
            self.recorder.keep_tasks(results)
        return True

    def _validation_is_due(self, at_end: bool = False) -> bool:
        """Whether the present step is one to validate at, and has not been."""
        step = self.progress.step
        is_due = at_end or (step > 0 and step % self.config.evaluation.every_steps == 0)
        return is_due and self.progress.validation_loss is None

    def _validate(self) -> bool:
        """Validate on every set and write a row; False if a signal came in between, and nothing is written."""
        with self.stopwatch.paused():
            validation = self.evaluator.evaluate(self.progress.step)
            if validation is None:
                return False
            drift = self.recorder.keep_probe(validation.probe)
        self.progress.validation_loss = validation.row["validation/loss"]
        self.recorder.write({**validation.row, **drift})
        return True

    def _save(self, wait: bool) -> None:
        """Begin a checkpoint of this step, once the one before is complete; ``wait`` for this one too."""
        progress = self.progress
        with self.stopwatch.paused():
            self.saving.take_outcome(wait=True)
            if progress.saved_step != progress.step:
                self.context.enter("save", progress.step)
                self.saving.begin(self.train_state())
                self.saving.take_outcome(wait=wait)

    def train_state(self) -> TrainState:
        """Everything beside tensors that a run needs to go on from this step."""
        stream = self.data.loader.state(self.progress.data_step)
        return self.progress.state(stream, self.resumer.rules.identity)

    def _save_and_stop(self) -> int:
        """Save this step, and record that a signal ended the run."""
        self._save(wait=True)
        if self.progress.saved_step != self.progress.step:
            return UNSAVED
        self.recorder.event("stopped", f"by {self.context.stop.name}, checkpoint written")
        return STOPPED

    def _may_rewind(self) -> bool:
        return self.config.spike.rewind and len(self.progress.rewinds.taken) < self.config.spike.max_rewinds

    def _undo(self, spike: str) -> int | None:
        """Go back before the spike of the last step; None to go on training, or an exit code."""
        self.saving.take_outcome(wait=True)
        if not self.resumer.go_back(spike):
            code = self._end_step()
            return None if code == FINISHED and not self.data.meter.is_over else code
        if not self.data.corpus.can_rewind:
            self.context.say("a stream cannot be read backwards; the same command goes on")
            return STOPPED
        return None


def _poison(micro_batches: list[MicroBatch], vocab_size: int) -> None:
    """Give every token another label, for tests of what a run does about bad rows."""
    for batch in micro_batches:
        wrong = vocab_size - 1 - batch.labels
        batch.labels.copy_(torch.where(batch.labels == IGNORE_INDEX, batch.labels, wrong))
