"""``train --multirun``: from the command to a sweep, which Hydra's sweeper and launcher run; and for other drivers."""

import importlib.util
import os
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from moe_pretrain.config.compose import ROOT_CONFIG, config_folder
from moe_pretrain.config.schema import Config, ConfigError
from moe_pretrain.parallel.rendezvous import launched_world_size
from moe_pretrain.run_folder.paths import SWEEP_FILE, SWEEP_LOCK
from moe_pretrain.sweep.hydra_plugins import LAUNCHER, register
from moe_pretrain.sweep.launcher import SweepStopped, TrainJob
from moe_pretrain.sweep.planned_jobs import Sweep, job_name, load_job, quoted, sweep_name
from moe_pretrain.sweep.status import describe_sweep, read_progress, table
from moe_pretrain.system.exit_codes import INTERRUPTED, STOPPED
from moe_pretrain.system.file_lock import try_lock
from moe_pretrain.system.files import write_json

NOT_ALL_FINISHED = 1
"""Exit code of a sweep in which a job failed or diverged."""
_PACKAGES = {
    "hydra/sweeper=optuna": "hydra_optuna_sweeper",
    "hydra/launcher=submitit_slurm": "hydra_submitit_launcher",
    "hydra/launcher=submitit_local": "hydra_submitit_launcher",
}
_SEEDLESS_SAMPLERS = ("hydra/sweeper/sampler=grid",)


@dataclass(frozen=True)
class Command:
    """The overrides of a sweep, sorted.

    Attributes:
        hydra: Those of Hydra's own configuration.
        fixed: Those of every job.
        swept: Those with several values.
        keys: What the latter set.
        example: One job: its overrides with the first value of each.
    """

    hydra: list[str]
    fixed: list[str]
    swept: list[str]
    keys: list[str]
    example: list[str]


def multirun(words: Sequence[str]) -> int:
    """Run every combination of the values that ``words`` list, or go on with them.

    Returns:
        Exit code: 0 when every job of the sweep is finished, ``NOT_ALL_FINISHED`` when one failed or diverged,
        ``signals.STOPPED`` when some were stopped and the same command goes on.

    Raises:
        ValueError: The command or one of its jobs is wrong; one line, and nothing was started.
    """
    with opened_hydra("--multirun", words) as hydra:
        command = parse(words, OverridesParser.create(hydra.config_loader))
        sweep, master = prepare(hydra, command, sweep_name(command.keys, [*command.fixed, *command.swept]))
        grid = _combinations(hydra, command, master)
        for swept in grid:
            if grid.count(swept) > 1:  # one job would stand for both, and a seed less be compared than was meant
                raise ConfigError(f"--multirun: {' '.join(swept)} is listed twice: name each value once")
            sweep.check(swept)

        def run() -> set[Path]:
            sweeper = Plugins.instance().instantiate_sweeper(
                config=master, hydra_context=_context(hydra, master), task_function=TrainJob(sweep)
            )
            sweeper.sweep(arguments=_for_hydra(command.swept, command))
            return set()

        return drive(sweep, words, grid, run)


@contextmanager
def opened_hydra(command: str, words: Sequence[str]) -> Iterator[Hydra]:
    """Hydra with our files and launchers, for a command that starts jobs; what it complains of is one line.

    Raises:
        ConfigError: The command was started by torchrun, an optional package is missing, or Hydra complains.
    """
    if launched_world_size() is not None:
        raise ConfigError(f"{command} starts processes of its own: start it without torchrun")
    _require_packages(words)
    register()
    try:
        with initialize_config_dir(str(config_folder().resolve()), version_base="1.3", job_name="train"):
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None
            yield hydra
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(" ".join(str(error).split())) from error


