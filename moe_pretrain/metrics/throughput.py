"""Speed of a run: tokens per second, and the share of the hardware's peak that it uses."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

_Item = TypeVar("_Item")

# Dense bf16 peak of one whole device (no sparsity), from NVIDIA's data sheets. The first pattern
# found in the device name wins, so slower variants stand before the plain name.
_PEAK_FLOPS_PER_SECOND = (
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH[12]00 NVL\b", 835e12),
    (r"\bH100\b", 989e12),
    (r"\bH200\b", 989e12),
    (r"\bA[18]00\b", 312e12),
    (r"\bL40S\b", 362e12),
    (r"\bB200\b", 2.25e15),
    (r"\bRTX 4090\b", 165e12),
)
# Part of a device, or a part with another clock under the same name: no number beats a wrong one.
_NOT_THE_WHOLE_DEVICE = re.compile(r"\bMIG\b|\bLaptop\b|\b4090 D\b", re.IGNORECASE)


def peak_flops_per_second(device_name: str) -> float | None:
    """Look up the dense bf16 peak of one device.

    Args:
        device_name: As ``torch.cuda.get_device_name()`` gives it, or "cpu".

    Returns:
        FLOP/s, or None for a CPU or a device that is not in the table: utilisation is then left
        out of the metrics, never guessed.
    """
    if _NOT_THE_WHOLE_DEVICE.search(device_name):
        return None
    for pattern, peak in _PEAK_FLOPS_PER_SECOND:
        if re.search(pattern, device_name, re.IGNORECASE):
            return peak
    return None


def model_flops_utilization(flops_per_token: float, tokens_per_second: float, num_devices: int, peak: float) -> float:
    """Compute ``flops_per_token * tokens_per_second / (num_devices * peak)``.

    Args:
        flops_per_token: Forward and backward FLOPs of one token, active parameters only and
            without recomputation.
        tokens_per_second: Of the whole run, all devices together.
        num_devices: Devices that share the work, at least 1.
        peak: FLOP/s of one device, from ``peak_flops_per_second``.

    Returns:
        Share of the peak; 1.0 would be every device computing at its peak all the time.
    """
    return flops_per_token * tokens_per_second / (num_devices * peak)


@dataclass(frozen=True)
class Window:
    """Tokens, steps and seconds between two readings of a ``Stopwatch``.

    Attributes:
        tokens_per_second: Tokens counted, over the time that was not paused.
        step_seconds: Mean unpaused time of one counted step.
        data_wait_share: Share of the unpaused time in which the loop waited for data, see ``Stopwatch.waits``.
    """

    tokens_per_second: float
    step_seconds: float
    data_wait_share: float


class Stopwatch:
    """Training speed, without the time that evaluation and checkpoints take.

    Call ``count`` after every step, wrap everything that is not training in ``paused()``, and
    ``read`` when a row is written. On a GPU the caller must have waited for the step's result
    (reading the loss does), or the time measured is that of launching it.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        """Start the first window and the first lap.

        Args:
            clock: Seconds from any fixed point; tests pass their own.
        """
        self._clock = clock
        self.start()

    def start(self) -> None:
        """Start a window and a lap; what was before is not counted."""
        self._lap_start, self._lap_paused = self._clock(), 0.0
        self._restart()

    def lap(self) -> float:
        """Seconds since the last lap that were not paused; a new lap begins."""
        now = self._clock()
        seconds = now - self._lap_start - self._lap_paused
        self._lap_start, self._lap_paused = now, 0.0
        return seconds

    def _restart(self) -> None:
        self._window_start = self._clock()
        self._paused_seconds = 0.0
        self._waited_seconds = 0.0
        self._tokens = 0
        self._steps = 0

    def count(self, tokens: int) -> None:
        """Add one finished step of ``tokens`` tokens, summed over all ranks."""
        self._tokens += tokens
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside the ``with`` block out of the window. Not to be nested."""
        pause_start = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - pause_start
            self._paused_seconds += seconds
            self._lap_paused += seconds

    def waits(self, items: Iterator[_Item]) -> Iterator[_Item]:
        """The same items; the time until each is there counts as waiting for data."""
        while True:
            asked = self._clock()
            try:
                item = next(items)
            except StopIteration:
                return
            self._waited_seconds += self._clock() - asked
            yield item

    def read(self) -> Window:
        """Return the speed since the last reading and start a new window.

        Raises:
            ValueError: No step was counted since the last reading.
        """
        if self._steps == 0:
            raise ValueError("Stopwatch.read: no step was counted since the last reading")
        seconds = max(self._clock() - self._window_start - self._paused_seconds, 1e-9)
        window = Window(self._tokens / seconds, seconds / self._steps, self._waited_seconds / seconds)
        self._restart()
        return window
