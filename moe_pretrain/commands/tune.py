"""``tune``: the same number of trials for every scheme, then final runs at the best values."""

import argparse
import shlex

from moe_pretrain.commands.options import Parser, overrides_of


def arguments(parser: Parser) -> None:
    """Overrides, several values of which are schemes, and how they are tuned."""
    parser.add_overrides(
        "Hydra overrides; several values make schemes (router=top_k,autonomy), seed=1,2,3 are those of the final runs"
    )
    parser.add_argument("--trials", metavar="N", type=_whole, default=5, help="of every scheme (default 5)")
    parser.add_argument(
        "--tuning-seed", metavar="SEED", type=_whole, default=0, help="of the trials; no final run has it (default 0)"
    )
    parser.add_argument(
        "--factor", metavar="X", type=_number, default=2.0, help="step of the grid of rates (default 2)"
    )
    parser.add_argument(
        "--also",
        metavar="FIELD=VALUES",
        action="append",
        default=[],
        help="values of a further field, tried at the best rate by the schemes that have it, within their trials",
    )
    parser.add_argument(
        "--scheme",
        metavar="WORDS",
        action="append",
        default=[],
        help="one more scheme: its overrides in one word, 'router=top_k router.load_balance_weight=0'",
    )
    parser.add_examples(
        "router=top_k,autonomy,random seed=1,2,3 sweep.name=contest",
        "router=top_k,top_p seed=1,2,3 --trials 7 --also router.load_balance_weight=0.003,0.03",
        "--scheme 'router=top_k router.load_balance_weight=0' router=top_k seed=1,2,3 sweep.name=balance",
    )


def run(options: argparse.Namespace) -> int:
    """Tune the schemes and run each at its best values, or go on with it."""
    overrides = overrides_of(options)
    if options.cfg or options.info or options.resolve:
        raise ValueError("--cfg, --resolve and --info show one configuration: use them with train")
    from moe_pretrain.sweep.tune import tune  # Hydra's plugins are looked for when it is imported
    from moe_pretrain.sweep.tune_schemes import TuneSettings

    schemes = tuple(tuple(shlex.split(each)) for each in options.scheme)
    return tune(
        overrides, TuneSettings(options.trials, options.tuning_seed, options.factor, tuple(options.also), schemes)
    )


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number") from error


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number") from error
