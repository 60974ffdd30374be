"""``tune.json``: the values that ``moe-pretrain tune`` tried for each scheme of a sweep, and those it chose.

It is written before the runs that it names are started, so that no trial is ever taken for a run of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from moe_pretrain.run_folder.paths import TUNE_FILE
from moe_pretrain.run_folder.record import RunRecord
from moe_pretrain.system.files import read_json, write_json

TrialState = Literal["waiting", "finished", "diverged", "failed"]


@dataclass(frozen=True)
class TuningTrial:
    """One run of the tuning seed.

    Attributes:
        job: Name of its run folder, in the sweep's.
        values: Tuned field -> value it ran with.
        loss: Validation loss at its end, nats per token; None where there is none: it counts as infinite if it
            diverged.
        state: ``waiting``: not at its end yet. ``failed``: ended by an error, so its loss is unknown.
    """

    job: str
    values: dict[str, Any]
    loss: float | None
    state: TrialState


@dataclass(frozen=True)
class TunedScheme:
    """The trials of one scheme and what they decided.

    Attributes:
        name: Its overrides.
        words: The same, one by one.
        trials: In the order in which they were decided on.
        chosen: Tuned field -> value of the best trial; None before all trials are made, or if all of them diverged.
        at_edge: Whether the best rate is the lowest or highest that was tried, so that a better one may lie beyond.
        finals: Names of the run folders of the final runs, one for each final seed; empty before the choice.
    """

    name: str
    words: tuple[str, ...]
    trials: tuple[TuningTrial, ...] = ()
    chosen: dict[str, Any] | None = None
    at_edge: bool = False
    finals: tuple[str, ...] = ()

    @property
    def jobs(self) -> set[str]:
        """Names of all its run folders."""
        return {trial.job for trial in self.trials} | set(self.finals)


@dataclass(frozen=True)
class TuneRecord:
    """Record of a tuned sweep: what it tried and chose.

    Attributes:
        rule: The rule of the search in words.
        field: The field that is searched.
        factor: Step of the grid it begins on.
        trials: Trials of every scheme.
        tuning_seed: Seed of the trials, which no final run has.
        schemes: What was tried and chosen for each.
        former: Names of run folders that an earlier search with other settings made, and this one does not use.
    """

    rule: str
    field: str
    factor: float
    trials: int
    tuning_seed: int
    schemes: tuple[TunedScheme, ...] = ()
    former: tuple[str, ...] = ()

    @property
    def jobs(self) -> set[str]:
        """Names of all its run folders, those that it does not use any more too."""
        return set(self.former).union(*(scheme.jobs for scheme in self.schemes))

    def with_schemes(self, schemes: Sequence[TunedScheme]) -> "TuneRecord":
        """The record with these schemes in place of those of the same name; what they no longer use is ``former``."""
        new = {scheme.name: scheme for scheme in schemes}
        merged = {scheme.name: scheme for scheme in self.schemes} | new
        used = set[str]().union(*(scheme.jobs for scheme in merged.values()))
        return replace(self, schemes=tuple(merged.values()), former=tuple(sorted(self.jobs - used)))

    def write(self, folder: Path) -> None:
        """Put it into the sweep's folder, whole or not at all."""
        write_json(folder / TUNE_FILE, asdict(self))


def read_tune_record(folder: Path) -> TuneRecord | None:
    """The record of the sweep in ``folder``; None where nothing was tuned.

    Raises:
        ValueError: The file is broken.
    """
    path = folder / TUNE_FILE
    if not path.exists():
        return None
    facts = read_json(path)
    try:
        schemes = tuple(_scheme(each) for each in facts.pop("schemes"))
        return TuneRecord(**{**facts, "schemes": schemes, "former": tuple(facts["former"])})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is broken ({error}): tune the sweep again to write it anew") from None


def _scheme(facts: Mapping[str, Any]) -> TunedScheme:
    trials = tuple(TuningTrial(**each) for each in facts["trials"])
    return TunedScheme(**{**facts, "words": tuple(facts["words"]), "finals": tuple(facts["finals"]), "trials": trials})


@dataclass(frozen=True)
class TuningFolder:
    """A sweep that was tuned.

    Attributes:
        record: What it says of itself.
        trials: Run of each trial that is there, by its job's name.
    """

    record: TuneRecord
    trials: dict[str, RunRecord]


def split_trials(runs: Sequence[RunRecord]) -> tuple[list[RunRecord], dict[Path, TuningFolder]]:
    """Runs to be compared, and the tuned sweeps among their folders with their trials.

    Trials, and runs of an earlier search that the present one does not use, are no runs to compare: a trial of the
    chosen rate differs from the final runs in nothing but its seed, by whose luck it was chosen.

    Raises:
        ValueError: The record of a tuned sweep is broken.
    """
    folders: dict[Path, TuningFolder | None] = {}
    compared = []
    for run in runs:
        parent = run.folder.parent
        if parent not in folders:
            record = read_tune_record(parent)
            folders[parent] = None if record is None else TuningFolder(record, {})
        tuned = folders[parent]
        if tuned is None:
            compared.append(run)
        elif any(run.folder.name == trial.job for scheme in tuned.record.schemes for trial in scheme.trials):
            tuned.trials[run.folder.name] = run
        elif run.folder.name not in tuned.record.former:
            compared.append(run)
    return compared, {folder: tuned for folder, tuned in folders.items() if tuned is not None}


def tuned_fields(folders: Mapping[Path, TuningFolder]) -> set[str]:
    """Every field that any scheme's trials changed."""
    return {
        name
        for folder in folders.values()
        for scheme in folder.record.schemes
        for trial in scheme.trials
        for name in trial.values
    }
