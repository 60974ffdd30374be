"""Text is UTF-8 whatever the locale says: every call that reads or writes text names its encoding."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "moe_pretrain"


def unnamed(source: str) -> list[str]:
    """Calls that take the encoding of the locale."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        owner = getattr(function.value, "id", "") if isinstance(function, ast.Attribute) else ""
        modes = [*node.args[:2], *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
        modes = [mode.value for mode in modes if isinstance(mode, ast.Constant) and isinstance(mode.value, str)]
        if name in ("read_text", "write_text"):
            found.append(ast.unparse(node))
        elif name in ("open", "fdopen") and not any(set(mode) <= set("rwaxb+") and "b" in mode for mode in modes):
            # Methods of this name that open something else take no mode; gzip's reads bytes unless it is told to.
            is_method = isinstance(function, ast.Attribute) and name == "open"
            if owner != "os" and (modes or not is_method) or name == "fdopen":
                found.append(ast.unparse(node))
        elif any(keyword.arg in ("text", "universal_newlines") for keyword in node.keywords) and owner == "subprocess":
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_text_files_name_their_encoding(path: Path):
    assert unnamed(path.read_text(encoding="utf-8")) == []


def test_the_rule_sees_calls_without_an_encoding():
    bad = ["open(p)", "open(p, 'w')", "p.open('a')", "p.open(mode='r')", "p.read_text()", "p.write_text('x')"]
    bad += ["os.fdopen(3)", "subprocess.run(words, text=True)"]
    good = ["open(p, 'rb')", "p.open('wb')", "open(p, encoding='utf-8')", "stream.open(shards)", "os.open(p, flags)"]
    good += ["p.read_bytes()", "p.open('a+b', buffering=0)", "os.fdopen(3, 'rb')"]
    assert [unnamed(line) for line in bad] == [[line] for line in bad]
    assert [line for line in good if unnamed(line)] == []
