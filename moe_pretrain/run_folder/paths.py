"""Map of a run's and a sweep's folder: the name of every file in it, each defined here once.

RUN/                         who writes it, when, and what it holds
    overrides.txt            every start, before anything else: the words of its command, which a resume by name uses
    config.yaml              the main rank at every start: the resolved configuration
    summary.json             the main rank at every start: sizes, planned steps, corpus, versions, device, layer cost
    metrics.jsonl            the main rank, row by row: train, validation and event rows, see ``metrics_file``
    owner.lock               every rank holds it while it lives; the owner's process, host and start, see ``lock``
    rewinds.json             the main rank before it goes back after a loss spike: rows left out, see ``rewinds``
    checkpoints/             all ranks: see ``checkpoint.write``
    probe/step_XXXXXXXX.npz  the main rank at a validation: losses by document and routes, see ``probe``
    task_results/step_X.json ``evaluate RUN tasks=...``, and the main rank in training: see ``task_results``
    sick_steps/step_X.json   the main rank after a step that was not finite: which rows it read
    stacks/rank_XXXXX.txt    each rank when it hangs or dies: the stack of each of its threads
    report.html              the main rank at the end, and ``report``: the page
    certificate.json         ``certify RUN``: ``{"code": ..., "rows": [{"property", "verdict", "detail"}]}``
    specialisation.json      ``specialise RUN``: information between experts and classes, by MoE layer
    wandb_id.txt             the main rank at its first start with wandb: the run's id there, kept over resumes
    wandb/                   wandb: its own files
SWEEP/                       the folder of a sweep; each job's run folder lies in it
    sweep.json               the sweep at its start: its command
    tune.json                ``tune`` before and after each batch of trials: what was tried and chosen, ``tune_record``
    .lock                    held by the process that drives the sweep
    JOB/job.json             the sweep before any job starts: what the job is to do
    JOB/job_state.json       the job's driver at each change: how far the job came
    JOB/.job.lock            held by the job's process, and so let go of whenever that dies
    JOB/log.txt              the job's process: what it printed
    JOB/slurm_job.json       the sweep when it submits the job to SLURM: the job's number there
FOLDER/compare.*             ``compare FOLDER``: page, picture, and tables of variants and runs
FOLDER/ladder.json           ``ladder FOLDER``: the law of each scheme, its runs and the gains at a larger scale
"""

import re
from pathlib import Path

from moe_pretrain.system.words import nearest

OVERRIDES_FILE = "overrides.txt"
CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"
METRICS_FILE = "metrics.jsonl"
OWNER_FILE = "owner.lock"
REWINDS_FILE = "rewinds.json"
REPORT_FILE = "report.html"
CERTIFICATE = "certificate.json"
SPECIALISATION_FILE = "specialisation.json"
WANDB_ID_FILE = "wandb_id.txt"

CHECKPOINTS = "checkpoints"
PROBES = "probe"
SICK_STEPS = "sick_steps"
TASK_RESULTS = "task_results"
STACKS = "stacks"
WANDB = "wandb"

RUN_FILES = {CONFIG_FILE, METRICS_FILE, OVERRIDES_FILE}
"""A folder with any of these is a run: one that broke before its first step must not vanish from the comparison."""

SWEEP_FILE = "sweep.json"
TUNE_FILE = "tune.json"
SWEEP_LOCK = ".lock"
JOB_FILE = "job.json"
STATE_FILE = "job_state.json"
JOB_LOCK = ".job.lock"
LOG_FILE = "log.txt"
SLURM_FILE = "slurm_job.json"

LADDER_FILE = "ladder.json"
COMPARE_PAGE = "compare.html"
COMPARE_PICTURE = "compare.png"
COMPARE_TEXT = "compare.md"
COMPARE_VARIANTS = "compare.csv"
COMPARE_RUNS = "compare_runs.csv"


_PROBE = re.compile(r"step_(\d{8})\.npz")
_TASK_RESULT = re.compile(r"step_(\d{8})\.json")


def misspelt_run(folder: Path, file: str = OVERRIDES_FILE) -> Path | None:
    """The run beside ``folder``, known by its ``file``, whose name that of ``folder`` is a misspelling of, if any."""
    near = nearest(folder.name, (path.parent.name for path in folder.parent.glob(f"*/{file}")))
    return folder.parent / near if near else None


def named_run(folder: Path, name: str) -> Path:
    """The folder of the run that the run in ``folder`` calls ``name``: a path, or the name of a folder beside it."""
    beside = folder.parent / name
    return beside if beside.is_dir() and not Path(name).is_dir() else Path(name)


def no_run(folder: Path, file: str) -> str:
    """In words that ``folder`` is no run's, for lack of ``file``, and which folder above, below or beside is one."""
    if not folder.is_dir():
        meant = misspelt_run(folder, file)
        return f"{folder} is not a run folder: there is no such folder" + (f"; did you mean {meant}?" if meant else "")
    above = [parent for parent in folder.parents[:2] if (parent / file).is_file()]
    near = above or sorted(path.parent for path in folder.glob(f"*/{file}"))
    some = " or ".join(map(str, near[:3])) + (" or another" if len(near) > 3 else "")
    return f"{folder} is not a run folder: it has no {file}" + (f"; did you mean {some}?" if near else "")


def sick_step_file(folder: Path, step: int) -> Path:
    """Note on one sick step of the run in ``folder``."""
    return folder / SICK_STEPS / f"step_{step:08d}.json"


def probe_file(folder: Path, step: int) -> Path:
    """Probe of one validation of the run in ``folder``."""
    return folder / PROBES / f"step_{step:08d}.npz"


def probe_step(path: Path) -> int | None:
    """Step of the validation whose probe ``path`` is; None for any other file."""
    match = _PROBE.fullmatch(path.name)
    return int(match.group(1)) if match else None


def task_result_file(folder: Path, step: int) -> Path:
    """Results of tasks at one step of the run in ``folder``."""
    return folder / TASK_RESULTS / f"step_{step:08d}.json"


def task_result_step(path: Path) -> int | None:
    """Step of the results of tasks that ``path`` is; None for any other file."""
    match = _TASK_RESULT.fullmatch(path.name)
    return int(match.group(1)) if match else None


def stacks_file(folder: Path, rank: int) -> Path:
    """Stacks of one rank of the run in ``folder``."""
    return folder / STACKS / f"rank_{rank:05d}.txt"
