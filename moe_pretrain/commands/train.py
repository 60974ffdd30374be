"""``train``: one run, here or in workers of our own, or a sweep of them."""

import argparse
from collections.abc import Callable
from dataclasses import replace

from moe_pretrain.commands.options import Parser, overrides_of, shows
from moe_pretrain.config.load import load
from moe_pretrain.config.preflight import check_devices, check_warm_up, plan_run, preflight
from moe_pretrain.config.recorded import earlier_words, kept, words_at_start
from moe_pretrain.config.schema import Config
from moe_pretrain.inference.harness.extra import check_tasks
from moe_pretrain.parallel.launcher import run_workers
from moe_pretrain.parallel.rendezvous import launched_number, launched_rank, launched_world_size
from moe_pretrain.plan.micro_batch import USABLE, with_largest_micro_batch
from moe_pretrain.run_folder.identity import decides
from moe_pretrain.run_folder.lock import owned
from moe_pretrain.run_folder.paths import misspelt_run
from moe_pretrain.run_folder.provenance import claim_overrides, read_config, read_overrides, refuse_lost_overrides
from moe_pretrain.schedule.batch_plan import plan_batches
from moe_pretrain.system.child_process import is_worker
from moe_pretrain.system.gpu import smallest_memory
from moe_pretrain.system.open_files import allow_open_files
from moe_pretrain.train.branch import check_branch
from moe_pretrain.train.build import train
from moe_pretrain.train.resume_rules import check_resume
from moe_pretrain.train.task_evaluator import RunTasks

_PLACE = ("run.name=", "run.output_dir=")


def arguments(parser: Parser) -> None:
    """Overrides, and several values of them with ``--multirun``."""
    parser.add_overrides()
    parser.add_argument("-m", "--multirun", action="store_true", help="a run for each combination of listed values")
    parser.add_examples(
        "model=small router=expert_choice run.name=first",
        "run.name=first                                    (the same name again resumes)",
        "--multirun router=top_k,top_p seed=1,2 sweep.parallel=2",
        "--config-dir my_configs model=mine budget=small",
        "experiment=aoe_732m_256 tokenizer.path=PATH --cfg job",
    )


def run(options: argparse.Namespace) -> int:
    """Check the configuration, then train here or in workers of our own; with ``--multirun`` a sweep."""
    overrides = overrides_of(options)
    if options.multirun:
        if options.cfg or options.info or options.resolve:
            raise ValueError("--cfg, --resolve and --info show one configuration: leave out --multirun")
        from moe_pretrain.sweep.multirun import multirun  # Hydra's plugins are looked for when it is imported

        return multirun(overrides)
    if not is_worker():  # its launcher has added them
        is_quiet = options.cfg or options.info or launched_rank()
        overrides = with_earlier_overrides(overrides, (lambda line: None) if is_quiet else print)
    if shows(options, overrides):
        return 0
    config = load(overrides)
    launched = launched_world_size()
    if config.batch.micro_batch_size == "auto":
        overrides = with_micro_batch(overrides, config, launched or config.parallel.processes)
        config = load(overrides)
    plan = preflight(config, launched or config.parallel.processes)
    check_warm_up(config, plan)
    check_branch(config)
    if not is_worker():  # its launcher has
        check_resume(config)
    check_tasks("evaluation.tasks.names", config.evaluation.tasks.names)
    allow_open_files(plan.world_size)
    own_ranks = launched_number("LOCAL_WORLD_SIZE") or (launched_number("LOCAL_RANK") or 0) + 1
    check_devices(plan, own_ranks if launched else plan.world_size)
    if launched is None and config.parallel.processes > 1:
        RunTasks(config)  # one that cannot be loaded is said once, and its data is in the cache
        with owned(config.run.folder, print):
            claim_overrides(config.run.folder, overrides)
            return run_workers(["train", *overrides], config.parallel.processes)
    code = train(config, plan, overrides)
    if launched_rank() == 0 and config.run.report:
        from moe_pretrain.analysis.report import write_last_report  # here: matplotlib is a second of every rank's start

        write_last_report(config.run.folder, print)
    return code


def with_earlier_overrides(overrides: list[str], say: Callable[[str], None] = print) -> list[str]:
    """A run that exists goes on with what it was started with, defaults of that day included; new overrides win.

    A job of a sweep, which is told the sweep's name, is given all of its overrides every time. A name that is new,
    almost that of a run, and given alone is more often a resume that is misspelt than a run: this is said.

    Raises:
        ValueError: The run has begun and what it was started with is lost: its name alone would train the defaults.
    """
    if any(word.startswith("sweep.name=") for word in overrides):
        return overrides
    named = [word for word in overrides if word.lstrip("+").startswith(_PLACE)]
    explicit_name = any(word.lstrip("+").startswith("run.name=") for word in named)
    if not explicit_name:
        return overrides
    folder = load(named).run.folder
    recorded = read_overrides(folder)
    if not recorded:
        is_default = not any(decides(word.lstrip("+~").partition("=")[0]) for word in overrides)
        if is_default and not folder.exists() and (meant := misspelt_run(folder)) is not None:
            default = f"{folder} is a new run with the default configuration"
            say(f"{default}; did you mean run.name={meant.name}, which exists?")
        if is_default:
            refuse_lost_overrides(folder)
        return overrides
    words = earlier_words(folder, recorded, overrides)
    values = read_config(folder)  # read after the overrides: whoever writes them writes it first
    unsaid = [word for word in words if word not in overrides and not word.startswith(_PLACE)]
    if not values and unsaid:  # they may be the very mistake by which the first start was refused
        say(f"{folder} was started before and has not begun; what it was started with holds too: {' '.join(unsaid)}")
    return words + kept(words_at_start(folder, recorded, overrides), values, words) if values else words


def with_micro_batch(overrides: list[str], config: Config, ranks: int) -> list[str]:
    """Overrides with a number for ``batch.micro_batch_size=auto``, which the run keeps: the one that it has, if any.

    Raises:
        ValueError: Nothing fits, or there is no GPU.
    """
    earlier = read_config(config.run.folder).get("batch", {}).get("micro_batch_size")
    rows = config.batch.global_batch_tokens // config.model.sequence_length
    if isinstance(earlier, int) and rows % (earlier * ranks) == 0:
        size = earlier
    else:
        one = replace(config, batch=replace(config.batch, micro_batch_size=1))
        run = plan_run(one, ranks)
        room = USABLE * smallest_memory() if run.device == "cuda" else 0.0
        sized = with_largest_micro_batch(config, ranks, (run.device, run.dtype), room)
        size = plan_batches(sized.batch, config.model.sequence_length, ranks, config.num_steps).micro_batch_size
        if not launched_rank():
            print(f"batch.micro_batch_size=auto is {size}: the most rows that are planned to fit")
    others = [word for word in overrides if not word.lstrip("+").startswith("batch.micro_batch_size=")]
    return [*others, f"batch.micro_batch_size={size}"]
