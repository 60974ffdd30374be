"""From the overrides of a sweep's jobs to jobs that are checked, named and written down; nothing is started."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

from moe_pretrain.config.earlier_releases import completed
from moe_pretrain.config.load import load
from moe_pretrain.config.preflight import check_warm_up, preflight
from moe_pretrain.config.recorded import kept, words_at_start
from moe_pretrain.config.schema import Config, SweepConfig, to_values
from moe_pretrain.run_folder.identity import decides, deciding
from moe_pretrain.run_folder.paths import STATE_FILE
from moe_pretrain.run_folder.record import differences, flatten, show
from moe_pretrain.sweep.job_record import SweepJob, read_jobs

MAX_BYTES = 120
"""Longest name: file systems take 255 bytes, wandb 128 characters."""
_UNSAFE = re.compile(r"[^A-Za-z0-9_.=,@+-]+")
_SHOWN_DIFFERENCES = 3


@dataclass(frozen=True)
class Sweep:
    """Settings that all jobs of a sweep share.

    Attributes:
        folder: Its folder.
        fixed: Overrides of every job, in the user's words.
        cache_dir: Folder of tokenised corpora; one for all.
        settings: The block ``sweep`` of the configuration.
    """

    folder: Path
    fixed: tuple[str, ...]
    cache_dir: str
    settings: SweepConfig
    _checked: dict[tuple[str, ...], tuple[dict[str, Any], int]] = field(default_factory=dict, repr=False, compare=False)
    _planned: dict[tuple[str, ...], SweepJob] = field(default_factory=dict, repr=False, compare=False)

    def check(self, swept: Sequence[str]) -> tuple[dict[str, Any], int]:
        """Resolved configuration and number of steps of a job, if a run of it could start.

        Args:
            swept: Its swept overrides.

        Raises:
            ValueError: It could not; one line that names it.
        """
        key = tuple(swept)
        if key not in self._checked:
            config = load_job(self._words(key, job_name(key)), job_name(key))
            self._checked[key] = json.loads(json.dumps(to_values(config))), config.num_steps
        return self._checked[key]

    def plan(self, batch: Sequence[Sequence[str]]) -> list[SweepJob]:
        """The jobs that stand for combinations of overrides, in the order of ``batch``; new ones get their folders.

        A combination that is a job already, by its name or by its configuration, is that job: a sweep with more values
        keeps what it has.

        Args:
            batch: The swept overrides of each job.

        Raises:
            ValueError: A combination is wrong, or has the name of a started job that was something else; one line that
                names it. No folder is made then.
        """
        new = [swept for swept in dict.fromkeys(map(tuple, batch)) if swept not in self._planned]
        if new:
            for swept in new:
                self.check(swept)
            jobs = self._match(new, read_jobs(self.folder))
            for job in jobs.values():
                job.write()
            self._planned.update(jobs)
        return [self._planned[tuple(swept)] for swept in batch]

    def _words(self, swept: tuple[str, ...], name: str) -> tuple[str, ...]:
        place = {
            "run.name": name,
            "run.output_dir": str(self.folder),
            "run.cache_dir": self.cache_dir,
            "sweep.name": self.folder.name,
        }
        own = [word for word in self.fixed if word.partition("=")[0].lstrip("+") not in place]
        return (*own, *swept, *(f"{key}={quoted(value)}" for key, value in place.items()))

    def _match(self, new: Sequence[tuple[str, ...]], known: Sequence[SweepJob]) -> dict[tuple[str, ...], SweepJob]:
        by_name = {job.name: job for job in known}
        by_identity = {identity(job.values): job for job in reversed(known)}
        number = 1 + max((job.number for job in known), default=-1)
        jobs: dict[tuple[str, ...], SweepJob] = {}
        for swept in new:
            name, (values, num_steps) = job_name(swept), self.check(swept)
            namesake = by_name.get(name)
            same = namesake if namesake and identity(namesake.values) == identity(values) else None
            same = same or by_identity.get(identity(values))
            words: tuple[str, ...] = ()
            if same is None and namesake is not None:
                same, words = self._of_another_release(namesake, swept)
            if same is None and namesake is not None and (namesake.folder / STATE_FILE).exists():
                raise ValueError(self._conflict(namesake, values))
            old = same or namesake
            place, at = (old.folder, old.number) if old else (self.folder / name, number)
            all_words = (*self._words(swept, place.name), *words)
            if words:
                config = load_job(all_words, place.name)
                values, num_steps = json.loads(json.dumps(to_values(config))), config.num_steps
            job = SweepJob(place, at, all_words, num_steps, values)
            jobs[swept] = by_name[job.name] = by_identity[identity(values)] = job
            number += old is None
        return jobs

    def _of_another_release(
        self, namesake: SweepJob, swept: tuple[str, ...]
    ) -> tuple[SweepJob | None, tuple[str, ...]]:
        """The job of this name if only defaults have moved since, with the overrides that keep those it had.

        Raises:
            ConfigError: A text of the job is another one in this release.
        """
        words = self._words(swept, namesake.name)
        # What keeps older defaults stands behind the words of the sweep, the last of which is its name.
        own = 1 + max((at for at, word in enumerate(namesake.words) if word.startswith("sweep.name=")), default=-1)
        earlier = words_at_start(namesake.folder, namesake.words[:own], words)
        keeping = tuple(kept(earlier, namesake.values, words))
        now = to_values(load_job([*words, *keeping], namesake.name))
        then = completed(json.loads(json.dumps(namesake.values)))
        is_same = identity(json.loads(json.dumps(now))) == identity(then)
        return (namesake, keeping) if is_same else (None, ())

    def _conflict(self, started: SweepJob, values: Mapping[str, Any]) -> str:
        then, now = (what_it_is(each) for each in (started.values, values))
        changed = [f"{key}={show(now, key)} (was {show(then, key)})" for key in differences([then, now])]
        more = f" and {len(changed) - _SHOWN_DIFFERENCES} more" if len(changed) > _SHOWN_DIFFERENCES else ""
        return (
            f"sweep.name={self.folder.name}: its job {started.name} was started with other settings: "
            f"{', '.join(changed[:_SHOWN_DIFFERENCES])}{more}; give another sweep.name to start anew"
        )


def load_job(words: Sequence[str], name: str) -> Config:
    """The configuration of a job, if a run of it could start.

    Raises:
        ValueError: It could not; one line that names it.
    """
    try:
        config = load(words)
        check_warm_up(config, preflight(config, config.parallel.processes))
    except ValueError as error:
        raise ValueError(f"job {name}: {error}") from error
    return config


def what_it_is(values: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a resolved configuration, with dotted keys, that decides a job's result."""
    return deciding(flatten(values))


