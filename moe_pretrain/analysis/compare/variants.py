"""Variants of a sweep: runs that differ in nothing but their seed, and what tells variants apart."""

import json
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_pretrain.run_folder.identity import SPEED, deciding
from moe_pretrain.run_folder.paths import CHECKPOINTS, RUN_FILES, named_run
from moe_pretrain.run_folder.provenance import read_config
from moe_pretrain.run_folder.record import RunRecord, differences, find_runs, flatten, show
from moe_pretrain.run_folder.tune_record import split_trials, tuned_fields

_HEADS = ("model.name", "router.name")


@dataclass(frozen=True)
class Variant:
    """Runs that differ in nothing but their seeds.

    Attributes:
        name: What sets it apart from the other variants.
        values: Configuration, as far as it decides the result or the speed, without the seed.
        runs: All its runs, in any state.
    """

    name: str
    values: dict[str, Any]
    runs: list[RunRecord]

    @property
    def counted(self) -> list[RunRecord]:
        """Complete runs, the first of each seed: the same seed again is no further evidence."""
        first: dict[int, RunRecord] = {}
        for run in self.runs:
            if run.is_complete:
                first.setdefault(run.seed, run)
        return [first[seed] for seed in sorted(first)]

    def by_seed(self, measure: Callable[[RunRecord], float | None]) -> dict[int, float]:
        """``measure`` of the counted runs, those without left out."""
        return {run.seed: value for run in self.counted if (value := measure(run)) is not None}


def one_of_each_variant(root: Path) -> list[Path]:
    """Folder of the first complete run of each variant below ``root`` that routes; of ``root`` if that is a run.

    Raises:
        ValueError: There is none.
    """
    if root.is_dir() and RUN_FILES & {path.name for path in root.iterdir()}:
        return [root]
    runs, tuned = split_trials(find_runs(root))
    variants = [
        each for each in group(runs, tuned_fields(tuned)) if each.values.get("router.name") != "dense" and each.counted
    ]
    if not variants:
        raise ValueError(f"FOLDER={root} must be a run, or have complete runs of models with routing below it")
    return [variant.counted[0].folder for variant in variants]


def _experiment(values: Mapping[str, Any]) -> dict[str, Any]:
    own = deciding(values)
    return {key: value for key, value in values.items() if (key in own or key in SPEED) and key != "seed"}


def group(runs: Iterable[RunRecord], tuned: Container[str] = ()) -> list[Variant]:
    """Put runs of equal configuration together and name them by what differs, in order of their first run.

    Runs that differ in nothing but fields of speed are variants where they have a seed in common: then speeds are what
    is compared. Else one was started, or resumed, on another topology, and it is one more seed of the same variant. So
    are runs of other seeds that branched off from, or began with the weights of, runs that differ in their seeds alone.
    Runs without a readable configuration belong to no variant.

    Args:
        runs: Any runs.
        tuned: Fields that name a variant only where nothing else does: they were chosen for it, and are not what it is.
    """
    grouped: dict[str, tuple[dict[str, Any], list[RunRecord]]] = {}
    for run in runs:
        if run.values:
            values = _experiment(run.values)
            grouped.setdefault(json.dumps(values, sort_keys=True, default=str), (values, []))[1].append(run)
    together = _other_seeds_of_one(list(grouped.values()))
    names = names_apart([values for values, _ in together], tuned)
    return [Variant(name, values, own) for name, (values, own) in zip(names, together, strict=True)]


def _other_seeds_of_one(
    grouped: Sequence[tuple[dict[str, Any], list[RunRecord]]],
) -> list[tuple[dict[str, Any], list[RunRecord]]]:
    """Groups with those put together that share no seed and differ in speed, or in the place of a beginning, alone."""
    kin: dict[str, list[tuple[dict[str, Any], list[RunRecord]]]] = {}
    for values, runs in grouped:
        kin.setdefault(_what_decides(values, runs[0].folder), []).append((values, runs))
    together = []
    for groups in kin.values():
        seeds = [seed for _, runs in groups for seed in {run.seed for run in runs}]
        if len(set(seeds)) == len(seeds):
            together.append((groups[0][0], [run for _, runs in groups for run in runs]))
        else:
            together += groups
    order = [id(values) for values, _ in grouped]
    return sorted(together, key=lambda each: order.index(id(each[0])))


