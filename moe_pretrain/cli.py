"""``moe-pretrain COMMAND``, and what all commands share: errors of one line, ``--debug``, a reader that is gone."""

import contextlib
import importlib
import importlib.metadata
import io
import logging
import os
import select
import sys
import warnings
from collections.abc import Sequence

from moe_pretrain.commands import COMMANDS
from moe_pretrain.system.child_process import die_with_launcher
from moe_pretrain.system.cuda_allocator import let_segments_grow
from moe_pretrain.system.early_signals import ending_early_on_signals
from moe_pretrain.system.exit_codes import INTERRUPTED, READER_GONE, USAGE_CODE
from moe_pretrain.system.utf8_mode import restart_in_utf8_mode


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    Errors that a user can cause are one line on stderr; ``--debug`` shows the traceback.
    """
    if arguments is None:
        restart_in_utf8_mode()
    die_with_launcher()
    try:
        return _main(list(sys.argv[1:] if arguments is None else arguments))
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return READER_GONE
    except KeyboardInterrupt:
        print("moe-pretrain: interrupted", file=sys.stderr)
        return INTERRUPTED


def _main(words: list[str]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A log file has each line at once, and loses none to a kill. What it cannot hold (PYTHONIOENCODING=ascii, a
        # name that is not UTF-8) is written as \xe9: a run does not die of its own progress line.
        sys.stdout.reconfigure(line_buffering=True)
        with contextlib.suppress(OSError):  # a stream that was a file and is a pipe now: it asks for its place in it
            sys.stdout.reconfigure(errors="backslashreplace")
    if isinstance(sys.stderr, io.TextIOWrapper) and sys.stderr is sys.__stderr__:
        # Ranks share it: without this, as under PYTHONUNBUFFERED, the end of a line is a write of its own, and another
        # rank's line comes before it.
        sys.stderr.reconfigure(line_buffering=True, write_through=False)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if words[:1] == ["--version"]:
        print(f"moe-pretrain {importlib.metadata.version('moe_pretrain')}")
        return 0
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else USAGE_CODE
    if words[0] not in COMMANDS:
        from moe_pretrain.config.validate import suggest  # not for every start

        print(f"moe-pretrain: {words[0]!r} is no command{suggest(words[0], set(COMMANDS))}", file=sys.stderr)
        return USAGE_CODE
    let_segments_grow()
    # DeepSpeed reports its settings while it is imported and built; the user sees our progress instead.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)
    is_run = words[0] == "train" and not {"-m", "--multirun"} & set(words)
    try:
        with ending_early_on_signals() if is_run else contextlib.nullcontext():
            return _run(words[0], words[1:])
    except Exception as error:
        from moe_pretrain.commands.errors import code_of, describe  # imports the packages whose errors it knows

        code = code_of(error)
        if debug or code is None:
            raise
        print(f"moe-pretrain {words[0]}: {describe(error)}", file=sys.stderr)
        return code


def _reader_is_gone() -> bool:
    """Whether it was our own output that broke, as under ``| head``, and not a pipe to another process."""
    outputs = select.poll()
    for descriptor in (1, 2):
        outputs.register(descriptor, 0)
    gone = [descriptor for descriptor, event in outputs.poll(0) if event & select.POLLERR]
    for descriptor in gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)  # the interpreter flushes once more at its end
    return bool(gone)


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
