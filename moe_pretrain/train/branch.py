"""Branches: runs that begin with all that a checkpoint of another run knew, and go another way from there."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_pretrain.checkpoint.manifest import complete_names, folder_name, open_manifest, step_of, train_state
from moe_pretrain.config.schema import Config, ConfigError, to_values
from moe_pretrain.run_folder.lock import owned
from moe_pretrain.run_folder.metrics_file import JsonlSink, read_rows
from moe_pretrain.run_folder.paths import CHECKPOINTS, METRICS_FILE, named_run
from moe_pretrain.train.resume_rules import changes


@dataclass(frozen=True)
class Branch:
    """Place where a run branches off.

    Attributes:
        folder: Folder of the run that it leaves.
        step: Finished steps of the checkpoint.
    """

    folder: Path
    step: int

    @property
    def checkpoint(self) -> Path:
        """Folder of the checkpoint."""
        return self.folder / CHECKPOINTS / folder_name(self.step)


def branch_of(config: Config) -> Branch | None:
    """Place that ``checkpoint.branch_from`` names; None for a run that is no branch.

    Raises:
        ConfigError: It is not ``RUN@STEP``.
    """
    word = config.checkpoint.branch_from
    if word is None:
        return None
    name, _, step = word.rpartition("@")
    if not name or not step.isdecimal():
        raise ConfigError(f"checkpoint.branch_from={word} must be RUN@STEP: the folder or name of a run, and a step")
    return Branch(named_run(config.run.folder, name), int(step))


def check_branch(config: Config) -> None:
    """Refuse a branch that cannot be, before anything starts; a run that has checkpoints goes on from those.

    The checkpoint's manifest is read and verified, its files are not: every process asks, and when the branch begins
    the ranks verify them together, each file once.

    Raises:
        ConfigError: The step was not kept, or what must stay is another; one line.
        CheckpointError: The checkpoint's manifest is damaged.
    """
    branch = branch_of(config)
    if branch is None or complete_names(config.run.folder / CHECKPOINTS):
        return
    word = f"checkpoint.branch_from={config.checkpoint.branch_from}"
    if config.checkpoint.warm_start is not None:
        raise ConfigError(
            f"checkpoint.warm_start={config.checkpoint.warm_start} must be null with {word}: it has weights"
        )
    if not branch.folder.is_dir():
        raise ConfigError(f"{word}: {branch.folder} must be the folder of a run, or its name beside this one")
    kept = sorted(step for path in complete_names(branch.folder / CHECKPOINTS) if (step := step_of(path)) is not None)
    if branch.step not in kept:
        raise ConfigError(
            f"{word}: step {branch.step} was not kept, {branch.folder} has {', '.join(map(str, kept)) or 'none'}; "
            "checkpoint.keep_every_steps keeps checkpoints for ever"
        )
    state = train_state(open_manifest(branch.checkpoint))
    changes(state.identity.config, to_values(config), is_branch=True).check(branch.checkpoint, "a branch keeps them")
    if config.num_steps <= branch.step:
        raise ConfigError(
            f"budget: the run comes to {config.num_steps} steps, which must be more than the {branch.step} of {word}"
        )


def record_in_trunk(branch: Branch, run: Path, tokens: int, say: Callable[[str], None]) -> str:
    """Write into the metrics of the run that is left that ``run`` branches off; in words why not, or nothing.

    Args:
        branch: Where the run is left.
        run: Folder of the run that goes on from there.
        tokens: Consumed up to there.
        say: Hears of the folder's lock.
    """
    try:
        with owned(branch.folder, say):
            path = branch.folder / METRICS_FILE
            last = next((row for row in reversed(read_rows(path)) if row["step"] <= branch.step), {})
            sink = JsonlSink(path)
            clock: dict[str, Any] = {"tokens": tokens} | {key: last.get(key, 0) for key in ("seconds", "attempt")}
            message = f"{run} goes on from {branch.checkpoint.name}"
            sink.write({"kind": "event", "step": branch.step, **clock, "event": "branched_off", "message": message})
            sink.close()
    except (OSError, ValueError) as error:
        return f"; {branch.folder} does not say so: {' '.join(str(error).split())}"
    return ""
