"""Everything that a checkpoint says of its run beside tensors: one typed value, to JSON and back.

The only place that knows the names in the JSON, and which of them the checkpoints of earlier releases lack.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from moe_pretrain.run_folder.rewinds import parse_rewinds
from moe_pretrain.schedule.loss_spikes import Rewind, SpikeState

Values = dict[str, Any]
_Parsed = TypeVar("_Parsed")

_INT64 = range(-(2**63), 2**63)
_COUNT = range(2**63)
_FLOPS = range(2**200)
"""A long run of a large model spends more than 64 bits count; this much is still a float."""


@dataclass(frozen=True)
class RunIdentity:
    """The run that wrote a checkpoint: what a run that goes on from it is compared with.

    Attributes:
        config: Resolved configuration as plain values; empty where it was not recorded.
        corpus_fingerprint: Hash of all tokens and of the tokenizer; None where it was not recorded.
        corpus_facts: Description of the corpus, to explain another fingerprint; empty where there is none.
        tokenizer: Fingerprint of the tokenizer; None where it was not recorded.
        world_size: Number of ranks that wrote it; None where it was not recorded.
        versions: Versions of Python and packages by name.
        resolved: Device, dtype, ZeRO stage and kernels that ``auto`` became, by their names; only those that were
            recorded.
    """

    config: Values = field(default_factory=dict)
    corpus_fingerprint: str | None = None
    corpus_facts: Values = field(default_factory=dict)
    tokenizer: str | None = None
    world_size: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    resolved: Values = field(default_factory=dict)


@dataclass(frozen=True)
class TrainState:
    """Progress of a run at one step, as its checkpoint keeps it.

    Attributes:
        step: Finished optimizer steps.
        tokens: Tokens consumed; None where it was not recorded.
        token_hash: Sum of the hashes of all rows read, wrapped to 64 bits; None where it was not recorded.
        flops: FLOPs spent; None in checkpoints from before FLOPs were counted.
        train_seconds: Seconds in steps and in waiting for data; None where ``flops`` is.
        validation_loss: At this very step, nats per token; None where it was not validated or is not finite.
        rewinds: Returns of the run so far, whose rows are left out.
        spikes: Memory of the spike detector; None in checkpoints from before there was one.
        stream: Position in streamed data; None for data that is not streamed.
        identity: The run that wrote it.
    """

    step: int
    tokens: int | None = None
    token_hash: int | None = None
    flops: int | None = None
    train_seconds: float | None = None
    validation_loss: float | None = None
    rewinds: tuple[Rewind, ...] = ()
    spikes: SpikeState | None = None
    stream: Values | None = None
    identity: RunIdentity = field(default_factory=RunIdentity)

    def to_json(self) -> Values:
        """Plain values for a manifest."""
        values = asdict(self)
        identity = values.pop("identity")
        return {**values, "rewinds": list(values["rewinds"]), **identity}

    @classmethod
    def from_json(cls, values: Values) -> "TrainState":
        """The state in a manifest of this or an earlier release; names of later ones are left alone.

        Raises:
            ValueError: Something has another type, is out of range or not finite; a sentence for each field.
        """
        fields = _Fields(values)
        state = cls(
            step=fields.whole("step", _COUNT, required=True) or 0,
            tokens=fields.whole("tokens", _COUNT),
            token_hash=fields.whole("token_hash", _INT64),
            flops=fields.whole("flops", _FLOPS),
            train_seconds=fields.read("train_seconds", _not_negative),
            validation_loss=fields.read("validation_loss", _not_negative),
            rewinds=fields.read("rewinds", _rewinds) or (),
            spikes=fields.read("spikes", _spikes),
            stream=fields.read("stream", _finite_mapping),
            identity=RunIdentity(
                config=fields.read("config", _mapping) or {},
                corpus_fingerprint=fields.read("corpus_fingerprint", _text),
                corpus_facts=fields.read("corpus_facts", _mapping) or {},
                tokenizer=fields.read("tokenizer", _text),
                world_size=fields.whole("world_size", range(1, 2**31)),
                versions=fields.read("versions", _texts) or {},
                resolved=fields.read("resolved", _mapping) or {},
            ),
        )
        if fields.violations:
            raise ValueError("; ".join(fields.violations))
        return state


class _Fields:
    """Fields of a state in JSON, read one by one; violations are collected, so that all of them are said at once."""

    def __init__(self, values: Values):
        self._values = values
        self.violations: list[str] = []

    def read(self, name: str, parse: Callable[[Any], _Parsed], required: bool = False) -> _Parsed | None:
        """The field by ``parse``, which raises ValueError with the constraint; None where it is missing or wrong."""
        value = self._values.get(name)
        if value is None and not required:
            return None
        try:
            return parse(value)
        except ValueError as error:
            self.violations.append(f"state.{name}={_short(value)} must be {error}")
            return None

    def whole(self, name: str, allowed: range, required: bool = False) -> int | None:
        """A whole number in ``allowed``."""

        def parse(value: Any) -> int:
            if type(value) is not int or value not in allowed:
                raise ValueError(f"a whole number from {allowed.start} to {allowed.stop - 1}")
            return value

        return self.read(name, parse, required)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _not_negative(value: Any) -> float:
    if not _is_finite(value) or value < 0:
        raise ValueError("a finite number of at least 0")
    return float(value)


def _is_finite(value: Any) -> bool:
    """Whether it is a number that a float holds; a whole number of JSON may be as long as a file."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("text")
    return value


def _mapping(value: Any) -> Values:
    if not isinstance(value, dict):
        raise ValueError("a mapping")
    return value


def _finite_mapping(value: Any) -> Values:
    try:
        json.dumps(_mapping(value), allow_nan=False)
    except ValueError:
        raise ValueError("a mapping without NaN or infinity") from None
    return value


def _texts(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
        raise ValueError("a mapping of names to text")
    return value


def _rewinds(value: Any) -> tuple[Rewind, ...]:
    try:
        return tuple(parse_rewinds(value))
    except ValueError as error:
        raise ValueError(f"a list of rewinds: {error}") from None


def _spikes(value: Any) -> SpikeState:
    losses = value.get("losses") if isinstance(value, dict) else None
    if not isinstance(losses, list) or type(value.get("is_high")) is not bool:
        raise ValueError("a mapping with a list of losses and is_high, true or false")
    if not all(map(_is_finite, losses)):
        raise ValueError("a mapping whose losses are finite numbers")
    return SpikeState(tuple(map(float, losses)), value["is_high"])
