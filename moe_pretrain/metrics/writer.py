"""Destinations of metric rows: the run's JSONL file, the console, and wandb."""

import sys
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from moe_pretrain.metrics.console import ConsoleSink
from moe_pretrain.metrics.wandb_sink import WandbSink, wandb_run
from moe_pretrain.metrics.wandb_start import stricter
from moe_pretrain.run_folder.metrics_file import JsonlSink, MetricsRow, read_rows, replace_non_finite
from moe_pretrain.run_folder.paths import METRICS_FILE


@dataclass(frozen=True)
class MetricsConfig:
    """Logging: the metrics, their intervals and destinations.

    Attributes:
        log_every_steps: Steps between two train rows, at least 1.
        router_health_steps: Steps over which an expert without a token is called dead and a router is judged for
            collapse; at least 1.
        collapse_ratio: A router is called collapsed while it uses at most this many times the experts that each token
            uses (and not all of them); at least 1.
        progress: Show a progress bar when stderr is a terminal.
        wandb: "auto" is online for a user who is logged in and has a network, else offline. WANDB_MODE in the
            environment is obeyed where it sends less.
        wandb_project: Project that the run appears under.
        wandb_group: Group of the run; None for the name of the folder that its folder is in, so that runs side by side
            are a group.
    """

    log_every_steps: PositiveInt
    router_health_steps: PositiveInt
    collapse_ratio: Annotated[float, Field(ge=1)]
    progress: bool
    wandb: Literal["auto", "online", "offline", "off"]
    wandb_project: str
    wandb_group: str | None


class MetricsWriter:
    """The one object a run writes its metrics to. On every rank but the main one it does nothing."""

    def __init__(
        self,
        config: MetricsConfig,
        run_dir: Path,
        total_steps: int,
        run_name: str,
        resolved_config: dict[str, Any],
        is_main: bool,
    ):
        """Open the sinks; wall time counts from here.

        Args:
            config: What to log, and where.
            run_dir: Existing run folder.
            total_steps: Steps of the whole run, for the progress bar.
            run_name: Name shown by wandb.
            resolved_config: Sent to wandb.
            is_main: True on exactly one rank.
        """
        self._is_main = is_main
        if not is_main:
            return
        self._start = monotonic()
        self._seconds_before = 0.0
        self._attempt = 0
        path = run_dir / METRICS_FILE
        self._console = ConsoleSink(total_steps, config.log_every_steps, config.progress, sys.stderr)
        self._jsonl = JsonlSink(path, self._console.say)
        self._must_resume = bool(read_rows(path))
        self._wandb = None
        asked, reason = stricter(config.wandb)
        if asked == "off" and reason:
            self._console.say(f"wandb: off ({reason})")
        if asked != "off":
            described = wandb_run(run_dir, config.wandb_project, config.wandb_group, run_name, resolved_config)
            self._wandb = WandbSink(config.wandb, described, self._console.say)

    def resume(self, step: int, is_validated: bool = True) -> None:
        """Continue the metrics of an earlier attempt. Call it before the first row.

        Rows after ``step`` are removed, ``attempt`` goes up, and ``seconds`` goes on from the most that
        a kept row has: the last one may be of an earlier step, at which another run branched off. The
        caller then writes the event that says what was loaded.

        Args:
            step: Steps done in the loaded checkpoint; 0 when there is none to load.
            is_validated: Whether the checkpoint knows of the validation at ``step``.
        """
        if not self._is_main:
            return
        earlier = read_rows(self._jsonl.path)
        kept = self._jsonl.truncate_after(step, is_validated)
        self._attempt = 1 + max((row["attempt"] for row in earlier), default=-1)
        self._seconds_before = max((row["seconds"] for row in kept), default=0.0)
        self._must_resume = False
        self._start = monotonic()
        if self._wandb is not None:
            self._wandb.catch_up(kept)

    def expect(self, total_steps: int) -> None:
        """The run comes to another number of steps than was thought."""
        if self._is_main:
            self._console.expect(total_steps)

    def write(self, row: MetricsRow) -> None:
        """Write a train row, a validation row or one of tasks to every sink.

        Numbers that are not finite become None, and an event "non_finite" names them.

        Args:
            row: ``step``, ``tokens`` and named numbers; ``kind``, ``seconds`` and ``attempt`` are
                added here.
        """
        if not self._is_main:
            return
        kinds = [kind for kind in ("validation", "tasks") if any(key.startswith(f"{kind}/") for key in row)]
        clean_row, bad_keys = replace_non_finite(row)
        self._send(kinds[0] if kinds else "train", clean_row)
        if bad_keys:
            message = f"NaN or infinity in {', '.join(bad_keys)}; written as null"
            self.event(row["step"], row["tokens"], "non_finite", message)

    def event(self, step: int, tokens: int, name: str, message: str) -> None:
        """Write an event row: short ``name``, one line of ``message``."""
        if self._is_main:
            body = {"step": step, "tokens": tokens, "event": name, "message": message}
            self._send("event", body)

    def _send(self, kind: str, body: MetricsRow) -> None:
        if self._must_resume:
            raise RuntimeError(f"{self._jsonl.path} has rows: call resume(step) before writing")
        seconds = round(self._seconds_before + monotonic() - self._start, 3)
        row = {"kind": kind, "seconds": seconds, "attempt": self._attempt, **body}
        self._jsonl.write(row)
        self._console.write(row)
        if self._wandb is not None:
            self._wandb.write(row)

    def sync(self) -> None:
        """Wait until every row so far is on the disk; call it before a checkpoint is committed."""
        if self._is_main:
            self._jsonl.sync()

    def close(self) -> None:
        """Close every sink."""
        if not self._is_main:
            return
        self._console.close()
        self._jsonl.close()
        if self._wandb is not None:
            self._wandb.close()
