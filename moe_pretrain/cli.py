"""The table of commands. ``moe-pretrain COMMAND [OVERRIDES]``; every command takes the same Hydra overrides."""

import io
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from moe_pretrain.system.child_process import die_with_launcher

USAGE_CODE = 2
DAMAGED_CODE = 1
MULTIRUN = ("--multirun", "-m")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    Errors that a user can cause are one line on stderr; ``--debug`` shows the traceback.
    """
    die_with_launcher()
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help") or words[0] not in COMMANDS:
        print(_usage(), file=sys.stderr if words and words[0] not in ("-h", "--help") else sys.stdout)
        return 0 if words and words[0] in ("-h", "--help") else USAGE_CODE
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log file has each line at once, and loses none to a kill
    # DeepSpeed reports its settings while it is imported and built; the user sees our progress instead.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)
    try:
        return COMMANDS[words[0]][0](words[1:])
    except Exception as error:
        if debug or not _is_users(error):
            raise
        print(f"moe-pretrain {words[0]}: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_CODE


def _is_users(error: Exception) -> bool:
    """Whether the error is one that the user can mend, and so needs no traceback."""
    from moe_pretrain.checkpoint.store import CheckpointError
    from moe_pretrain.engine.engine import NonFiniteError
    from moe_pretrain.engine.sanity import SanityError

    return isinstance(error, ValueError | CheckpointError | NonFiniteError | SanityError)


def _usage() -> str:
    lines = ["usage: moe-pretrain COMMAND [OVERRIDE ...] [--debug]", ""]
    lines += [f"  {name:<12} {help_text}" for name, (_, help_text) in COMMANDS.items()]
    lines += [
        "",
        "An override is a Hydra override, for example model=700m router=top_k seed=1 batch.micro_batch_size=4.",
    ]
    return "\n".join(lines)


def _train(overrides: list[str]) -> int:
    """Check the configuration, then train here or in workers of our own; with ``--multirun`` a sweep."""
    from moe_pretrain.analysis.report import write_last_report
    from moe_pretrain.config.load import load
    from moe_pretrain.config.preflight import preflight
    from moe_pretrain.parallel.launcher import run_workers
    from moe_pretrain.parallel.rendezvous import launched_rank, launched_world_size
    from moe_pretrain.run_folder.lock import owned
    from moe_pretrain.run_folder.provenance import write_overrides
    from moe_pretrain.train.build import train

    if set(overrides) & set(MULTIRUN):
        from moe_pretrain.sweep.multirun import multirun

        return multirun([word for word in overrides if word not in MULTIRUN])
    overrides = _with_earlier_overrides(overrides)
    config = load(overrides)
    launched = launched_world_size()
    plan = preflight(config, launched or config.parallel.processes)
    if launched is None and config.parallel.processes > 1:
        with owned(config.run.folder, print):
            write_overrides(config.run.folder, overrides)
            return run_workers(["train", *overrides], config.parallel.processes)
    code = train(config, plan, overrides)
    if launched_rank() == 0:
        write_last_report(config.run.folder, print)
    return code


def _with_earlier_overrides(overrides: list[str]) -> list[str]:
    """A run that exists goes on with the overrides it was started with; new ones come after and win.

    A job of a sweep, which is told the sweep's name, is given all of its overrides every time.
    """
    from moe_pretrain.config.compose import RENAMED
    from moe_pretrain.config.load import load
    from moe_pretrain.run_folder.provenance import read_overrides

    if any(word.startswith("sweep.name=") for word in overrides):
        return overrides
    named = [word for word in overrides if word.startswith(("run.name=", "run.output_dir="))]
    explicit_name = any(word.startswith("run.name=") for word in named)
    if not explicit_name or not (recorded := read_overrides(load(named).run.folder)):
        return overrides
    merged: dict[str, str] = {}
    earlier = [word.partition("=") for word in recorded]
    for word in [*(f"{RENAMED.get(key, key)}{equals}{value}" for key, equals, value in earlier), *overrides]:
        merged[word.split("=")[0].lstrip("+")] = word
    return list(merged.values())


def _sweep_status(arguments: list[str]) -> int:
    """Print how far the jobs of a sweep are."""
    from moe_pretrain.sweep.status import describe_sweep, read_progress, table

    if len(arguments) != 1:
        raise ValueError("usage: moe-pretrain sweep-status SWEEP_FOLDER")
    jobs = read_progress(Path(arguments[0]))
    print(describe_sweep(jobs), *table(jobs), sep="\n")
    return 0


def _prepare(words: list[str]) -> int:
    """Tokenise the corpora ahead of ``train``, or compare the checksums of those that are prepared."""
    from moe_pretrain.config.load import load
    from moe_pretrain.train.corpora import check_corpora, prepare_corpora

    config = load([word for word in words if word != "--check"])
    corpus, sets = check_corpora(config) if "--check" in words else prepare_corpora(config, print)
    if "--check" in words:
        print("every checksum is right")
    for name in config.evaluation.sets:
        print(f"evaluation.sets.{name}: {sets[name].num_documents:,} documents, {sets[name].num_tokens:,} tokens")
    print(corpus.describe_prepared(config.num_tokens))
    for folder in corpus.folders:
        print(f"shards: {folder}")
    return 0


def _verify(overrides: list[str]) -> int:
    """Compare a small twin of the configuration with the oracle, here or in workers of our own."""
    from moe_pretrain.config.load import load
    from moe_pretrain.config.preflight import preflight
    from moe_pretrain.parallel.launcher import run_workers
    from moe_pretrain.parallel.rendezvous import launched_rank, launched_world_size
    from moe_pretrain.verify.verify import verify

    config = load(overrides)
    launched = launched_world_size()
    plan = preflight(config, launched or config.parallel.processes)
    if launched is None and config.parallel.processes > 1:
        return run_workers(["verify", *overrides], config.parallel.processes)
    return verify(config, plan, print if launched_rank() == 0 else lambda line: None)


def _certify(words: list[str]) -> int:
    """Print the certificate of a router, or write those of runs into their folders."""
    from moe_pretrain.run_folder.paths import CERTIFICATE, OVERRIDES_FILE
    from moe_pretrain.run_folder.provenance import read_overrides

    if len(words) != 1 or ("=" in words[0] and not Path(words[0]).is_dir()):
        return _certify_one(words, None)

    def certify_run(folder: Path) -> int:
        if not (folder / OVERRIDES_FILE).exists():
            raise ValueError(f"{folder} is not a run folder: it has no {OVERRIDES_FILE}")
        return _certify_one(read_overrides(folder), folder / CERTIFICATE)

    return _for_one_of_each_variant(Path(words[0]), certify_run)


def _for_one_of_each_variant(folder: Path, command: Callable[[Path], int]) -> int:
    """Call ``command`` with the folder of a run, or of a run of each variant below it; the worst exit code.

    What a user can mend in one run keeps nobody from the next.
    """
    from moe_pretrain.analysis.compare.variants import one_of_each_variant

    runs = one_of_each_variant(folder)
    if len(runs) == 1:
        return command(runs[0])
    worst = 0
    for run in runs:
        print(f"== {run}", flush=True)
        try:
            code = command(run)
        except Exception as error:
            if not _is_users(error):
                raise
            print(" ".join(str(error).split()), file=sys.stderr)
            code = USAGE_CODE
        worst = max(worst, code)
    return worst


def _certify_one(overrides: list[str], write: Path | None) -> int:
    """Print the certificate of a configuration's router; on several ranks ``verify`` is part of it."""
    from moe_pretrain.config.load import load
    from moe_pretrain.config.preflight import preflight
    from moe_pretrain.parallel.launcher import run_workers
    from moe_pretrain.run_folder.provenance import commit, versions
    from moe_pretrain.verify.certificate.certify import certify

    config = load(overrides)
    processes = config.parallel.processes
    preflight(config, processes)
    on_ranks = (lambda: run_workers(["verify", *overrides], processes)) if processes > 1 else None
    code = commit() or f"moe_pretrain {versions()['moe_pretrain']}"
    return certify(config, on_ranks, partial(print, flush=True), write, code)  # in order with what the workers print


