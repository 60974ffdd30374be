"""A run in wandb, fed from ``metrics.jsonl``, which is the truth: no step twice, none missing.

Only this file imports wandb.

Online, rows are sent as they are written; a resumed run first sends what a killed attempt could not, and
leaves out what wandb has. Offline, nothing is sent while the run goes on: wandb's offline files lose their last rows
to a SIGKILL and begin anew with every resume: the files are written from ``metrics.jsonl`` when the run ends or stops,
or later with ``moe-pretrain wandb RUN``, always whole and in the place of those before. That also mends what wandb
online cannot: after a rewind it keeps the steps of the course that was left.
"""

import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_pretrain.metrics.wandb_start import choose_mode, netrc_key, run_id, stricter
from moe_pretrain.run_folder.metrics_file import MetricsRow, read_rows
from moe_pretrain.run_folder.paths import METRICS_FILE, WANDB, WANDB_ID_FILE
from moe_pretrain.run_folder.provenance import read_config
from moe_pretrain.run_folder.record import find_runs

_LAYER_KEY = re.compile(r"moe/layer_\d+/(\w+)")
MAX_TABLE_STEPS = 200
_SCALAR_GROUPS = ("train/", "aux/", "validation/", "tasks/", "data/")

_INIT_SECONDS = 30.0
_FINISH_SECONDS = 120.0
LAYERS_TABLE = "moe/layers"


