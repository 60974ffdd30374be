"""Docstrings say the noun or the verb first, and a class has one name in the whole package."""

import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUESTIONS = ("What", "Where", "How", "Which", "When", "Who", "Why", "Whose")


def _trees(*folders):
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


def test_a_docstring_begins_with_its_noun_or_verb():
    documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module
    docstrings = [
        (str(path), docstring)
        for path, tree in _trees("moe_pretrain", "scripts")
        for node in ast.walk(tree)
        if isinstance(node, documented) and (docstring := ast.get_docstring(node))
    ]
    assert len(docstrings) > 1000
    assert [entry for entry in docstrings if entry[1].split()[0].rstrip(",:") in QUESTIONS] == []


def test_no_two_public_classes_of_the_package_share_a_name():
    names = Counter(
        node.name
        for path, tree in _trees("moe_pretrain")
        for node in ast.walk(tree)
        # Pieces of a program of its own, each export's modelling file.
        if "remote_code" not in path.parts and isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert len(names) > 200 and [name for name, count in names.items() if count > 1] == []