def prepare(hydra: Hydra, command: Command, default_name: str) -> tuple[Sweep, DictConfig]:
    """The sweep that a command is for, checked by its first job, and Hydra's configuration of it."""
    config = load_job([*command.fixed, *command.example], job_name(command.example))
    folder = Path(config.run.output_dir) / (config.sweep.name or default_name)
    sweep = Sweep(folder, tuple(command.fixed), config.run.cache_dir, config.sweep)
    return sweep, _compose(hydra, command, config, folder)


def launcher_of(hydra: Hydra, master: DictConfig, sweep: Sweep) -> Launcher:
    """The launcher that the command names, for batches that follow from the results of earlier ones."""
    return Plugins.instance().instantiate_launcher(
        hydra_context=_context(hydra, master), task_function=TrainJob(sweep), config=master
    )


def _context(hydra: Hydra, master: DictConfig) -> HydraContext:
    return HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(master))


def drive(sweep: Sweep, words: Sequence[str], batch: Sequence[Sequence[str]], run: Callable[[], set[Path]]) -> int:
    """Hold the sweep's folder, write its command down, run its jobs and say what became of them.

    Args:
        sweep: The sweep.
        words: Its command.
        batch: Overrides of the jobs that are known before any of them starts.
        run: Runs the jobs; returns the folders of those that need not be finished.

    Returns:
        The exit code of ``multirun``.

    Raises:
        ValueError: Another process drives the sweep, or a job is wrong.
    """
    with _driving(sweep.folder):
        write_json(sweep.folder / SWEEP_FILE, {"name": sweep.folder.name, "command": list(words)})
        sweep.plan(batch)
        print(f"{sweep.folder}: {describe_sweep(read_progress(sweep.folder))}", flush=True)
        try:
            settled = run()
        except SweepStopped as stopped:
            _summarise(sweep.folder)
            return INTERRUPTED if stopped.is_killed else STOPPED
        except ValueError:  # a trial of a search is wrong
            _summarise(sweep.folder)
            raise
        return _summarise(sweep.folder, settled)


def parse(words: Sequence[str], parser: OverridesParser) -> Command:
    """Sort the overrides of a sweep.

    Raises:
        ConfigError: No override has several values, or one that says where a run lives.
    """
    command = sort_overrides(words, parser)
    if not command.swept and not any(word.startswith("hydra.sweeper.params") for word in command.hydra):
        raise ConfigError("--multirun: no override lists several values, as router=top_k,top_p or seed=1,2,3 do")
    return command


def sort_overrides(words: Sequence[str], parser: OverridesParser) -> Command:
    """Sort overrides, of which some may have several values.

    Raises:
        ConfigError: One that says where a run lives has several values, or names a single run.
    """
    parsed = [(word, parser.parse_overrides([word])[0]) for word in words]
    swept = [(word, one) for word, one in parsed if one.is_sweep_override() and not one.is_hydra_override()]
    command = Command(
        hydra=[word for word, one in parsed if one.is_hydra_override() and not _is_of_jobs(one)],
        fixed=[word for word, one in parsed if _is_of_jobs(one) and not one.is_sweep_override()],
        swept=[word for word, _ in swept],
        keys=[one.get_key_element() for _, one in swept],
        example=[f"{one.get_key_element()}={_first_value(one)}" for _, one in swept],
    )
    for key in command.keys:
        if key.lstrip("+").startswith(("run.", "sweep.")):
            raise ConfigError(f"{key}: what says where and how runs are kept cannot be swept")
    if any(word.lstrip("+").startswith("run.name=") for word in command.fixed):
        raise ConfigError("run.name: a sweep names its runs itself; sweep.name names their folder")
    return command


def _is_of_jobs(override: Override) -> bool:
    """Whether every job is given it: what is not Hydra's own, and the folders with the user's YAML files."""
    return not override.is_hydra_override() or override.get_key_element() == "hydra.searchpath"


def _first_value(override: Override) -> str:
    value = override.value()
    return str(value.start) if isinstance(value, IntervalSweep) else next(iter(override.sweep_string_iterator()))