@dataclass(frozen=True)
class WandbRun:
    """Names by which wandb knows a run.

    Attributes:
        folder: Run folder; wandb's files and ``wandb_id.txt`` live in it.
        project: Project that it appears under.
        group: Runs that belong together.
        name: Name shown.
        config: The resolved configuration, nested.
    """

    folder: Path
    project: str
    group: str
    name: str
    config: Mapping[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of ``wandb.init``; the configuration is flat, so that the table of runs can filter by it."""
        return {
            "project": self.project,
            "group": self.group,
            "name": self.name,
            "id": run_id(self.folder / WANDB_ID_FILE),
            "dir": str(self.folder),
            "config": flat(self.config),
        }


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names as ``router/top_k``: wandb reads a dot as a step into a value."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        values |= flat(value, f"{prefix}{key}/") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return values


class WandbSink:
    """Sends reduced rows to wandb. Never prompts, and an error turns it off instead of the run."""

    def __init__(self, asked: str, run: WandbRun, say: Callable[[str], None]):
        """Start, or continue, the wandb run of this run folder.

        Args:
            asked: "auto", "online" or "offline".
            run: The run.
            say: Prints one line for the user.

        Raises:
            ValueError: "online" was asked for and nobody is logged in.
        """
        self._say, self._described = say, run
        self._run: Any = None
        self._is_offline = False
        try:
            import wandb  # here: it takes a second, and "off" must work without it

            settings = wandb.setup(wandb.Settings(silent=True)).settings
            api_key = settings.api_key or netrc_key(settings.base_url)
        except Exception as error:
            return self._turn_off(error)
        logged_in = bool(api_key or settings.identity_token_file)
        asked, reason = stricter(asked, getattr(settings, "mode", None))
        if asked == "off":
            return say(f"wandb: off ({reason})")
        mode, reason = choose_mode(asked, reason, logged_in, settings.base_url)
        if mode == "online":
            # The key is handed over so that wandb has no reason to ask for one.
            self._run, reason = _try_online(wandb, run.options, api_key)
        if self._run is None:
            self._is_offline = True
            return say(f"wandb: offline ({reason}); its files are written when the run ends or stops")
        try:
            say(f"wandb: online, {self._run.url}")
            self._run.define_metric("*", step_metric="step")
            self._known_steps = self._run.starting_step  # wandb has the rows of all steps below, and takes none of them
            _remove_offline(run)  # this run has all that they have
        except Exception as error:
            self._turn_off(error)

    def _turn_off(self, error: Exception) -> None:
        self._run, self._is_offline = None, False
        self._say(f"wandb: off for the rest of this run ({_one_line(error)})")

    def catch_up(self, rows: Sequence[MetricsRow]) -> None:
        """Send the rows of earlier attempts that wandb has not."""
        for row in rows:
            self.write(row)

    def write(self, row: MetricsRow) -> None:
        """Send the reduced row unless wandb has its step; events are not sent."""
        if self._run is None or row["kind"] == "event" or row["step"] < self._known_steps:
            return
        try:
            self._run.log(reduce_layers(row), step=row["step"])
            self._known_steps = row["step"]
        except Exception as error:
            self._turn_off(error)

    def close(self) -> None:
        """Wait for the upload, within a limit; offline, write the files."""
        try:
            if self._is_offline:
                (folder,) = write_offline([self._described])
                self._say(f"wandb: upload with: wandb sync {folder}")
            elif self._run is not None:
                import wandb

                rows = read_rows(self._described.folder / METRICS_FILE)
                _log_layers(wandb, self._run, rows, self._known_steps)
                self._run.finish()
        except Exception as error:
            self._turn_off(error)


def write_offline(runs: Iterable[WandbRun]) -> list[Path]:
    """Write the whole ``metrics.jsonl`` of each run as one offline run, in the place of earlier ones; their folders.

    ``wandb sync`` of a folder then uploads every step once.
    """
    import wandb

    written = [(run, _write_offline(wandb, run)) for run in runs]
    wandb.teardown()  # a run's finish() does not wait until its file is whole
    for run, folder in written:
        _remove_offline(run, keep=folder)
    return [folder for _, folder in written]


def _write_offline(wandb: Any, run: WandbRun) -> Path:
    rows = read_rows(run.folder / METRICS_FILE)
    started = wandb.init(mode="offline", settings=_settings(wandb), **run.options)
    folder = Path(started.settings.sync_dir)
    started.define_metric("*", step_metric="step")
    for row in rows:
        if row["kind"] != "event":
            started.log(reduce_layers(row), step=row["step"])
    _log_layers(wandb, started, rows, 0)
    started.finish()
    return folder


def _log_layers(wandb: Any, run: Any, rows: Sequence[MetricsRow], at_least: int) -> None:
    """The numbers of every layer over the run as one table, in the row of the last step: no chart for each of them."""
    columns, lines = layer_table(rows)
    if lines:
        table = wandb.Table(columns=columns, data=lines)
        run.log({LAYERS_TABLE: table}, step=max(at_least, *(row["step"] for row in rows)))


def _remove_offline(run: WandbRun, keep: Path | None = None) -> None:
    """Remove this run's offline folders, which hold nothing that ``metrics.jsonl`` does not."""
    for folder in run.folder.glob(f"{WANDB}/offline-run-*-{run.options['id']}"):
        if keep is None or folder.resolve() != keep.resolve():
            shutil.rmtree(folder)


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def _settings(wandb: Any, **more: Any) -> Any:
    return wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        init_timeout=_INIT_SECONDS,
        finish_timeout=_FINISH_SECONDS,
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


def reduce_layers(row: MetricsRow) -> MetricsRow:
    """Shrink a row to what a dashboard can show: no lists, and no chart per layer.

    Args:
        row: A train or validation row, with any number of layers.

    Returns:
        ``step``, ``tokens``, ``seconds`` where known, and the ``train/``, ``aux/``, ``validation/``, ``tasks/`` and
        ``data/`` numbers as they are;
        each per-layer number as ``moe/mean/NAME`` and ``moe/max/NAME`` over the layers. Lists, hashes and the times of
        the layers' parts stay in the file.
    """
    reduced: MetricsRow = {name: row[name] for name in ("step", "tokens", "seconds") if name in row}
    over_layers: dict[str, list[float]] = {}
    for key, value in row.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if key.startswith(_SCALAR_GROUPS):
            reduced[key] = value
        elif match := _LAYER_KEY.fullmatch(key):
            over_layers.setdefault(match.group(1), []).append(value)
    for name, values in over_layers.items():
        reduced[f"moe/mean/{name}"] = sum(values) / len(values)
        reduced[f"moe/max/{name}"] = max(values)
    return reduced


def layer_table(rows: Sequence[MetricsRow]) -> tuple[list[str], list[list[Any]]]:
    """The per-layer numbers of train and validation rows as one table.

    Args:
        rows: Of a run, in order.

    Returns:
        Columns ``step``, ``layer`` and the names of the numbers; a line for each step and layer, at most
        ``MAX_TABLE_STEPS`` steps evenly spread, the last among them. None where a layer has no such number.
    """
    by_step: dict[int, dict[tuple[int, str], Any]] = {}
    for row in rows:
        for key, value in row.items():
            if (match := _LAYER_KEY.fullmatch(key)) and not isinstance(value, list):
                layer = int(key.partition("/layer_")[2].partition("/")[0])
                by_step.setdefault(row["step"], {})[layer, match.group(1)] = value
    stride = max(1, -(-len(by_step) // MAX_TABLE_STEPS))
    steps = sorted(by_step)[::-1][::stride][::-1]
    names = sorted({name for step in steps for _, name in by_step[step]})
    lines = [
        [step, layer, *(by_step[step].get((layer, name)) for name in names)]
        for step in steps
        for layer in sorted({layer for layer, _ in by_step[step]})
    ]
    return ["step", "layer", *names], lines


def wandb_run(
    run_dir: Path, project: str, group: str | None, run_name: str, resolved_config: Mapping[str, Any]
) -> WandbRun:
    """Names by which wandb knows a run, from its folder and configuration."""
    return WandbRun(run_dir, project, group or run_dir.resolve().parent.name, run_name, resolved_config)


def wandb_runs(root: Path, say: Callable[[str], None]) -> Iterator[WandbRun]:
    """Every run below ``root``, itself included, that has metrics; ``say`` hears of the others.

    Raises:
        ValueError: There is no run.
    """
    for run in find_runs(root):
        if not run.values or not run.train:
            say(f"left out: {run.name}: {run.problem or 'it has no train rows'}")
            continue
        config = read_config(run.folder)
        metrics = config["metrics"]
        name = run.folder.resolve().name  # not the recorded one: a copy is the run where it lies
        yield wandb_run(run.folder, metrics["wandb_project"], metrics.get("wandb_group"), name, config)
