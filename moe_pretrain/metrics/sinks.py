"""Where metric rows go: the run's JSONL file, the console, and wandb. Only this file imports wandb."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Literal

from moe_pretrain.metrics.console import ConsoleSink
from moe_pretrain.metrics.rows import JsonlSink, Row, read_rows, reduce_layers, replace_non_finite
from moe_pretrain.metrics.wandb_start import choose_mode, netrc_key, run_id

_WANDB_INIT_SECONDS = 30.0
_WANDB_FINISH_SECONDS = 120.0


@dataclass(frozen=True)
class MetricsConfig:
    """What is logged, and where.

    Attributes:
        log_every_steps: Steps between two train rows, at least 1.
        router_health_steps: Steps over which an expert without a token is called dead, and a router that uses hardly
            more experts than each token does is called collapsed; at least 1.
        progress: Show a progress bar when stderr is a terminal.
        wandb: "auto" is online for a user who is logged in and has a network, else offline.
        wandb_project: Project that the run appears under.
    """

    log_every_steps: int
    router_health_steps: int
    progress: bool
    wandb: Literal["auto", "online", "offline", "off"]
    wandb_project: str

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name in ("log_every_steps", "router_health_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"metrics.{name} must be >= 1, got {getattr(self, name)}")


class WandbSink:
    """Sends reduced rows to wandb. Never prompts, and an error turns it off instead of the run.

    After a resume the steps since the checkpoint are sent again; wandb keeps both versions.
    """

    def __init__(
        self,
        config: MetricsConfig,
        run_dir: Path,
        run_name: str,
        resolved_config: dict[str, Any],
        say: Callable[[str], None],
    ):
        """Start, or continue, the wandb run of this run folder.

        Args:
            config: Its ``wandb`` is not "off".
            run_dir: Run folder; wandb's files and ``wandb_id.txt`` live in it.
            run_name: Name shown by wandb.
            resolved_config: Shown by wandb as the run's configuration.
            say: Prints one line for the user.

        Raises:
            ValueError: "online" was asked for and nobody is logged in.
        """
        self._say = say
        self._run: Any = None
        try:
            import wandb  # here: it takes a second, and "off" must work without it

            settings = wandb.setup(wandb.Settings(silent=True)).settings
            api_key = settings.api_key or netrc_key(settings.base_url)
        except Exception as error:
            return self._turn_off(error)
        logged_in = bool(api_key or settings.identity_token_file)
        mode, reason = choose_mode(config.wandb, logged_in, settings.base_url)
        options: dict[str, Any] = {
            "project": config.wandb_project,
            "name": run_name,
            "id": run_id(run_dir / "wandb_id.txt"),
            "dir": str(run_dir),
            "config": resolved_config,
        }
        try:
            if mode == "online":
                # The key is handed over so that wandb has no reason to ask for one.
                self._run, reason = _try_online(wandb, options, api_key)
            if self._run is None:
                self._run = wandb.init(mode="offline", settings=_settings(wandb), **options)
                folder = self._run.settings.sync_dir
                say(f"wandb: offline ({reason}); upload later with: wandb sync {folder}")
            else:
                say(f"wandb: online, {self._run.url}")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:
            self._turn_off(error)

    def _turn_off(self, error: Exception) -> None:
        self._run = None
        self._say(f"wandb: off for the rest of this run ({_one_line(error)})")

    def write(self, row: Row) -> None:
        """Send the reduced row; events are not sent."""
        if self._run is None or row["kind"] == "event":
            return
        try:
            self._run.log(reduce_layers(row))
        except Exception as error:
            self._turn_off(error)

    def close(self) -> None:
        """Wait for the upload, within a limit."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._turn_off(error)


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def _settings(wandb: Any, **more: Any) -> Any:
    return wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        init_timeout=_WANDB_INIT_SECONDS,
        finish_timeout=_WANDB_FINISH_SECONDS,
        **more,
    )


def _try_online(wandb: Any, options: dict[str, Any], api_key: str | None) -> tuple[Any, str]:
    """Return the started run and "", or None and why the server refused."""
    key = {"api_key": api_key} if api_key else {}
    try:
        settings = _settings(wandb, **key)
        return wandb.init(mode="online", resume="allow", settings=settings, **options), ""
    except Exception as error:
        wandb.teardown()  # else the failed start keeps the run id in use
        return None, _one_line(error)


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
        path = run_dir / "metrics.jsonl"
        self._console = ConsoleSink(total_steps, config.log_every_steps, config.progress, sys.stderr)
        self._jsonl = JsonlSink(path, self._console.say)
        self._must_resume = bool(read_rows(path))
        self._wandb = None
        if config.wandb != "off":
            self._wandb = WandbSink(config, run_dir, run_name, resolved_config, self._console.say)

    def resume(self, step: int) -> None:
        """Continue the metrics of an earlier attempt. Call it before the first row.

        Rows after ``step`` are removed, ``attempt`` goes up, and ``seconds`` goes on from the last
        row kept. The caller then writes the event that says what was loaded.

        Args:
            step: Steps done in the loaded checkpoint; 0 when there is none to load.
        """
        if not self._is_main:
            return
        earlier = read_rows(self._jsonl.path)
        kept = self._jsonl.truncate_after(step)
        self._attempt = 1 + max((row["attempt"] for row in earlier), default=-1)
        self._seconds_before = kept[-1]["seconds"] if kept else 0.0
        self._must_resume = False
        self._start = monotonic()

    def expect(self, total_steps: int) -> None:
        """The run comes to another number of steps than was thought."""
        if self._is_main:
            self._console.expect(total_steps)

    def write(self, row: Row) -> None:
        """Write a train or validation row to every sink.

        Numbers that are not finite become None, and an event "non_finite" names them.

        Args:
            row: ``step``, ``tokens`` and named numbers; ``kind``, ``seconds`` and ``attempt`` are
                added here.
        """
        if not self._is_main:
            return
        is_validation = any(key.startswith("validation/") for key in row)
        clean_row, bad_keys = replace_non_finite(row)
        self._send("validation" if is_validation else "train", clean_row)
        if bad_keys:
            message = f"NaN or infinity in {', '.join(bad_keys)}; written as null"
            self.event(row["step"], row["tokens"], "non_finite", message)

    def event(self, step: int, tokens: int, name: str, message: str) -> None:
        """Write an event row: short ``name``, one line of ``message``."""
        if self._is_main:
            body = {"step": step, "tokens": tokens, "event": name, "message": message}
            self._send("event", body)

    def _send(self, kind: str, body: Row) -> None:
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
