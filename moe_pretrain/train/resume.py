"""Beginning, going on and going back: a run takes over checkpoints of its folder, and discards those it has left."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_pretrain.checkpoint import store
from moe_pretrain.checkpoint.store import TrainState, train_state
from moe_pretrain.config.schema import Config, ConfigError
from moe_pretrain.engine.engine import TrainEngine
from moe_pretrain.run_folder.paths import CHECKPOINTS
from moe_pretrain.run_folder.rewinds import read_rewinds, write_rewinds
from moe_pretrain.schedule.loss_spikes import Rewind, Rewinds
from moe_pretrain.train.context import RunContext
from moe_pretrain.train.corpora import RunData
from moe_pretrain.train.progress import RunProgress
from moe_pretrain.train.recorder import RunRecorder
from moe_pretrain.train.resume_rules import ResumeRules


class Resumer:
    """Takes over checkpoints of a run's folder; every rank does the same at the same time.

    Attributes:
        rules: Comparison of this run with the checkpoints that it goes on from.
    """

    def __init__(
        self,
        config: Config,
        data: RunData,
        engine: TrainEngine,
        context: RunContext,
        progress: RunProgress,
        recorder: RunRecorder,
    ):
        """Nothing is taken over yet: ``progress`` and ``engine`` are replaced when a checkpoint is."""
        self.rules = ResumeRules(config, data.corpus, context.mesh.world_size)
        self._config, self._engine, self._mesh, self._say = config, engine, context.mesh, context.say
        self._progress, self._recorder, self._loader = progress, recorder, data.loader
        self._folder, self._checkpoints = config.run.folder, config.run.folder / CHECKPOINTS

    def resume(self) -> None:
        """Go on from the newest good checkpoint, or begin, as ``checkpoint.resume`` asks.

        Raises:
            ConfigError: The checkpoints do not fit ``checkpoint.resume``, are of another run, or are damaged.
        """
        policy = self._config.checkpoint.resume
        warnings: list[str] = []
        self._progress.rewinds = self._read_rewinds()
        found = self._newest(warnings.append)
        if found is None and policy == "must":
            raise ConfigError(
                f"checkpoint.resume=must needs a good checkpoint in {self._checkpoints}; there is none"
                + "".join(f"; {warning}" for warning in warnings)
            )
        if found is not None and policy == "never":
            raise ConfigError(f"checkpoint.resume=never, but {found[0]} exists; choose another run.name")
        if found is None:
            self._begin(warnings)
        else:
            self._go_on(*found, warnings)

    def go_back(self, spike: str) -> bool:
        """Go back before the spike of the last step, whose rows are left out from now on.

        Args:
            spike: The spike, in words.

        Returns:
            False if no checkpoint lies before these rows, which is said: then nothing has changed.
        """
        progress, skip_steps = self._progress, self._config.spike.skip_steps
        step = progress.step - 1
        stop = progress.rewinds.data_step(step) + 1
        first = max(0, stop - skip_steps)
        found = self._newest(lambda warning: None, progress.step - skip_steps)
        if found is None:
            self._recorder.event("not_rewound", f"step {step}: no checkpoint lies before the rows to be skipped")
            return False
        path, manifest = found
        progress.rewinds = Rewinds([*progress.rewinds.taken, Rewind(train_state(manifest).step, first, stop)])
        if self._mesh.is_main:
            write_rewinds(self._folder, progress.rewinds)
        where = self._recorder.bad_rows.note(stop - 1, "spike")
        self._take_over(path, manifest)
        self._recorder.event(
            "rewound",
            f"step {step}: {spike}; went back to {path.name}; {where}; the rows of steps {first} to {stop - 1} of the "
            "data are left out",
        )
        return True

    def _read_rewinds(self) -> Rewinds:
        """The record in the run's folder, as the main rank reads it; one that is damaged is refused on every rank."""
        rewinds, complaint = Rewinds(), ""
        if self._mesh.is_main:
            try:
                rewinds = read_rewinds(self._folder)
            except ValueError as error:
                complaint = str(error)
        taken, complaint = self._mesh.share((rewinds.taken, complaint))
        if complaint:
            raise ConfigError(complaint)
        return Rewinds(taken)

    def _newest(self, warn: Callable[[str], None], latest: float = math.inf) -> tuple[Path, dict[str, Any]] | None:
        """The newest good checkpoint on the run's course, of ``latest`` steps at most."""

        def accept(state: TrainState) -> bool:
            return state.step <= latest and self._progress.rewinds.accept(state.step, len(state.rewinds))

        return store.agree_on_newest(self._checkpoints, self._mesh, warn, accept)

    def _begin(self, warnings: list[str]) -> None:
        """Start at step 0, with the weights of another run if that is asked for."""
        if self._progress.rewinds.taken:
            self._leave(-1)
        self._recorder.go_on()
        self._report_damage(warnings)
        self._say(f"starting {self._folder}")
        if self._config.checkpoint.warm_start is not None:
            self._warm_start(Path(self._config.checkpoint.warm_start))

    def _go_on(self, path: Path, manifest: dict[str, Any], warnings: list[str]) -> None:
        """Resume a checkpoint of this run, and record the differences."""
        state = train_state(manifest)
        allowed = self.rules.refuse_changes(state, path)
        self._loader.restore(state.stream)
        self._take_over(path, manifest)
        self._report_damage(warnings)
        self._recorder.event("resumed", f"from {path.name} on {self._mesh.world_size} ranks")
        if state.flops is None:
            self._recorder.event(
                "budget", f"{path.name} does not say what it spent: FLOPs are taken as expected, seconds as 0"
            )
        if allowed:
            self._recorder.event("changed", f"since {path.name}: {', '.join(allowed)}")

    def _take_over(self, path: Path, manifest: dict[str, Any]) -> None:
        """Replace engine and progress by those of the checkpoint, and forget what came after it."""
        state = train_state(manifest)
        if self._progress.rewinds.taken or state.rewinds:
            self._leave(state.step)
        missing = store.restore(self._engine, path, manifest)
        self._progress.restore(state)
        self._recorder.go_on()
        if missing:
            self._recorder.event(
                "state_begins_anew",
                f"{path.name} is of an earlier release, without {', '.join(missing)}: they begin anew",
            )

    def _leave(self, step: int) -> None:
        """After rewinds, checkpoints of later steps are of a course that was left: they make room for new ones."""
        if self._mesh.is_main:
            store.discard_after(self._checkpoints, step)
        self._mesh.share(None)  # no rank goes on before that is done

    def _warm_start(self, where: Path) -> None:
        """Begin with the weights of another run."""
        path = store.locate(where)
        manifest = store.agree_on(path, self._mesh)
        self.rules.refuse_tokenizer(train_state(manifest), path)
        became = store.warm_start(self._engine, path, manifest)
        words = [f"{len(became.loaded)} weights of {path}"]
        for names, said in ((became.fresh, "start anew"), (became.left, "left behind")):
            if names:
                words.append(f"{said}: {', '.join(names)}")
        self._recorder.event("warm_start", "; ".join(words))

    def _report_damage(self, warnings: list[str]) -> None:
        for warning in warnings:
            self._recorder.event("checkpoint_damaged", warning)
