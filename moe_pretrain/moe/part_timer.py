"""Time that the forward passes of MoE layers spend, part by part.

=====================  ==================================================================================
``router``             all that is run to decide: the router, experts that it asks together with the exchange that
                       reaches them, and the statistic of the block's attention; as ``study.layer_cost`` counts it
``permute``            routes into expert order, and rows copied into it
``exchange``           row counts, rows and outputs between ranks, waiting for the other ranks included
``experts``            the routed experts' products and activations
``shared_experts``     the shared experts; those that run while rows are on their way count in full, and ``exchange``
                       is what is left to wait for after them
``combine``            weighted outputs summed per token, and the shared experts' output added
=====================  ==================================================================================

Regions of code are marked with ``with part(NAME)``. While no clock runs that is a look-up and nothing else.
"""

import time
from contextlib import nullcontext
from contextvars import ContextVar, Token
from itertools import pairwise
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch

LayerPart = Literal["router", "permute", "exchange", "experts", "shared_experts", "combine"]
PARTS: tuple[LayerPart, ...] = get_args(LayerPart)


@runtime_checkable
class TimeSource(Protocol):
    """Takes moments, and later says how far apart they are."""

    def now(self) -> Any:
        """This moment."""

    def seconds(self, moments: list[Any]) -> list[float]:
        """Time between each of ``moments``, at least one, and the next."""


class HostTime:
    """Time of a processor that does what it is told at once."""

    def now(self) -> float:
        """This moment."""
        return time.perf_counter()

    def seconds(self, moments: list[float]) -> list[float]:
        """Time between moments."""
        return [after - before for before, after in pairwise(moments)]


class CudaTime:
    """Time at which the current stream comes to where the host was; nothing waits for it before it is read.

    A stream that waits for the host to launch work counts as busy with the part that it is in.
    """

    def now(self) -> Any:
        """This moment, an event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, moments: list[Any]) -> list[float]:
        """Time between moments; waits for the last one."""
        moments[-1].synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(moments)]


def time_source(device_type: str) -> TimeSource:
    """Clock for the work of a ``cuda`` or ``cpu`` device."""
    return CudaTime() if device_type == "cuda" else HostTime()


class PartClock:
    """Measures the parts of all MoE layers that run in this thread while it is entered.

    The time of a part inside another counts for the inner one only.

    Attributes:
        batches: Seconds of each part per token and layer, one entry for each ``end_batch``.
    """

    def __init__(self, source: TimeSource):
        self.batches: list[dict[LayerPart, float]] = []
        self.regions = {name: _Region(self, name) for name in PARTS}
        self._source = source
        self._open: list[LayerPart] = []
        self._marks: list[tuple[LayerPart | None, Any]] = []  # from each moment on, the part that runs
        self._before: Token[PartClock | None] | None = None

    def __enter__(self) -> "PartClock":
        self._before = _CLOCK.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        assert self._before is not None
        _CLOCK.reset(self._before)

    def begin(self, name: LayerPart) -> None:
        """From now on it is this part."""
        self._open.append(name)
        self._marks.append((name, self._source.now()))

    def end(self) -> None:
        """From now on it is the part outside, if there is one."""
        self._open.pop()
        self._marks.append((self._open[-1] if self._open else None, self._source.now()))

    def end_batch(self, layer_tokens: int) -> None:
        """Add up what was measured since the last call; nothing is added if no part has run.

        Args:
            layer_tokens: Tokens of the batch, padding included, times the MoE layers they went through.
        """
        if not self._marks:
            return
        names, moments = zip(*self._marks, strict=True)
        seconds = dict.fromkeys(PARTS, 0.0)
        for name, passed in zip(names, self._source.seconds(list(moments)), strict=False):  # nothing follows the last
            if name is not None:
                seconds[name] += passed
        self.batches.append({name: each / layer_tokens for name, each in seconds.items()})
        self._marks.clear()


class _Region:
    """A part of the code, for ``with``; any number of times, and inside itself."""

    def __init__(self, clock: PartClock, name: LayerPart):
        self._clock, self._name = clock, name

    def __enter__(self) -> None:
        self._clock.begin(self._name)

    def __exit__(self, *error: object) -> None:
        self._clock.end()


_CLOCK: ContextVar[PartClock | None] = ContextVar("clock", default=None)
_OFF = nullcontext()


def part(name: LayerPart) -> _Region | nullcontext[None]:
    """Mark a region of code as ``name``, for the clock that runs in this thread, if any."""
    clock = _CLOCK.get()
    return _OFF if clock is None else clock.regions[name]
