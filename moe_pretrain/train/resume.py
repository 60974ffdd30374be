"""Beginning, going on and going back: a run takes over checkpoints of its folder, and discards those it has left."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from moe_pretrain.checkpoint import store
from moe_pretrain.checkpoint.store import TrainState, train_state
from moe_pretrain.config.schema import Config, ConfigError
from moe_pretrain.engine.engine import TrainEngine
from moe_pretrain.huggingface.folder import HuggingFaceFolder, is_folder
from moe_pretrain.huggingface.tokenizer_files import load_run_tokenizer
from moe_pretrain.run_folder.metrics_file import read_rows
from moe_pretrain.run_folder.paths import CHECKPOINTS, METRICS_FILE
from moe_pretrain.run_folder.provenance import read_summary, router_file_hash
from moe_pretrain.run_folder.rewinds import read_rewinds, write_rewinds
from moe_pretrain.schedule.loss_spikes import Rewind, Rewinds
from moe_pretrain.train.branch import Branch, branch_of, record_in_trunk
from moe_pretrain.train.context import RunContext
from moe_pretrain.train.corpora import RunData
from moe_pretrain.train.progress import RunProgress
from moe_pretrain.train.recorder import RunRecorder
from moe_pretrain.train.resume_rules import ResumeRules
from moe_pretrain.train.saving import CheckpointSaving


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
        saving: CheckpointSaving,
    ):
        """Nothing is taken over yet: ``progress`` and ``engine`` are replaced when a checkpoint is."""
        self.rules = ResumeRules(config, data.corpus, engine)
        self._config, self._engine, self._mesh, self._say = config, engine, context.mesh, context.say
        self._progress, self._recorder, self._loader, self._saving = progress, recorder, data.loader, saving
        self._folder, self._checkpoints = config.run.folder, config.run.folder / CHECKPOINTS

    def resume(self) -> None:
        """Go on from the newest good checkpoint, or begin, as ``checkpoint.resume`` asks.

        Raises:
            ConfigError: The checkpoints do not fit ``checkpoint.resume``, are of another run, or none of them is good.
            CheckpointError: One cannot be read, is hostile or of another release.
        """
        policy = self._config.checkpoint.resume
        warnings: list[str] = []
        self._progress.rewinds = self._mesh.on_main(lambda: read_rewinds(self._folder))
        found = self._newest(warnings.append, is_lenient=policy == "restart")
        names: list[Path] = self._mesh.on_main(lambda: store.complete_names(self._checkpoints))
        if found is None and policy == "must":
            raise ConfigError(
                f"checkpoint.resume=must needs a good checkpoint in {self._checkpoints}; there is none"
                + "".join(f"; {warning}" for warning in warnings)
            )
        if names and policy == "never":
            raise ConfigError(f"checkpoint.resume=never, but {names[0]} exists; choose another run.name")
        if found is not None:
            if policy == "restart":
                self._say(f"checkpoint.resume=restart: {found[0].name} is good, the run goes on from it")
            self._go_on(*found, warnings)
        elif policy == "restart":
            self._restart(names, warnings)
        else:
            self._refuse_to_start_over(names, warnings)
            self._begin(warnings)

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

    def _refuse_to_start_over(self, names: list[Path], warnings: list[str]) -> None:
        """Raise if the run has saved something: to begin anew would put other checkpoints and metrics in its place.

        Raises:
            ConfigError: There are checkpoints of which none is good, or the metrics tell of some that are gone.
        """
        way_out = "; checkpoint.resume=restart sets what is there aside and begins anew, as does another run.name"
        if names:
            raise ConfigError(
                f"{self._checkpoints} has {len(names)} checkpoint{'s' * (len(names) > 1)} and none that this run can "
                f"go on from: {'; '.join(warnings) or 'they are of a course that was left'}{way_out}"
            )
        saved = self._mesh.on_main(self._last_saved)
        if saved is not None:
            raise ConfigError(
                f"{self._checkpoints} is empty, but {METRICS_FILE} tells of a checkpoint of step {saved}: is a disk "
                f"missing, or a link broken?{way_out}"
            )

    def _last_saved(self) -> int | None:
        rows = [row for row in read_rows(self._folder / METRICS_FILE) if row.get("event") == "checkpoint"]
        return rows[-1]["step"] if rows else None

    def _restart(self, names: list[Path], warnings: list[str]) -> None:
        """Set aside what the run has, of which nothing is good, and begin anew."""

        def clear() -> str | None:
            metrics = self._folder / METRICS_FILE
            if not names and self._last_saved() is None:
                return None
            for path in names:
                store.set_aside(path)
            return str(store.keep_copy(metrics, self._checkpoints).parent)

        place = self._mesh.on_main(clear)
        self._begin(warnings)
        if place is not None:
            self._recorder.event(
                "restarted", f"{len(names)} checkpoints and the metrics so far were set aside: {place}"
            )

    def _newest(
        self, warn: Callable[[str], None], latest: float = math.inf, is_lenient: bool = False
    ) -> tuple[Path, dict[str, Any]] | None:
        """The newest good checkpoint on the run's course, of ``latest`` steps at most."""

        def accept(state: TrainState) -> bool:
            return state.step <= latest and self._progress.rewinds.accept(state.step, len(state.rewinds))

        return store.agree_on_newest(self._checkpoints, self._mesh, warn, accept, is_lenient)

    def _begin(self, warnings: list[str]) -> None:
        """Start at step 0, with the weights of another run if that is asked for, or where that is to be left."""
        self._recorder.go_on()
        self._report_damage(warnings)
        self._say(f"starting {self._folder}")
        if (branch := branch_of(self._config)) is not None:
            self._branch_off(branch)
        elif self._config.checkpoint.warm_start is not None:
            self._warm_start(Path(self._config.checkpoint.warm_start))

    def _go_on(self, path: Path, manifest: dict[str, Any], warnings: list[str]) -> None:
        """Resume a checkpoint of this run, and record the differences."""
        state = train_state(manifest)
        allowed = [*self.rules.refuse_changes(state, path), *self._changed_router_file()]
        self._loader.restore(state.stream)
        self._mesh.on_main(lambda: self._saving.went_on_from(state.step))
        self._take_over(path, manifest)
        self._report_damage(warnings)
        self._recorder.event("resumed", f"from {path.name} on {self._mesh.world_size} ranks")
        if state.flops is None:
            self._recorder.event(
                "budget", f"{path.name} does not say what it spent: FLOPs are taken as expected, seconds as 0"
            )
        if allowed:
            self._recorder.event("changed", f"since {path.name}: {', '.join(allowed)}")

    def _changed_router_file(self) -> list[str]:
        """The field, in the words of other changes, if the file is not what it was at the last start."""
        file = self._config.router_file
        with suppress(ValueError):  # a damaged summary is written anew
            then = read_summary(self._folder).get("router_file_hash")
            if then not in (None, router_file_hash(file)):
                return [f"router_file={file} (was another file)"]
        return []

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
        self._mesh.on_main(lambda: self._saving.leave(step))  # no rank goes on before that is done

    def _branch_off(self, branch: Branch) -> None:
        """Begin with all that a checkpoint of another run knows, and record it in both."""
        path = branch.checkpoint
        manifest = store.agree_on(path, self._mesh)
        state = train_state(manifest)
        allowed = self.rules.refuse_changes(state, path, is_branch=True)
        self._loader.restore(state.stream)
        self._take_over(path, manifest)
        self._progress.leave_trunk()
        if self._mesh.is_main and state.rewinds:
            write_rewinds(self._folder, self._progress.rewinds)
        unsaid = self._mesh.on_main(lambda: record_in_trunk(branch, self._folder, self._progress.tokens, self._say))
        others = f"; changed: {', '.join(allowed)}" if allowed else ""
        self._recorder.event("branched", f"from {path}{others}{unsaid}")

    def _warm_start(self, where: Path) -> None:
        """Begin with the weights of another run, or of a Hugging Face folder."""
        if is_folder(where):
            folder = HuggingFaceFolder(where)
            folder.check(self._config.model, "checkpoint.warm_start")
            load_run_tokenizer(where, self.rules.identity.tokenizer, self._config.tokenizer.end_of_document)
            became = store.take_weights(self._engine, where, folder.shapes, folder)
            self._say_warm_start(where, became, folder.other_routing(self._config.router))
            return
        path = self._mesh.on_main(lambda: store.locate(where))
        manifest = store.agree_on(path, self._mesh)
        other = self.rules.refuse_weights(train_state(manifest), path)
        self._say_warm_start(path, store.warm_start(self._engine, path, manifest), other)

    def _say_warm_start(self, path: Path, became: store.WarmStart, other: Sequence[str]) -> None:
        words = [f"{len(became.loaded)} weights of {path}"]
        for names, said in (
            (became.fresh, "start anew"),
            (became.left, "left behind"),
            (other, "another function of them"),
        ):
            if names:
                words.append(f"{said}: {', '.join(names)}")
        self._recorder.event("warm_start", "; ".join(words))

    def _report_damage(self, warnings: list[str]) -> None:
        for warning in warnings:
            self._recorder.event("checkpoint_damaged", warning)
