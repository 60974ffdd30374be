"""Assembly of one modelling file from the pieces that a model needs."""

import ast
import importlib
import pkgutil
import re
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_pretrain.huggingface.remote_code import routers

FILE = "modeling_moe_pretrain.py"
_HERE = Path(__file__).parent
_OURS = "moe_pretrain."
_HEADER = '''"""A decoder language model with {scheme}, as moe_pretrain trained it.

Self-contained: it needs torch and transformers alone. Routing is that of evaluation; nothing here trains a router.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""
'''


def schemes() -> dict[str, str]:
    """Piece in ``routers/`` of each scheme that has one, by the scheme's name."""
    names = [info.name for info in pkgutil.iter_modules(routers.__path__)]
    modules = {name: importlib.import_module(f"{routers.__name__}.{name}") for name in names}
    return {scheme: name for name, module in modules.items() for scheme in module.SCHEMES}


def assemble(
    wanted: Sequence[str], experts: Sequence[str] = ("swiglu",), combine: str = "sum", is_by_layer: bool = False
) -> str:
    """Source of the modelling file.

    Args:
        wanted: Names of the routing schemes; none for a model without routing.
        experts: Pieces in ``experts/``, those of networks first; none where they are merged.
        combine: Piece in ``combine/``; of no use to merged ones.
        is_by_layer: Whether each layer has settings of its own.
    """
    pieces_of = {name: f"routers/{schemes()[name]}" for name in wanted} or {"": "routers/top_k"}
    of_routers = list(dict.fromkeys(pieces_of.values()))
    of_experts = [f"experts/{name}" for name in experts]
    layer = [*of_experts, f"combine/{combine}", "mixture"] if experts else ["merged"]
    by_layer = ["by_layer"] if is_by_layer else []
    pieces = ("common", "dense", *of_routers, *by_layer, *layer, "decoder")
    texts = {piece: (_HERE / f"{piece}.py").read_text(encoding="utf-8") for piece in pieces}
    if by_layer:
        texts |= {piece: _with_own_names(texts[piece], piece) for piece in of_routers}
        classes = ", ".join(f'"{name}": {_prefix(piece)}Router' for name, piece in pieces_of.items())
        texts["by_layer"] = re.sub(r"ROUTERS: .*", f"ROUTERS: dict[str, Any] = {{{classes}}}", texts["by_layer"])
    unused = _unused(texts["common"], "\n".join(text for piece, text in texts.items() if piece != "common"))
    imports: dict[str, set[str]] = {}
    bodies = []
    for piece, text in texts.items():
        lines = text.splitlines()
        for node in reversed(ast.parse(text).body):
            if isinstance(node, ast.Import):
                imports.update({f"import {alias.name}": set() for alias in node.names})
            elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith(_OURS):
                imports.setdefault(f"from {node.module} import", set()).update(alias.name for alias in node.names)
            is_unused = piece == "common" and getattr(node, "name", "") in unused
            if is_unused or not _belongs(node):
                del lines[node.lineno - 1 : node.end_lineno]
        bodies.append(re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip())
    words = sorted(f"{start} {', '.join(sorted(names))}" if names else start for start, names in imports.items())
    of_torch = [word for word in words if word.split()[1].split(".")[0] in ("torch", "transformers")]
    standard = [word for word in words if word not in of_torch]
    scheme = f"routing scheme{'s' if len(wanted) > 1 else ''} {', '.join(wanted)}" if wanted else "no routing"
    head = _HEADER.format(scheme=scheme)
    top = "\n".join([head, *standard, "", *of_torch])
    return "\n\n\n".join([top, *bodies]) + "\n"


def model_class(source: str) -> Any:
    """The class of an assembled file; transformers' way to it would copy the file to the user's cache."""
    module = types.ModuleType(FILE.removesuffix(".py"))
    sys.modules[module.__name__] = module  # transformers looks a class's file up there
    try:
        exec(compile(source, FILE, "exec"), vars(module))
    finally:
        del sys.modules[module.__name__]
    return module.MoePretrainForCausalLM


def _prefix(piece: str) -> str:
    """A piece of a router in the name of its class: ``routers/top_k`` is ``TopK``."""
    return "".join(word.title() for word in piece.rpartition("/")[2].split("_"))


def _with_own_names(text: str, piece: str) -> str:
    """A piece whose classes and functions have names that no other piece has."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            own = _prefix(piece) if isinstance(node, ast.ClassDef) else f"_{piece.rpartition('/')[2]}_"
            text = re.sub(rf"\b{node.name}\b", f"{own}{node.name}", text)
    return text


def _unused(common: str, others: str) -> set[str]:
    """Functions and classes of ``common`` that neither ``others`` use nor those that are used."""
    definitions = [node for node in ast.parse(common).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    left = {node.name: ast.unparse(node) for node in definitions}
    while used := [name for name in left if re.search(rf"\b{name}[()]", others)]:
        others += "".join(left.pop(name) for name in used)
    return set(left)


def _belongs(node: ast.stmt) -> bool:
    """Whether a statement of a piece is part of the file: docstrings, imports and lists of schemes are not."""
    is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    is_list_of_schemes = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SCHEMES"
    return not (is_docstring or is_list_of_schemes or isinstance(node, ast.Import | ast.ImportFrom))
