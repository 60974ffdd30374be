"""Several corpora in stated proportions: the configuration, and their shards side by side."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import pydantic

from moe_pretrain.data.documents.config import CorpusConfig
from moe_pretrain.data.rows.interleave import Turns, parts_of
from moe_pretrain.data.shards.reader import ShardReader


@dataclass(frozen=True)
class PhaseConfig:
    """Weights from some step on.

    Attributes:
        step: First step with these weights, at least 1.
        weights: As in ``MixtureConfig``.
    """

    step: int
    weights: dict[str, float]


@dataclass(frozen=True)
class MixtureConfig:
    """Several corpora, each in its share of every stretch of the run: see ``turns``.

    Attributes:
        source: The word that chooses a mixture.
        sources: The corpora by name. A choice of the group ``data`` fills one in: ``+data@data.sources.code=files
            data.sources.code.paths=[a.jsonl]``. The name is part of the key of the source's order. A text that is in
            several sources is held out of all of them where they have the same ``validation_fraction``.
        weights: Share of the rows of each source, in any unit; 0 for one that only comes in a later phase. Their
            proportion must come to at most a million whole parts.
        phases: Later weights, by rising step.
        when_exhausted: What happens when a source has served all of its rows once: ``repeat`` begins it again in a new
            order, ``stop`` makes the last whole step before that the run's last.
    """

    source: Literal["mixture"]
    sources: dict[str, Annotated[CorpusConfig, pydantic.Field(discriminator="source")]]
    weights: dict[str, float]
    phases: tuple[PhaseConfig, ...]
    when_exhausted: Literal["repeat", "stop"]

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("data.sources must name at least one corpus: +data@data.sources.NAME=files")
        for name in self.sources:
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"data.sources: name {name!r} must be of letters, digits, - and _")
        steps = [phase.step for phase in self.phases]
        if steps != sorted(set(steps)) or min(steps, default=1) < 1:
            raise ValueError(f"data.phases: steps {steps} must be at least 1 and rise")
        for field, weights in self._weights().items():
            if weights.keys() != self.sources.keys():
                raise ValueError(
                    f"{field} has {_listed(weights)}: must be one weight for each of data.sources "
                    f"{_listed(self.sources)}"
                )
            try:
                parts_of(list(weights.values()))
            except ValueError as error:
                raise ValueError(f"{field}={weights} {error}") from None
        for name in self.sources:
            if not any(weights[name] for weights in self._weights().values()):
                raise ValueError(f"data.weights.{name}=0 must be above 0, here or in one of data.phases")

    def check_steps(self, num_steps: int) -> None:
        """Refuse a phase that the run does not reach.

        Raises:
            ValueError: There is one.
        """
        for phase in self.phases:
            if phase.step >= num_steps:
                raise ValueError(f"data.phases: step={phase.step} must be below the run's {num_steps} steps")

    def turns(self, rows_per_step: int) -> Turns:
        """Source that serves each position; the sources are the names in sorted order."""
        names = sorted(self.sources)
        starts = [0, *(phase.step * rows_per_step for phase in self.phases)]
        parts = [parts_of([weights[name] for name in names]) for weights in self._weights().values()]
        return Turns(list(zip(starts, parts, strict=True)))

    def _weights(self) -> dict[str, dict[str, float]]:
        """Every set of weights, in order, by its place in the configuration."""
        later = {f"data.phases[{number}].weights": phase.weights for number, phase in enumerate(self.phases)}
        return {"data.weights": self.weights, **later}


DataConfig = CorpusConfig | MixtureConfig


@dataclass(frozen=True)
class MixedShards:
    """The shards of all sources of a mixture, which a loader reads as one.

    Attributes:
        readers: Shards by the sources' names.
        config: How they take turns.
    """

    readers: Mapping[str, ShardReader]
    config: MixtureConfig

    @property
    def num_tokens(self) -> int:
        """Tokens of all sources."""
        return sum(reader.num_tokens for reader in self.readers.values())


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(sorted(names)) or "nothing"
