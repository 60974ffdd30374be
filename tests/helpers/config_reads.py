"""Which fields of configuration dataclasses the code reads, by the type of what they are read from.

Names alone do not tell: a third of the fields share theirs with a field of another class, or with something else. So
the types of expressions are followed through annotations, assignments and calls, as far as that is simple.
"""

import ast
import contextlib
import dataclasses
import functools
import importlib
import inspect
import sys
import sysconfig
import typing
from collections.abc import Collection, Hashable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

_OTHERS = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
Types = frozenset[Any]
NOTHING: Types = frozenset()


def classes_of(annotation: object) -> Types:
    """Classes that a value of this annotation may have, variants of a dataclass included; containers stay."""
    if annotation is None or isinstance(annotation, str):
        return NOTHING
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return classes_of(arguments[0])
    if origin is typing.Union or type(annotation).__name__ == "UnionType":
        return frozenset().union(*map(classes_of, arguments))
    if origin is type:
        return NOTHING
    if origin is not None:
        return frozenset([annotation])
    if inspect.isclass(annotation):
        return frozenset([annotation, *_below(annotation)] if dataclasses.is_dataclass(annotation) else [annotation])
    return NOTHING


def _below(kind: type) -> Iterable[type]:
    for child in kind.__subclasses__():
        yield child
        yield from _below(child)


class Reads:
    """Fields that the functions of some modules read.

    Args:
        modules: Where to look.
        fields: Names of the fields.

    Attributes:
        found: Pairs of a class and a field's name.
    """

    def __init__(self, modules: Iterable[ModuleType], fields: Collection[str]):
        self.found: set[tuple[type, str]] = set()
        self._fields = fields
        for module in modules:
            self._module = module
            self._visit(_tree(module).body, None, {})

    def is_read(self, owner: type, field: str) -> bool:
        """Whether the field is read from this class, one that it comes from, or one that comes from it."""
        return any(name == field and (owner in kind.__mro__ or kind in owner.__mro__) for kind, name in self.found)

    def _visit(self, body: Iterable[ast.stmt], owner: type | None, outer: Mapping[str, Types]) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                own = getattr(self._module, node.name, None)
                self._visit(node.body, own if inspect.isclass(own) else None, outer)
            elif isinstance(node, ast.FunctionDef):
                # __post_init__ only checks; a field read nowhere else has no effect.
                if node.name not in ("__post_init__", "check_num_experts"):
                    self._function(node, owner, outer)
            elif hasattr(node, "body") and not isinstance(node, ast.ClassDef):
                self._visit(node.body, owner, outer)  # type: ignore[attr-defined]

    def _function(self, node: ast.FunctionDef, owner: type | None, outer: Mapping[str, Types]) -> None:
        inside = list(ast.walk(node))
        reads = [
            child
            for child in inside
            if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Load) and child.attr in self._fields
        ]
        if not reads:
            return
        names = dict(outer)
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        for argument in arguments:
            names[argument.arg] = self._annotation(argument.annotation)
        is_static = any(isinstance(one, ast.Name) and one.id == "staticmethod" for one in node.decorator_list)
        if owner is not None and arguments and not is_static:
            names[arguments[0].arg] = frozenset([owner])
        nested = [child for child in inside if child is not node and isinstance(child, ast.FunctionDef | ast.Lambda)]
        for _ in range(2):  # a name may be used above the line that tells its type, in a loop
            for child in inside:
                self._learn(child, names)
        for child in nested:
            for argument in child.args.args:
                annotation = self._annotation(argument.annotation)
                if annotation:
                    names[argument.arg] = annotation
        for child in reads:
            types = self._type(child.value, names)
            self.found |= {(kind, child.attr) for kind in types if inspect.isclass(kind)}

    def _learn(self, node: ast.AST, names: dict[str, Types]) -> None:
        """Types of names that a statement assigns."""
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._assign(target, node.value, names)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names[node.target.id] = self._annotation(node.annotation)
        elif isinstance(node, ast.NamedExpr):
            self._assign(node.target, node.value, names)
        elif isinstance(node, ast.For | ast.comprehension):
            self._unpack(node.target, self._elements(node.iter, names), names)
        elif isinstance(node, ast.withitem) and isinstance(node.optional_vars, ast.Name):
            names.setdefault(node.optional_vars.id, self._type(node.context_expr, names))

    def _assign(self, target: ast.expr, value: ast.expr, names: dict[str, Types]) -> None:
        if isinstance(target, ast.Name):
            names[target.id] = self._type(value, names) | names.get(target.id, NOTHING)
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, its in zip(target.elts, value.elts, strict=False):
                self._assign(one, its, names)

    def _unpack(self, target: ast.expr, types: list[Types], names: dict[str, Types]) -> None:
        if isinstance(target, ast.Name) and len(types) == 1:
            names[target.id] = types[0] | names.get(target.id, NOTHING)
        elif isinstance(target, ast.Tuple) and len(types) == len(target.elts):
            for one, its in zip(target.elts, types, strict=True):
                self._unpack(one, [its], names)

    def _elements(self, node: ast.expr, names: Mapping[str, Types]) -> list[Types]:
        """Types of what an iteration yields, of each part of it."""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            if node.func.id == "enumerate":
                return [NOTHING, *self._elements(node.args[0], names)]
            if node.func.id in ("sorted", "reversed", "list", "tuple"):
                return self._elements(node.args[0], names)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.args:
            inner = [typing.get_args(kind) for kind in self._type(node.func.value, names)]
            pairs = [arguments for arguments in inner if len(arguments) == 2]
            if pairs and node.func.attr in ("items", "values"):
                keys_and_values = [classes_of(pairs[0][0]), classes_of(pairs[0][1])]
                return keys_and_values if node.func.attr == "items" else keys_and_values[1:]
        inner = [typing.get_args(kind) for kind in self._type(node, names)]
        return [frozenset().union(*(classes_of(arguments[0]) for arguments in inner if arguments))]

    def _type(self, node: ast.expr, names: Mapping[str, Types]) -> Types:
        if isinstance(node, ast.Name):
            return names.get(node.id, NOTHING) or self._of_global(node.id)
        if isinstance(node, ast.Attribute):
            return frozenset().union(*(attribute_types(kind, node.attr) for kind in self._type(node.value, names)))
        if isinstance(node, ast.IfExp):
            return self._type(node.body, names) | self._type(node.orelse, names)
        if isinstance(node, ast.BoolOp):
            return frozenset().union(*(self._type(value, names) for value in node.values))
        if isinstance(node, ast.Subscript):
            inner = [typing.get_args(kind) for kind in self._type(node.value, names)]
            return frozenset().union(*(classes_of(arguments[-1]) for arguments in inner if arguments))
        if isinstance(node, ast.Call):
            return self._result(node, names)
        return NOTHING

    def _of_global(self, name: str) -> Types:
        value = getattr(self._module, name, None)
        return frozenset([type(value)]) if dataclasses.is_dataclass(value) and not inspect.isclass(value) else NOTHING

    def _result(self, node: ast.Call, names: Mapping[str, Types]) -> Types:
        function: Any = None
        if isinstance(node.func, ast.Name):
            function = getattr(self._module, node.func.id, None)
            if function is dataclasses.replace and node.args:
                return self._type(node.args[0], names)
        elif isinstance(node.func, ast.Attribute):
            if node.func.attr == "replace" and node.args and isinstance(node.func.value, ast.Name):
                return self._type(node.args[0], names)
            for kind in self._type(node.func.value, names):
                function = function or getattr(kind, node.func.attr, None)
            if function is None and isinstance(node.func.value, ast.Name):
                function = getattr(getattr(self._module, node.func.value.id, None), node.func.attr, None)
        if inspect.isclass(function):
            return frozenset([function])
        return classes_of(hints_of(function).get("return")) if inspect.isroutine(function) else NOTHING

    def _annotation(self, node: ast.expr | None) -> Types:
        if node is None:
            return NOTHING
        with contextlib.suppress(Exception):  # of a name that only the type checker sees
            return classes_of(eval(ast.unparse(node), vars(self._module)))
        return NOTHING


