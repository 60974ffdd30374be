"""Where a run begins, goes on from, and goes back to: the checkpoints on its course, and those it leaves."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_pretrain import data
from moe_pretrain.checkpoint import store
from moe_pretrain.config.schema import Config, ConfigError
from moe_pretrain.engine.engine import TrainEngine
from moe_pretrain.run_folder.rewinds import read_rewinds, write_rewinds
from moe_pretrain.schedule.loss_spikes import Rewind, Rewinds
from moe_pretrain.train.recorder import Journal, SickRows
from moe_pretrain.train.resume_rules import Identity
from moe_pretrain.train.train_state import Progress


class Course:
    """Takes over checkpoints of a run's folder; every rank does the same at the same time."""

    def __init__(
        self,
        config: Config,
        engine: TrainEngine,
        progress: Progress,
        identity: Identity,
        loader: data.TrainLoader,
        journal: Journal,
        sick_rows: SickRows,
        say: Callable[[str], None],
    ):
        """Nothing is taken over yet.

        Args:
            config: The run's configuration.
            engine: Whose weights and optimizer are replaced.
            progress: How far the run has come.
            identity: Which run it is.
            loader: What yields its micro-batches.
            journal: What it writes down.
            sick_rows: Where the rows of a spike are noted.
            say: Prints a line, on the main rank.
        """
        self._config, self._engine, self._mesh, self._say = config, engine, engine.mesh, say
        self._progress, self._identity, self._loader = progress, identity, loader
        self._journal, self._sick_rows = journal, sick_rows
        self._folder, self._checkpoints = config.run.folder, config.run.folder / store.CHECKPOINTS

    def resume(self) -> None:
        """Go on from the newest good checkpoint, or begin, as ``checkpoint.resume`` asks.

        Raises:
            ConfigError: What is found is not what is asked for, is of another run, or is damaged.
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
            spike: What it was, in words.

        Returns:
            False if no checkpoint lies before these rows, which is said: then nothing has changed.
        """
        progress, skip_steps = self._progress, self._config.spike.skip_steps
        step = progress.step - 1
        stop = progress.rewinds.data_step(step) + 1
        first = max(0, stop - skip_steps)
        found = self._newest(lambda warning: None, progress.step - skip_steps)
        if found is None:
            self._journal.event("not_rewound", f"step {step}: no checkpoint lies before the rows to be skipped")
            return False
        path, manifest = found
        progress.rewinds = Rewinds([*progress.rewinds.taken, Rewind(manifest["state"]["step"], first, stop)])
        if self._mesh.is_main:
            write_rewinds(self._folder, progress.rewinds)
        where = self._sick_rows.note(stop - 1, "spike")
        self._take_over(path, manifest)
        self._journal.event(
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

        def accept(state: dict[str, Any]) -> bool:
            return state["step"] <= latest and self._progress.rewinds.accept(state)

        return store.agree_on_newest(self._checkpoints, self._mesh, warn, accept)

    def _begin(self, warnings: list[str]) -> None:
        """Start at step 0, with the weights of another run if that is asked for."""
        if self._progress.rewinds.taken:
            self._leave(-1)
        self._journal.go_on()
        self._report_damage(warnings)
        self._say(f"starting {self._folder}")
        if self._config.checkpoint.warm_start is not None:
            self._warm_start(Path(self._config.checkpoint.warm_start))

    def _go_on(self, path: Path, manifest: dict[str, Any], warnings: list[str]) -> None:
        """Resume a checkpoint of this run, and say what differs."""
        state = manifest["state"]
        allowed = self._identity.refuse_changes(state, path)
        self._loader.restore(state.get("stream"))
        self._take_over(path, manifest)
        self._report_damage(warnings)
        self._journal.event("resumed", f"from {path.name} on {self._mesh.world_size} ranks")
        if "flops" not in state:
            self._journal.event(
                "budget", f"{path.name} does not say what it spent: FLOPs are taken as expected, seconds as 0"
            )
        if allowed:
            self._journal.event("changed", f"since {path.name}: {', '.join(allowed)}")

    def _take_over(self, path: Path, manifest: dict[str, Any]) -> None:
        """Replace what the run is by what the checkpoint holds, and forget what came after it."""
        state = manifest["state"]
        if self._progress.rewinds.taken or state.get("rewinds"):
            self._leave(state["step"])
        store.restore(self._engine, path, manifest)
        self._progress.restore(state)
        self._journal.go_on()

    def _leave(self, step: int) -> None:
        """After rewinds, checkpoints of later steps are of a course that was left: they make room for new ones."""
        if self._mesh.is_main:
            store.discard_after(self._checkpoints, step)
        self._mesh.share(None)  # no rank goes on before that is done

    def _warm_start(self, where: Path) -> None:
        """Begin with the weights of another run."""
        path = store.locate(where)
        manifest = store.agree_on(path, self._mesh)
        self._identity.refuse_tokenizer(manifest["state"], path)
        became = store.warm_start(self._engine, path, manifest)
        words = [f"{len(became.loaded)} weights of {path}"]
        for names, said in ((became.fresh, "start anew"), (became.left, "left behind")):
            if names:
                words.append(f"{said}: {', '.join(names)}")
        self._journal.event("warm_start", "; ".join(words))

    def _report_damage(self, warnings: list[str]) -> None:
        for warning in warnings:
            self._journal.event("checkpoint_damaged", warning)
