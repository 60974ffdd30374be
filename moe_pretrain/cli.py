"""The table of commands, and what all of them share: ``moe-pretrain COMMAND``, errors of one line, ``--debug``."""

import importlib
import importlib.metadata
import io
import logging
import sys
import warnings
from collections.abc import Sequence

from moe_pretrain.system.child_process import die_with_launcher
from moe_pretrain.system.exit_codes import USAGE_CODE

COMMANDS = {
    "plan": ("plan", "parameters, FLOPs, memory per rank, traffic, time; starts nothing"),
    "prepare": ("prepare", "tokenise the corpus ahead of train, into the same cache; --check compares checksums"),
    "train": (
        "train",
        "train a model; the same run.name again resumes; --multirun router=top_k,top_p seed=1,2: a sweep",
    ),
    "sweep-status": ("sweep_status", "how far the jobs of a sweep are, from another terminal too"),
    "verify": ("verify", "compare the training step of this configuration, shrunk, with a one-process oracle"),
    "certify": ("certify", "what a scheme must do, PASS or FAIL: your own with router_file=PATH, or those of a FOLDER"),
    "inspect": ("inspect", "what a checkpoint holds and where it comes from, and whether its checksums are right"),
    "report": ("report", "one run as a self-contained HTML page"),
    "compare": ("compare", "all runs below a folder, variant against variant"),
    "wandb": ("wandb", "wandb's offline files of all runs below a folder, written anew from their metrics"),
    "specialise": ("specialise", "information between experts and what their tokens are, in bits"),
    "completion": ("completion", "completion of commands, options and choices for bash or zsh"),
}
"""Command -> (its module in ``commands``, imported when it runs; one line of help)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    Errors that a user can cause are one line on stderr; ``--debug`` shows the traceback.
    """
    die_with_launcher()
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if words[:1] == ["--version"]:
        print(f"moe-pretrain {importlib.metadata.version('moe_pretrain')}")
        return 0
    if not words or words[0] not in COMMANDS:
        is_asked = not words or words[0] in ("-h", "--help")
        print(_usage(), file=sys.stdout if is_asked else sys.stderr)
        return 0 if words and is_asked else USAGE_CODE
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log file has each line at once, and loses none to a kill
    # DeepSpeed reports its settings while it is imported and built; the user sees our progress instead.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)
    try:
        return _run(words[0], words[1:])
    except Exception as error:
        from moe_pretrain.commands.errors import is_users  # imports the packages whose errors it knows

        if debug or not is_users(error):
            raise
        print(f"moe-pretrain {words[0]}: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_CODE


def _run(name: str, words: Sequence[str]) -> int:
    from moe_pretrain.commands.options import Parser  # Hydra and the configuration, which --help needs not

    module, help_text = COMMANDS[name]
    command = importlib.import_module(f"moe_pretrain.commands.{module}")
    parser = Parser(name, help_text)
    command.arguments(parser)
    options = parser.parse(words)
    if options.help:
        print(parser.help_text(words))
        return 0
    return int(command.run(options))


def _usage() -> str:
    lines = ["usage: moe-pretrain COMMAND [OVERRIDE ...] [OPTION ...]", ""]
    lines += [f"  {name:<12} {help_text}" for name, (_, help_text) in COMMANDS.items()]
    lines += [
        "",
        "An override is a Hydra override, for example model=700m router=top_k seed=1 batch.micro_batch_size=4.",
        "moe-pretrain COMMAND --help: its options, choices and examples; --debug: an error's traceback; --version.",
    ]
    return "\n".join(lines)
