"""Options of commands: argparse with errors of one line, and those that every command with overrides takes."""

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from moe_pretrain.config.compose import choices, folder_override, show_config, show_info
from moe_pretrain.config.load import in_hydras_words

_WIDTH = 100
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are a ``ValueError`` of one line.

    Attributes:
        takes_overrides: Whether the words that are no options are Hydra overrides.
    """

    def __init__(self, name: str, description: str):
        super().__init__(
            prog=f"moe-pretrain {name}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=False,
            allow_abbrev=False,  # an abbreviation would change its meaning when an option is added
        )
        self.add_argument("-h", "--help", action="store_true", help="show this help and exit")
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")
        self.takes_overrides = False
        self._examples: tuple[str, ...] = ()

    def add_overrides(self, help_text: str = "Hydra overrides, GROUP=CHOICE or FIELD=VALUE") -> None:
        """Take Hydra overrides, and Hydra's own options to look at a configuration."""
        self.takes_overrides = True
        self.add_argument("overrides", nargs="*", default=[], metavar="OVERRIDE", help=help_text)
        self.add_argument("--cfg", choices=("job", "hydra", "all"), help="print the configuration and exit")
        self.add_argument("--resolve", action="store_true", help="with --cfg: print values instead of ${...}")
        self.add_argument("--info", nargs="?", const="all", choices=_INFO, help="print how it is composed and exit")
        self.add_argument(
            *("--config-dir", "-cd"),
            metavar="DIR",
            type=Path,
            help="YAML files of your own beside the shipped ones: DIR/model/NAME.yaml, DIR/experiment/NAME.yaml",
        )

    def add_examples(self, *examples: str) -> None:
        """Show command lines at the end of the help, without the leading ``moe-pretrain COMMAND``."""
        self._examples = examples

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """The options in ``words``, which may stand before, between and after other words.

        Raises:
            ValueError: An option is unknown, lacks its value or has a wrong one; one line.
        """
        if "--help" in words or "-h" in words:
            return argparse.Namespace(help=True)
        return self.parse_intermixed_args(list(words))

    def help_text(self, words: Sequence[str]) -> str:
        """The help; its groups with the choices of a ``--config-dir`` in ``words`` too."""
        parts = []
        if self.takes_overrides:
            folder = _config_dir(words)
            groups = choices([] if folder is None else [folder_override(folder)])
            parts.append("groups, each with its choices (GROUP=CHOICE):")
            for group, names in groups.items():
                lines = textwrap.wrap(" ".join(names), _WIDTH, break_on_hyphens=False, break_long_words=False)
                parts += [f"  {group if line is lines[0] else '':<11}{line}" for line in lines]
            parts.append("fields: FIELD=VALUE, as printed by --cfg job\n")
        parts.append("examples:")
        parts += [f"  {self.prog} {example}".rstrip() for example in self._examples]
        self.epilog = "\n".join(parts)
        return self.format_help()

    def option_words(self) -> list[str]:
        """The options, and the values of arguments that have choices."""
        words = [word for action in self._actions for word in action.option_strings if word.startswith("--")]
        return words + [
            str(one) for action in self._actions if not action.option_strings for one in action.choices or ()
        ]

    def error(self, message: str) -> NoReturn:
        """Raise the complaint instead of printing the usage and exiting."""
        raise ValueError(f"{message}; see {self.prog} --help")


def _config_dir(words: Sequence[str]) -> Path | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", type=Path)
    return parser.parse_known_args(list(words))[0].config_dir


def overrides_of(options: argparse.Namespace) -> list[str]:
    """The overrides, with ``--config-dir`` as one of them: workers, jobs and resumed runs get it like any other."""
    words = list(options.overrides)
    return words if options.config_dir is None else [folder_override(options.config_dir), *words]


def router_files(words: Sequence[str]) -> list[str]:
    """Words behind a folder of runs: python of their own routers that may be run.

    Raises:
        ValueError: Something else does.
    """
    if others := [word for word in words if not word.startswith("router_file=")]:
        raise ValueError(f"{others[0]}: beside a folder of runs only router_file=PATH may stand, which each may need")
    return list(words)


def shows(options: argparse.Namespace, overrides: Sequence[str]) -> bool:
    """Print the configuration or how it is composed if ``--cfg`` or ``--info`` asks for it; whether one did."""
    if options.resolve and not options.cfg:
        raise ValueError("--resolve needs --cfg job: it says how the configuration is printed")
    if options.cfg:
        show_config(in_hydras_words(overrides), options.cfg, options.resolve)
    if options.info:
        show_info(in_hydras_words(overrides), options.info)
    return bool(options.cfg or options.info)
