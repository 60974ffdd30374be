"""Lines that a user sees of a run while it trains."""

from time import monotonic
from typing import Protocol, runtime_checkable

from tqdm import tqdm

from moe_pretrain.run_folder.metrics_file import MetricsRow
from moe_pretrain.system.words import short_duration, short_number


@runtime_checkable
class TextStream(Protocol):
    """Stream for the lines: standard error, or a test's in its place."""

    def write(self, text: str, /) -> int:
        """Write ``text``."""

    def flush(self) -> None:
        """Pass on what was written."""

    def isatty(self) -> bool:
        """Whether a person watches."""


class ConsoleSink:
    """A progress bar on a terminal; elsewhere short lines, at most about one a second."""

    def __init__(self, total_steps: int, log_every_steps: int, progress: bool, stream: TextStream):
        """Print nothing yet; the bar appears with the first train row.

        Args:
            total_steps: Steps of the whole run.
            log_every_steps: Least distance in steps between two plain lines.
            progress: False for plain lines even on a terminal.
            stream: Where to print.
        """
        self._total_steps = total_steps
        self._log_every_steps = log_every_steps
        self._stream = stream
        self._use_bar = progress and stream.isatty()
        self._bar: tqdm | None = None
        self._first_step: int | None = None
        self._first_time = self._last_time = 0.0
        self._last_step = 0

    def expect(self, total_steps: int) -> None:
        """The run comes to ``total_steps``, from the next row on."""
        self._total_steps = total_steps
        if self._bar is not None:
            self._bar.total = total_steps

    def write(self, row: MetricsRow) -> None:
        """Show one row of any kind."""
        if row["kind"] == "event":
            self.say(f"[{row['event']}] step {row['step']}: {row['message']}")
        elif row["kind"] == "validation":
            self.say(f"validation at step {row['step']}: " + _validation_text(row))
        elif row["kind"] == "tasks":
            self.say(f"tasks at step {row['step']}: " + _tasks_text(row))
        elif self._use_bar:
            self._update_bar(row)
        else:
            self._print_line(row)

    def say(self, text: str) -> None:
        """Print one line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def _update_bar(self, row: MetricsRow) -> None:
        if self._bar is None:
            self._bar = tqdm(
                total=self._total_steps,
                initial=row["step"],
                file=self._stream,
                dynamic_ncols=True,
                bar_format="step {n}/{total} |{bar}| {elapsed}, ETA {remaining}{postfix}",
            )
        self._bar.set_postfix_str(_speed_text(row), refresh=False)
        self._bar.n = row["step"]
        self._bar.refresh()

    def _print_line(self, row: MetricsRow) -> None:
        now, step = monotonic(), row["step"]
        first = self._first_step is None
        if first:
            self._first_step, self._first_time = step, now
        due = step - self._last_step >= self._log_every_steps and now - self._last_time >= 1.0
        if not (first or due or step == self._total_steps):
            return
        self._last_step, self._last_time = step, now
        line = f"step {step}/{self._total_steps} | {_speed_text(row)}"
        if step > self._first_step:
            seconds_per_step = (now - self._first_time) / (step - self._first_step)
            line += f" | ETA {short_duration(seconds_per_step * (self._total_steps - step))}"
        self.say(line)

    def close(self) -> None:
        """Leave the bar as it stands and end its line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _number(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"


def _speed_text(row: MetricsRow) -> str:
    parts = [f"loss {_number(row['train/loss'], 4)}"]
    if row.get("train/tokens_per_second") is not None:
        parts.append(f"{short_number(row['train/tokens_per_second'])} tokens/s")
    return " | ".join(parts)


def _tasks_text(row: MetricsRow) -> str:
    values = [(key.removeprefix("tasks/"), value) for key, value in row.items() if key.startswith("tasks/")]
    return " | ".join(f"{name.replace('/', ' ')} {_number(value, 4)}" for name, value in values)


def _validation_text(row: MetricsRow) -> str:
    names = {"loss": 4, "perplexity": 2, "bits_per_byte": 4}
    known = [(name, digits) for name, digits in names.items() if f"validation/{name}" in row]
    return " | ".join(
        f"{name.replace('_', ' ')} {_number(row[f'validation/{name}'], digits)}" for name, digits in known
    )
