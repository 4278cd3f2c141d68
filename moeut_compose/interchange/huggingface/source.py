"""Our own source, read: modules, the statements at their top, and what each name in them means."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

HERE = "moeut_compose.interchange.huggingface"
PACKAGES = ("moeut_compose", "moeut_kernels")
STAND_INS = {
    "pydantic": f"{HERE}.plain_data",
    "moeut_kernels.backend": f"{HERE}.plain_backend",
    "torch.utils.flop_counter": f"{HERE}.plain_operators",
}
"""Modules whose names are taken from another one."""
CHAINS = {
    "torch.library.custom_op": (f"{HERE}.plain_operators", "custom_op"),
    "torch.ops.moeut": (f"{HERE}.plain_operators", "OPERATORS"),
}
"""Dotted expressions that become names."""
NEIGHBOURS = {f"{HERE}.configuration": "configuration_moeut_compose"}
"""Modules that lie beside the modelling file, and the names of their files."""

Symbol = tuple[str, str]
"""A module and a name that it defines."""

Mention = tuple[ast.expr, Symbol]
"""An expression, and the definition that it stands for."""


@dataclass(eq=False)
class Statement:
    """One statement at the top of a module."""

    module: Module
    node: ast.stmt
    names: tuple[str, ...]
    """What it defines."""
    last: ast.stmt
    """The statement itself, or the string below it that describes it."""

    @property
    def receiver(self) -> str | None:
        """X where the statement is nothing but a call `X.method(...)`, or a function decorated with one."""
        calls: list[ast.expr] = [self.node.value] if isinstance(self.node, ast.Expr) else []
        if isinstance(self.node, ast.FunctionDef) and self.node.name == "_":
            calls = self.node.decorator_list
        for call in calls:
            called = call.func if isinstance(call, ast.Call) else call
            if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
                return called.value.id
        return None


@dataclass(eq=False)
class Module:
    """A parsed source file."""

    name: str
    text: str
    statements: list[Statement] = field(default_factory=list)
    imported: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    """Local names from our own packages: module, and the name there unless the module itself is meant."""
    external: dict[str, str] = field(default_factory=dict)
    """Local names from other packages, with the statement that imports each."""
    operators: dict[str, str] = field(default_factory=dict)
    """Registered operators, with the name that stands for each here."""

    @property
    def stem(self) -> str:
        return self.name.rpartition(".")[2]

    def definition(self, name: str) -> Statement | None:
        return next((statement for statement in self.statements if name in statement.names), None)

    def take(self, node: ast.stmt) -> None:
        """Note what a statement at the top imports or defines."""
        match node:
            case ast.Import(names=names):
                for alias in names:
                    self._import(alias.asname or alias.name, alias.name, None, ast.unparse(node))
            case ast.ImportFrom(module=str(origin), names=names):
                for alias in names:
                    line = ast.unparse(ast.ImportFrom(origin, [alias], 0))
                    self._import(alias.asname or alias.name, origin, alias.name, line)
            case ast.Expr(value=ast.Constant()):
                if self.statements:
                    self.statements[-1].last = node
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                pass
            case _ if not is_left_out(node):
                self._define(node)

    def _define(self, node: ast.stmt) -> None:
        names = tuple(_bound(node))
        self.statements.append(Statement(self, node, names, node))
        for part in ast.walk(node) if names else ():
            if isinstance(part, ast.Constant) and str(part.value).startswith("moeut::"):
                self.operators[str(part.value).removeprefix("moeut::")] = names[0]

    def _import(self, local: str, origin: str, name: str | None, line: str) -> None:
        origin = STAND_INS.get(origin, origin)
        if origin in NEIGHBOURS:
            self.external[local] = f"from .{NEIGHBOURS[origin]} import {name}"
        elif origin.partition(".")[0] not in PACKAGES:
            self.external[local] = line
        else:
            self.imported[local] = (origin, name)

    def target(self, local: str) -> tuple[str, str | None]:
        """What an imported name means: a definition, or without a name a module."""
        origin, name = self.imported[local]
        if name is not None and is_module(origin, name):
            return f"{origin}.{name}", None
        return origin, name

    def mentions(self, node: ast.AST) -> Iterator[Mention]:
        """Every expression in `node` that stands for a definition of ours."""
        found = self._meaning(node)
        if found is not None:
            yield found
        elif not is_left_out(node):
            for child in ast.iter_child_nodes(node):
                yield from self.mentions(child)

    def _meaning(self, node: ast.AST) -> Mention | None:
        match node:
            case ast.Name(id=name):
                if name in self.imported:
                    origin, attribute = self.target(name)
                    return None if attribute is None else (node, home(origin, attribute))
                if self.definition(name):
                    return node, (self.name, name)
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name in self.imported:
                origin, outer = self.target(name)
                return None if outer is not None else (node, (origin, attribute))
            case ast.Attribute():
                symbol = CHAINS.get(ast.unparse(node))
                return None if symbol is None else (node, symbol)
        return None


@cache
def read(name: str) -> Module:
    """The module of this name. Raises ValueError where it has no source file."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ValueError(f"the source of {name} is not installed, and an export is made from it")
    module = Module(name, Path(spec.origin).read_text(encoding="utf-8"))
    for node in ast.parse(module.text).body:
        module.take(node)
    return module


@cache
def is_module(package: str, name: str) -> bool:
    """Whether `from package import name` means a module."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return False
    given = read(package)
    return name not in given.imported and not given.definition(name) and bool(find_spec(f"{package}.{name}"))


def home(module: str, name: str) -> Symbol:
    """Where a name is defined, through the packages that pass it on."""
    if name not in read(module).imported:
        return module, name
    origin, passed = read(module).target(name)
    assert passed is not None
    return home(origin, passed)


def is_left_out(node: ast.AST) -> bool:
    """What exported code has no use for: the way to Triton, and shapes of operators that are registered nowhere."""
    match node:
        case ast.If(test=ast.Compare(ops=[ast.Eq()], comparators=[ast.Constant(value="triton")]), orelse=[]):
            return True
        case ast.Expr(value=ast.Call(func=ast.Attribute(attr="register_fake"))):
            return True
        case ast.FunctionDef(decorator_list=[ast.Attribute(attr="register_fake")]):
            return True
    return False


def _bound(node: ast.stmt) -> Iterator[str]:
    """The names that a statement defines for its module."""
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            if name != "_":
                yield name
        case ast.Assign(targets=targets):
            yield from (
                part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)
            )
        case ast.AnnAssign(target=ast.Name(id=name)):
            yield name
