"""``completion``: a script with which bash or zsh completes commands, options and choices."""

import argparse
import importlib

from moe_pretrain.cli import COMMANDS
from moe_pretrain.commands.options import Parser
from moe_pretrain.config.compose import choices

# A word of ours may hold "=", at which bash breaks words: it then wants only the part behind the last one.
_BASH = """shopt -s extglob
_moe_pretrain() {{
    local words
    read -ra words <<< "${{COMP_LINE:0:COMP_POINT}}"
    local word="${{COMP_LINE:0:COMP_POINT}}"
    word="${{word##* }}"
    local candidates="{commands}"
    if [[ ${{#words[@]}} -gt 2 || ( ${{#words[@]}} -eq 2 && -z $word ) ]]; then
        case "${{words[1]}}" in
{cases}
            *) candidates="" ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$candidates" -- "$word"))
    if [[ ${{#COMPREPLY[@]}} -eq 0 || "${{words[1]}}" != @({with_overrides}) ]]; then
        COMPREPLY+=($(compgen -f -- "${{word##*=}}"))
    fi
    [[ ${{#COMPREPLY[@]}} -eq 1 && $COMPREPLY == *= ]] && compopt -o nospace
    if [[ $word == *=* && $COMP_WORDBREAKS == *=* ]]; then
        COMPREPLY=("${{COMPREPLY[@]#${{word%=*}}=}}")
    fi
}}
complete -F _moe_pretrain moe-pretrain"""
_ZSH = """#compdef moe-pretrain
_moe_pretrain() {{
    local -a candidates
    candidates=({commands})
    if (( CURRENT > 2 )); then
        case "${{words[2]}}" in
{cases}
            *) candidates=() ;;
        esac
        candidates=(${{=candidates}})
        _files
    fi
    compadd -S '' -- ${{(M)candidates:#*=}}
    compadd -- ${{candidates:#*=}}
}}
compdef _moe_pretrain moe-pretrain"""


def arguments(parser: Parser) -> None:
    """The shell."""
    parser.add_argument("shell", choices=("bash", "zsh"), help="the shell that reads the script")
    parser.add_examples(
        "bash > ~/.local/share/bash-completion/completions/moe-pretrain",
        "zsh > ~/.moe-pretrain.zsh    (and `source ~/.moe-pretrain.zsh` behind compinit in ~/.zshrc)",
    )


def run(options: argparse.Namespace) -> int:
    """Print the script. It starts no Python, so completion is immediate; choices are those of this release."""
    groups = choices()
    overrides = [f"{group}=" for group in groups] + [f"{group}={name}" for group in groups for name in groups[group]]
    cases, with_overrides = [], []
    for name, (module, help_text) in COMMANDS.items():
        parser = Parser(name, help_text)
        importlib.import_module(f"moe_pretrain.commands.{module}").arguments(parser)
        words = parser.option_words() + (overrides if parser.takes_overrides else [])
        with_overrides += [name] if parser.takes_overrides else []
        cases.append(f'            {name}) candidates="{" ".join(words)}" ;;')
    script = _BASH if options.shell == "bash" else _ZSH
    print(script.format(commands=" ".join(COMMANDS), cases="\n".join(cases), with_overrides="|".join(with_overrides)))
    return 0