def _report(arguments: list[str]) -> int:
    """Write a run's HTML page and print where it is."""
    from moe_pretrain.analysis.report import write_report

    if len(arguments) != 1:
        raise ValueError("usage: moe-pretrain report RUN_FOLDER")
    print(write_report(Path(arguments[0])))
    return 0


def _wandb(arguments: list[str]) -> int:
    """Write wandb's offline files of all runs below a folder anew, and print how to upload them."""
    from moe_pretrain.metrics.wandb_sink import wandb_runs, write_offline

    if len(arguments) != 1:
        raise ValueError("usage: moe-pretrain wandb FOLDER")
    for folder in write_offline(wandb_runs(Path(arguments[0]), print)):
        print(f"wandb sync {folder}")
    return 0


def _plan(words: list[str]) -> int:
    """Print what a run would cost."""
    from moe_pretrain.plan.plan import describe, split_assumptions

    assumed, overrides = split_assumptions(words)
    return describe(overrides, assumed, print)


def _compare(arguments: list[str]) -> int:
    """Write the comparison of all runs below a folder, print its table and where it is."""
    from moe_pretrain.analysis.compare.page import write_comparison

    folder, reference = _folder_and_reference(arguments)
    path, text = write_comparison(folder, reference)
    print(text)
    print(path)
    return 0