@functools.cache
def _hints_of(value: Any) -> dict[str, Any]:
    with contextlib.suppress(Exception):
        return typing.get_type_hints(value, include_extras=True)
    return {}


def hints_of(value: Any) -> dict[str, Any]:
    """Annotations of a function or class."""
    return _hints_of(value) if isinstance(value, Hashable) and type(value).__hash__ is not None else {}


def attribute_types(kind: Any, name: str) -> Types:
    """Classes of an attribute: a field, a property, or what a method assigns to it from an argument."""
    if not inspect.isclass(kind):
        return NOTHING
    hints = hints_of(kind)
    if name in hints:
        return classes_of(hints[name])
    member = inspect.getattr_static(kind, name, None)
    if isinstance(member, property | functools.cached_property):
        getter = member.fget if isinstance(member, property) else member.func
        return classes_of(hints_of(getter).get("return"))
    if name.startswith("__") or callable(member):
        return NOTHING
    found: Types = NOTHING
    for base in kind.__mro__:
        if _is_others(base):
            continue
        found |= _assigned(base).get(name, NOTHING)
    return found


def _is_others(kind: type) -> bool:
    return (getattr(sys.modules[kind.__module__], "__file__", None) or _OTHERS[0]).startswith(_OTHERS)


@functools.cache
def _tree(module: ModuleType) -> ast.Module:
    return ast.parse(inspect.getsource(module))


_ASSIGNED: dict[type, dict[str, Types]] = {}


def _assigned(kind: type) -> dict[str, Types]:
    """Types of ``self.NAME = value`` in a class's own methods."""
    if kind in _ASSIGNED:
        return _ASSIGNED[kind]
    reads = Reads([], ())
    reads._module = importlib.import_module(kind.__module__)
    found = _ASSIGNED[kind] = {}  # there already for a value that is made of an attribute
    for node in ast.walk(_tree(reads._module)):
        if not isinstance(node, ast.ClassDef) or node.name != kind.__name__:
            continue
        for function in (child for child in node.body if isinstance(child, ast.FunctionDef)):
            names = {argument.arg: reads._annotation(argument.annotation) for argument in function.args.args}
            if function.args.args:
                names[function.args.args[0].arg] = frozenset([kind])
            for statement in ast.walk(function):
                if isinstance(statement, ast.Assign):
                    for target in statement.targets:
                        pairs = [(target, statement.value)]
                        if isinstance(target, ast.Tuple) and isinstance(statement.value, ast.Tuple):
                            pairs = list(zip(target.elts, statement.value.elts, strict=False))
                        for one, value in pairs:
                            if isinstance(one, ast.Attribute):
                                found[one.attr] = found.get(one.attr, NOTHING) | reads._type(value, names)
                            elif isinstance(one, ast.Name):
                                names[one.id] = reads._type(value, names)
                elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Attribute):
                    found[statement.target.attr] = reads._annotation(statement.annotation)
    return found


def modules_below(folder: Path, package: str) -> list[ModuleType]:
    """All modules of a package."""
    names = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        names.append(".".join([package, *(part for part in parts if part != "__init__")]))
    return [importlib.import_module(name) for name in names if not name.endswith("__main__")]
