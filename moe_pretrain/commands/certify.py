"""``certify``: the certificate of a router, or of those of the runs in a folder."""

import argparse
import os
from functools import partial
from pathlib import Path

from moe_pretrain.commands.errors import for_one_of_each_variant
from moe_pretrain.commands.options import Parser, overrides_of, router_files, shows
from moe_pretrain.config.load import load
from moe_pretrain.config.preflight import preflight
from moe_pretrain.config.recorded import allowed_router_file, earlier_words
from moe_pretrain.parallel.launcher import run_workers
from moe_pretrain.run_folder.paths import CERTIFICATE, OVERRIDES_FILE, no_run
from moe_pretrain.run_folder.provenance import commit, read_overrides, versions
from moe_pretrain.verify.certificate.certify import certify


def arguments(parser: Parser) -> None:
    """Overrides, or a folder of runs."""
    parser.add_overrides("Hydra overrides, GROUP=CHOICE or FIELD=VALUE; or FOLDER: a run, or runs below it")
    parser.add_examples(
        "router=top_p",
        "router_file=my_router.py parallel.processes=2",
        "outputs/my_sweep",
        "outputs/own router_file=my_router.py",
    )


def run(options: argparse.Namespace) -> int:
    """Print the certificate of a router, or write those of runs into their folders."""
    words = options.overrides
    if not words or ("=" in words[0] and not Path(words[0]).is_dir()):
        overrides = overrides_of(options)
        return 0 if shows(options, overrides) else certify_one(overrides, None)
    if options.cfg or options.resolve or options.info or options.config_dir:
        raise ValueError(f"FOLDER={words[0]} must stand alone: its runs have configurations of their own")
    given = router_files(words[1:])
    return for_one_of_each_variant(Path(words[0]), lambda folder: _certify_run(folder, given))


def _certify_run(folder: Path, given: list[str]) -> int:
    if not (folder / OVERRIDES_FILE).exists():
        raise ValueError(no_run(folder, OVERRIDES_FILE))
    recorded = read_overrides(folder)
    named = [word.partition("=")[2] for word in recorded if word.startswith("router_file=")]
    file = allowed_router_file(named[-1] if named and named[-1] != "null" else None, given, str(folder))
    words = earlier_words(folder, recorded, [] if file is None else [f"router_file={file}"])
    return certify_one(words, folder / CERTIFICATE)


def certify_one(overrides: list[str], write: Path | None) -> int:
    """Print the certificate of a configuration's router; on several ranks ``verify`` is part of it."""
    overrides = _on_two_ranks(overrides)
    config = load(overrides)
    processes = config.parallel.processes
    preflight(config, processes)
    on_ranks = (lambda: run_workers(["verify", *overrides], processes)) if processes > 1 else None
    code = commit() or f"moe_pretrain {versions()['moe_pretrain']}"
    return certify(config, on_ranks, partial(print, flush=True), write, code)  # in order with what the workers print


def _on_two_ranks(overrides: list[str]) -> list[str]:
    """``overrides`` with two ranks, experts spread over both, unless they choose ranks themselves or two do not fit.

    State that a scheme moves by its own rank's tokens alone looks right in one process, and is another scheme on two.
    """
    chosen = any(word.startswith("parallel.") for word in overrides)
    if chosen or len(os.sched_getaffinity(0)) < 2:
        return overrides
    two = [*overrides, "parallel.processes=2", "parallel.expert_parallel_size=2"]
    try:
        preflight(load(two), 2)
    except ValueError:
        return overrides
    return two
