"""``tune``: the same number of trials for every scheme, then final runs of each at the best values, as jobs of a sweep.

What is tried next is worked out anew, from the first trial on, whenever the command is started: finished runs are
looked up, so a tuning that was killed anywhere goes on, and can be replayed from its runs.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.launcher import Launcher

from moe_pretrain.config.schema import ConfigError
from moe_pretrain.run_folder.paths import RUN_FILES, SWEEP_FILE
from moe_pretrain.run_folder.record import flatten
from moe_pretrain.run_folder.tune_record import TrialState, TunedScheme, TuneRecord, TuningTrial, read_tune_record
from moe_pretrain.sweep.job_record import JobState, SweepJob, look, read_jobs
from moe_pretrain.sweep.launcher import must_run
from moe_pretrain.sweep.multirun import drive, launcher_of, opened_hydra, prepare
from moe_pretrain.sweep.planned_jobs import Sweep, sweep_name
from moe_pretrain.sweep.rate_search import Setting, rule
from moe_pretrain.sweep.tune_schemes import RATE, SEED, Scheme, TuneSettings, checked, schemes_and_seeds


def tune(words: Sequence[str], settings: TuneSettings) -> int:
    """Tune every scheme that ``words`` list, run each at its best values with every final seed, or go on with it.

    Args:
        words: Overrides: what is listed (``router=top_k,autonomy``) makes schemes, ``seed=1,2,3`` names the final
            seeds, and the rest is shared by all runs.
        settings: How they are tuned.

    Returns:
        Exit code: 0 when every scheme has its final runs, 1 when one has not, 75 when stopped.

    Raises:
        ValueError: The command or one of its jobs is wrong; one line, and nothing was started.
    """
    settings.check()
    with opened_hydra("tune", words) as hydra:
        parser = OverridesParser.create(hydra.config_loader)
        command, found, seeds = schemes_and_seeds(words, settings, parser)
        own_name = sweep_name(["tune", *command.keys], [*command.fixed, *command.swept, *map(" ".join, found)])
        sweep, master = prepare(hydra, command, own_name)
        known = _known_record(sweep.folder, settings)
        schemes = checked(sweep, settings, found, seeds, parser)
        _refuse_unequal_trials(known, schemes, settings)
        tuning = _Tuning(sweep, settings, schemes, seeds, known)
        return drive(
            sweep, ["tune", *words, *_as_words(settings)], (), lambda: tuning.run(launcher_of(hydra, master, sweep))
        )


class _Tuning:
    """One start of a tuning."""

    def __init__(
        self, sweep: Sweep, settings: TuneSettings, schemes: list[Scheme], seeds: list[int], known: TuneRecord | None
    ):
        self._sweep, self._settings, self._schemes, self._seeds = sweep, settings, schemes, seeds
        own = TuneRecord(rule(settings.factor), RATE, settings.factor, settings.trials, settings.tuning_seed)
        self._record = own if known is None else replace(own, schemes=known.schemes, former=known.former)
        self._launched: set[Path] = set()

    def run(self, launcher: Launcher) -> set[Path]:
        """Make what is left of the trials and the final runs; folders of jobs that need not be finished."""
        while batch := [words for scheme in self._schemes for words in self._next_trials(scheme)]:
            self._launch(launcher, batch)
        # By seed, so that a tuning that is stopped has the same seeds of all schemes.
        finals = [
            self._final_words(scheme, seed) for seed, scheme in product(self._seeds, self._schemes) if scheme.chosen
        ]
        if finals:
            self._launch(launcher, finals)
        self._write()
        print(*self._describe(), sep="\n", flush=True)
        diverged = {
            job.folder
            for scheme in self._schemes
            for setting, job in scheme.trials.items()
            if scheme.chosen and math.isinf(scheme.losses.get(setting, 0.0))
        }
        return diverged | {self._sweep.folder / name for name in self._record.former}

    def _next_trials(self, scheme: Scheme) -> list[tuple[str, ...]]:
        """Take up every result that is there; the jobs that the search needs next.

        What is known already is taken up before anything is started, so that the record never forgets a choice.
        """
        while not scheme.failed:
            settings = scheme.search.next(scheme.losses)
            words = [self._words(scheme, setting, self._settings.tuning_seed) for setting in settings]
            jobs = self._plan(words)
            scheme.trials.update(zip(settings, jobs, strict=True))
            states = [look(job.folder) for job in jobs]
            left = [w for w, job, state in zip(words, jobs, states, strict=True) if self._is_left(job, state)]
            if left:
                return left
            if not settings:
                if scheme.chosen is not None:
                    scheme.finals = self._plan([self._final_words(scheme, seed) for seed in self._seeds])
                break
            for setting, state in zip(settings, states, strict=True):
                if state.state in ("finished", "diverged"):
                    scheme.losses[setting] = _loss(state)
                else:  # failed, or somebody stopped or holds it: its loss is not known
                    scheme.failed = True
        return []

    def _is_left(self, job: SweepJob, state: JobState) -> bool:
        is_open = must_run(state, self._sweep.settings.retry) or state.state == "running"  # SLURM may have it still
        return is_open and job.folder not in self._launched

    def _launch(self, launcher: Launcher, batch: Sequence[Sequence[str]]) -> None:
        self._write()
        launcher.launch(batch, initial_job_idx=0)
        self._launched |= {job.folder for job in self._plan(batch)}
        self._write()

    def _plan(self, batch: Sequence[Sequence[str]]) -> list[SweepJob]:
        return self._sweep.plan(batch) if batch else []

    def _words(self, scheme: Scheme, setting: Setting, seed: int) -> tuple[str, ...]:
        return (*scheme.words, *(f"{key}={value}" for key, value in setting), f"{SEED}={seed}")

    def _final_words(self, scheme: Scheme, seed: int) -> tuple[str, ...]:
        assert scheme.chosen is not None
        return self._words(scheme, scheme.chosen, seed)

    def _write(self) -> None:
        self._record = self._record.with_schemes([_recorded(scheme) for scheme in self._schemes])
        self._record.write(self._sweep.folder)

    def _describe(self) -> Iterator[str]:
        """Say what was chosen for each scheme, and what to know of it."""
        for scheme, recorded in zip(self._schemes, map(_recorded, self._schemes), strict=True):
            tried = ", ".join(_in_words(trial) for trial in sorted(recorded.trials, key=lambda t: t.values[RATE]))
            if recorded.chosen is None:
                why = (
                    "all its trials diverged"
                    if scheme.is_searched
                    else "a trial failed or did not end: the same command tries it again"
                )
                yield f"{scheme.name}: no value chosen, {why} ({tried})"
                continue
            chosen = ", ".join(f"{key}={_shown(value)}" for key, value in recorded.chosen.items())
            edge = "; the best rate lies at the edge of what was tried" if recorded.at_edge else ""
            yield f"{scheme.name}: {chosen}, the best of {len(recorded.trials)} trials ({tried}){edge}"


def _in_words(trial: TuningTrial) -> str:
    of = " with ".join(map(_shown, trial.values.values()))
    return f"{of}: {trial.state if trial.loss is None else format(trial.loss, '.4f')}"


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _loss(state: JobState) -> float:
    """The loss of a run at its end; one that diverged or ended without a finite loss is worse than every other."""
    return math.inf if state.state == "diverged" or state.validation_loss is None else state.validation_loss


def _recorded(scheme: Scheme) -> TunedScheme:
    trials = []
    for setting, job in scheme.trials.items():
        loss, flat = scheme.losses.get(setting), flatten(job.values)
        state: TrialState = "finished"
        if loss is None:
            state = "failed" if look(job.folder).state == "failed" else "waiting"
        elif math.isinf(loss):
            state, loss = "diverged", None
        trials.append(TuningTrial(job.name, {key: flat[key] for key, _ in setting}, loss, state))
    chosen = scheme.chosen
    of_chosen = next(
        (trial.values for trial, setting in zip(trials, scheme.trials, strict=True) if setting == chosen), None
    )
    return TunedScheme(
        name=scheme.name,
        words=scheme.words,
        trials=tuple(trials),
        chosen=of_chosen,
        at_edge=chosen is not None and scheme.search.is_at_edge(scheme.losses),
        finals=tuple(job.name for job in scheme.finals),
    )


def _known_record(folder: Path, settings: TuneSettings) -> TuneRecord | None:
    """The record of an earlier start, if this one may go on with it.

    Raises:
        ConfigError: The folder is a run, a sweep that was not tuned, or was tuned with another seed or grid.
    """
    if folder.is_dir() and RUN_FILES & {path.name for path in folder.iterdir()}:
        raise ConfigError(f"sweep.name={folder.name}: {folder} is the folder of a run; give another sweep.name")
    known = read_tune_record(folder)
    if known is None:
        if (folder / SWEEP_FILE).exists() and read_jobs(folder):
            raise ConfigError(
                f"sweep.name={folder.name}: {folder} is a sweep that was not tuned; give another sweep.name"
            )
        return None
    for option, then, now in (
        ("--tuning-seed", known.tuning_seed, settings.tuning_seed),
        ("--factor", known.factor, settings.factor),
    ):
        if then != now:
            raise ConfigError(
                f"{option}={now:g}: {folder} was tuned with {option}={then:g}; give that, or another sweep.name"
            )
    return known


def _refuse_unequal_trials(known: TuneRecord | None, schemes: Sequence[Scheme], settings: TuneSettings) -> None:
    """Refuse to give some schemes of a folder more trials than others."""
    others = {scheme.name for scheme in known.schemes} - {scheme.name for scheme in schemes} if known else set()
    if known and others and known.trials != settings.trials:
        raise ConfigError(
            f"--trials={settings.trials}: {', '.join(sorted(others))} had {known.trials}; give as many, or name these "
            "schemes too"
        )


def _as_words(settings: TuneSettings) -> list[str]:
    """The options of the command."""
    words = [f"--trials={settings.trials}", f"--tuning-seed={settings.tuning_seed}", f"--factor={settings.factor:g}"]
    words += [f"--also={each}" for each in settings.also]
    return words + [f"--scheme={' '.join(each)}" for each in settings.schemes]