def identity(values: Mapping[str, Any]) -> str:
    """Equal for the same job, whatever it is called and however it is run."""
    return json.dumps(what_it_is(values), sort_keys=True)


def job_name(swept: Sequence[str]) -> str:
    """Folder of one run: its swept overrides, ``router=top_k,seed=1``.

    What does not belong into a folder's name is replaced, and what is too long cut; a hash then tells such names apart.
    """
    return _folder_name(",".join(word.lstrip("+") for word in swept))


def sweep_name(swept_keys: Iterable[str], words: Iterable[str]) -> str:
    """Default name of a sweep: what is swept, and a hash of the command without what only says how to run it."""
    keys = "-".join(key.lstrip("+") for key in swept_keys)
    fields = {word: word.partition("=")[0].lstrip("+~") for word in words}
    recipe = sorted(word for word, field in fields.items() if decides(field) and not field.startswith("hydra"))
    return _folder_name(f"sweep-{keys}-{_digest(recipe)}")


def quoted(value: str) -> str:
    """A value of an override that Hydra takes as this very text."""
    return QuotedString(value, Quote.single).with_quotes()


def _folder_name(text: str) -> str:
    name = _UNSAFE.sub("-", text)
    if name == text and len(name) <= MAX_BYTES:
        return name
    ending = f"-{_digest([text])}"
    return name[: MAX_BYTES - len(ending)] + ending


def _digest(words: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:8]