def _folder_and_reference(arguments: list[str]) -> tuple[Path, str | None]:
    match arguments:
        case [folder] if not folder.startswith("--"):
            return Path(folder), None
        case [folder, "--reference", reference] | ["--reference", reference, folder]:
            return Path(folder), reference
    raise ValueError("usage: moe-pretrain compare FOLDER [--reference VARIANT]")


def _inspect(arguments: list[str]) -> int:
    """Describe a checkpoint and verify it; 1 if it is damaged."""
    from moe_pretrain.checkpoint.inspection import inspect
    from moe_pretrain.checkpoint.manifest import CheckpointError

    if len(arguments) != 1:
        raise ValueError("usage: moe-pretrain inspect CHECKPOINT")
    try:
        for line in inspect(Path(arguments[0])):
            print(line)
    except CheckpointError as error:
        print(f"DAMAGED: {' '.join(str(error).split())}")
        return DAMAGED_CODE
    return 0


def _specialise(arguments: list[str]) -> int:
    """Say what the experts of a run, or of a run of each variant, specialise in."""
    if len(arguments) != 1:
        raise ValueError("usage: moe-pretrain specialise FOLDER")
    return _for_one_of_each_variant(Path(arguments[0]), _specialise_one)


def _specialise_one(folder: Path) -> int:
    """Say what a run's experts specialise in."""
    from moe_pretrain.analysis.specialisation import specialise
    from moe_pretrain.config.load import read_run
    from moe_pretrain.config.preflight import plan_run
    from moe_pretrain.train.corpora import prepare_corpora

    config = read_run(folder)
    corpus, sets = prepare_corpora(config, print)
    # A mixture's sources are among the sets already.
    return specialise(config, plan_run(config, 1), folder, {**corpus.validation_sets(), **sets}, print)


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "plan": (
        _plan,
        "parameters, FLOPs, memory per rank, traffic, time; --mfu= --peak= --gpu-memory= --worst-load=; starts nothing",
    ),
    "prepare": (_prepare, "tokenise the corpus ahead of train, into the same cache; --check compares checksums"),
    "train": (
        _train,
        "train a model; the same run.name again resumes; --multirun router=top_k,top_p seed=1,2: a sweep",
    ),
    "sweep-status": (_sweep_status, "SWEEP_FOLDER: how far the jobs of a sweep are, from another terminal too"),
    "verify": (_verify, "compare the training step of this configuration, shrunk, with a one-process oracle"),
    "certify": (
        _certify,
        "one scheme, your own with router_file=PATH, or those of the runs in FOLDER: what it must do, PASS or FAIL",
    ),
    "inspect": (_inspect, "CHECKPOINT: what it holds and where it comes from, and whether its checksums are right"),
    "report": (_report, "RUN_FOLDER: one run as a self-contained HTML page"),
    "compare": (_compare, "FOLDER [--reference VARIANT]: all runs below a folder, variant against variant"),
    "wandb": (_wandb, "FOLDER: wandb's offline files of all runs below it, written anew from their metrics"),
    "specialise": (
        _specialise,
        "FOLDER: information between experts and what their tokens are, in bits; one run of each variant",
    ),
}
"""Command -> (function of the remaining words, one line of help)."""
