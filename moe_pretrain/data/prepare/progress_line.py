"""Progress lines of long work."""

import time
from collections.abc import Callable

from moe_pretrain.data.shards.unit_shards import UnitRecord

_SECONDS_BETWEEN_REPORTS = 1.0


class SteadyLine:
    """A line of progress at most once a second."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._said = time.monotonic()

    def say(self, line: str) -> None:
        """Report unless that was just done."""
        if time.monotonic() - self._said >= _SECONDS_BETWEEN_REPORTS:
            self._report(line)
            self._said = time.monotonic()


class ProgressLine:
    """Lines with tokens so far, tokens per second and, where the size is known, what is left."""

    def __init__(
        self, report: Callable[[str], None], sizes: dict[int, int] | None, max_tokens: int | None, tokens_before: int
    ) -> None:
        self._report, self._sizes, self._max_tokens = report, sizes, max_tokens
        self._total_bytes = sum(sizes.values()) if sizes else 0
        self._before = tokens_before
        self._tokens: dict[int, int] = {}
        self._characters: dict[int, int] = {}
        self._finished_bytes = 0
        self._started = self._reported = time.monotonic()

    def advance(self, index: int, tokens: int, characters: int) -> None:
        """Count what one unit came forward by."""
        self._tokens[index] = self._tokens.get(index, 0) + tokens
        self._characters[index] = self._characters.get(index, 0) + characters
        if time.monotonic() - self._reported >= _SECONDS_BETWEEN_REPORTS:
            self.say()

    def finish(self, record: UnitRecord) -> None:
        """Count a finished unit exactly."""
        self._tokens[record.index] = sum(shard.tokens for shard in record.shards if shard)
        self._characters.pop(record.index, None)
        if self._sizes:
            self._finished_bytes += self._sizes[record.index]

    def say(self) -> None:
        """Report now."""
        self._reported = time.monotonic()
        seconds = max(self._reported - self._started, 1e-9)
        tokens = sum(self._tokens.values())
        line = f"tokenising: {self._before + tokens:,} tokens, {tokens / seconds:,.0f} tokens/s"
        share = self._share_done(tokens)
        if share is not None:
            left = _duration(seconds * (1 - share) / share) if share else "?"
            line += f", {share:.0%} done, ETA {left}"
        self._report(line)

    def _share_done(self, tokens: int) -> float | None:
        if self._max_tokens is not None:
            return min(1.0, tokens / max(1, self._max_tokens - self._before))
        if not self._total_bytes:
            return None
        assert self._sizes is not None
        running = sum(min(done, self._sizes.get(index, 0)) for index, done in self._characters.items())
        return min(1.0, (self._finished_bytes + running) / self._total_bytes)


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