def _compose(hydra: Hydra, command: Command, config: Config, folder: Path) -> DictConfig:
    """Hydra's configuration of the sweep.

    It is composed with the first value of everything swept, since other overrides may be of fields that only such a
    choice has. The sweeper then gets only what is swept; the rest stands where Hydra puts it before every job.
    """
    asked = {word.partition("=")[0] for word in command.hydra}
    ours = {
        "hydra/launcher": LAUNCHER,
        "hydra/hydra_logging": "none",
        "hydra/job_logging": "none",
        "hydra.output_subdir": "null",
        "hydra.sweep.dir": quoted(str(folder)),
        "hydra.sweep.subdir": quoted("."),
    }
    if "hydra/sweeper=optuna" in command.hydra:
        # Trials are looked up by their values, so the same ones must be proposed when the sweep is started again.
        ours["hydra.sweeper.n_jobs"] = str(config.sweep.parallel)
        if not any(word in command.hydra for word in _SEEDLESS_SAMPLERS):
            ours["hydra.sweeper.sampler.seed"] = "0"
    own = [*(f"{key}={value}" for key, value in ours.items() if key not in asked), *command.hydra]
    fixed = _for_hydra(command.fixed, command)
    words = [*own, *fixed, *_for_hydra(command.example, command)]
    master = hydra.compose_config(ROOT_CONFIG, words, RunMode.MULTIRUN)
    with read_write(master.hydra), open_dict(master.hydra):
        master.hydra.mode = RunMode.MULTIRUN
        master.hydra.overrides.hydra = [*own, *fixed]
        master.hydra.overrides.task = _for_hydra(command.swept, command)
    return master


def _for_hydra(words: Sequence[str], command: Command) -> list[str]:
    """Overrides as Hydra can compose them, which knows no fields of a scheme in a user's own file."""
    has_file = any(word.startswith("router_file=") for word in [*command.fixed, *command.swept])
    return [f"++{word}" if has_file and word.startswith("router.") else word for word in words]


def _combinations(hydra: Hydra, command: Command, master: DictConfig) -> list[list[str]]:
    """The jobs of a plain sweep, known before it starts; none of a search, whose trials follow from its results."""
    if master.hydra.sweeper._target_ != f"{BasicSweeper.__module__}.{BasicSweeper.__name__}":
        return []
    params = [f"{key}={value}" for key, value in (master.hydra.sweeper.params or {}).items()]
    parser = OverridesParser.create(hydra.config_loader)
    overrides = parser.parse_overrides([*params, *_for_hydra(command.swept, command)])
    return BasicSweeper.split_arguments(overrides, None)[0]


def _require_packages(words: Sequence[str]) -> None:
    for word, package in _PACKAGES.items():
        if word in words and not _is_installed(f"hydra_plugins.{package}"):
            raise ConfigError(f"{word} needs {package.replace('_', '-')}: pip install 'moe_pretrain[sweep]'")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@contextmanager
def _driving(folder: Path) -> Iterator[None]:
    """Hold the sweep, which the kernel lets go of when this process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = try_lock(folder / SWEEP_LOCK)
    if handle is None:
        raise ConfigError(f"sweep.name={folder.name}: another process runs this sweep; see moe-pretrain sweep-status")
    try:
        yield
    finally:
        os.close(handle)


def _summarise(folder: Path, settled: Container[Path] = ()) -> int:
    """Say what became of the jobs, of those that are not finished why; the exit code, by all but ``settled`` ones."""
    jobs = read_progress(folder)
    print(f"{folder}: {describe_sweep(jobs)}")
    for line in table([job for job in jobs if job.state.state != "finished"]):
        print(f"  {line}")
    print(f"compare them:  moe-pretrain compare {quoted(str(folder))}")
    states = {job.state.state for job in jobs if job.job.folder not in settled}
    if states & {"failed", "diverged"}:
        return NOT_ALL_FINISHED
    if states - {"finished"}:
        print("the same command goes on")
        return STOPPED
    return 0