def _what_decides(values: Mapping[str, Any], folder: Path) -> str:
    """Settings that decide the result, but the seed: of a beginning, if it can be read, its own and not the place."""
    own = {key: value for key, value in _experiment(values).items() if key not in SPEED}
    if branch := own.get("checkpoint.branch_from"):
        name, _, step = str(branch).rpartition("@")
        own["checkpoint.branch_from"] = [_settings(named_run(folder, name)) or name, step]
    if start := own.get("checkpoint.warm_start"):
        place = Path(str(start))
        is_step = place.parent.name == CHECKPOINTS
        own["checkpoint.warm_start"] = [
            _settings(place.parent.parent if is_step else place) or str(start),
            place.name if is_step else "",
        ]
    return json.dumps(own, sort_keys=True, default=str)


def _settings(folder: Path) -> str | None:
    """Settings that decide the result of the run in ``folder``; None if there is none that can be read."""
    with suppress(ValueError):
        if values := flatten(read_config(folder)):
            return _what_decides(values, folder)
    return None


def names_apart(values: Sequence[Mapping[str, Any]], tuned: Container[str]) -> list[str]:
    """Size and scheme where they differ, then what tells variants of the same size and scheme apart.

    Of those, what most of them have is left out: ``top_k``, ``top_k experts=unequal``, ``top_k load_balance_weight=0``.
    """
    differing = differences(values)
    leaves = [_leaf(key) for key in differing]
    heads = [key for key in _HEADS if key in differing]
    kin: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for each in values:
        kin.setdefault(tuple(show(each, key) for key in heads), []).append(each)
    names = []
    for each in values:
        head = tuple(show(each, key) for key in heads)
        alike = kin[head]
        rest = [
            f"{_leaf(key) if leaves.count(_leaf(key)) == 1 else key}={show(each, key)}"
            for key in _telling(alike, tuned)
            if key in each and 2 * sum(show(other, key) == show(each, key) for other in alike) <= len(alike)
        ]
        names.append(" ".join([*head, *rest]) or show(each, "router.name"))
    return names


def _leaf(key: str) -> str:
    """Last word of a key; of the name of a group of fields the group's, as in its override: ``experts=unequal``."""
    return key.removesuffix(".name").rpartition(".")[2]


def _telling(values: Sequence[Mapping[str, Any]], tuned: Container[str]) -> list[str]:
    """The fewest of the differing keys, taken one by one where they tell most, that tell all ``values`` apart.

    Those in ``tuned`` are taken last.
    """
    differing = differences(values)
    chosen: list[str] = []

    def kinds(keys: Sequence[str]) -> int:
        return len({tuple(show(each, key) for key in keys) for each in values})

    while kinds(chosen) < len(values) and len(chosen) < len(differing):
        left = [key for key in differing if key not in chosen]
        useful = [key for key in left if key not in tuned and kinds([*chosen, key]) > kinds(chosen)]
        chosen.append(max(useful or left, key=lambda key: kinds([*chosen, key])))
    return [key for key in differing if key in chosen]


def unnamed_differences(variants: Sequence[Variant], tuned: Container[str] = ()) -> list[str]:
    """Keys that differ between variants though neither their names nor the change of scheme or size tells so.

    Where schemes differ, so do their own fields; where sizes differ, so does the model. Anything else, such as a
    learning rate that changes together with the scheme, leaves open what made the difference. Fields in ``tuned`` were
    chosen for each variant, which the table of what was tuned tells.
    """
    differing = differences([variant.values for variant in variants])
    told = tuple(key.partition(".")[0] + "." for key in _HEADS if key in differing)
    shown = {word.partition("=")[0] for variant in variants for word in variant.name.split(" ")}
    return [key for key in differing if key not in tuned and not {key, _leaf(key)} & shown and not key.startswith(told)]
