"""``verify``: a small twin of the configuration against the oracle."""

import argparse

from moe_pretrain.commands.options import Parser, overrides_of, shows
from moe_pretrain.config.load import load
from moe_pretrain.config.preflight import preflight
from moe_pretrain.parallel.launcher import run_workers
from moe_pretrain.parallel.rendezvous import launched_rank, launched_world_size
from moe_pretrain.verify.verify import verify


def arguments(parser: Parser) -> None:
    """Overrides."""
    parser.add_overrides()
    parser.add_examples("router=expert_choice", "parallel.processes=2 parallel.expert_parallel_size=2")


def run(options: argparse.Namespace) -> int:
    """Compare a small twin of the configuration with the oracle, here or in workers of our own."""
    overrides = overrides_of(options)
    if shows(options, overrides):
        return 0
    config = load(overrides)
    launched = launched_world_size()
    plan = preflight(config, launched or config.parallel.processes)
    if launched is None and config.parallel.processes > 1:
        return run_workers(["verify", *overrides], config.parallel.processes)
    return verify(config, plan, print if launched_rank() == 0 else lambda line: None)
