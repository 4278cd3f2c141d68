"""One file of Python out of this package's own source: what exported models run.

The modelling file of an export is no second implementation. It is cut from the modules that training uses,
beginning with `modeling.py`: every definition that is reached from there, in the order of imports and in its
own words. What those modules need of other packages is replaced by the small `plain_*` modules here. What no
exported model calls (counting, validation, Triton) is left out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache

from moeut_compose import __version__
from moeut_compose.interchange.huggingface.source import (
    HERE,
    PACKAGES,
    Mention,
    Module,
    Statement,
    Symbol,
    home,
    is_left_out,
    read,
)
from moeut_compose.interchange.huggingface.text import Lines, grouped, undefined_names

ROOT = f"{HERE}.modeling"
PRUNED = "moeut_compose.spec."
"""Modules whose classes keep only the methods that are called."""
OPTIONAL = "moeut_kernels"
"""The package that is used in place of the copied code where it is installed."""

HEADER = f'''"""Language models of moeut-compose {__version__} for `transformers`.

Written by `moeut-compose export`, out of the source that trained the model; changes belong there.
"""

from __future__ import annotations

'''


@cache
def modeling_source() -> str:
    """The text of `modeling_moeut_compose.py`, the same for every model."""
    bundle = Bundle(ROOT)
    text = bundle.render()
    undefined = sorted(undefined_names(text))
    if undefined:
        raise ValueError(f"the modelling file would use names that it lacks: {', '.join(undefined)}")
    return text


class Bundle:
    """The statements that a module reaches, and the names that they get in one file."""

    def __init__(self, root: str) -> None:
        self.kept: set[Statement] = set()
        self.attributes: set[str] = set()
        self.optional: set[str] = set()
        self._reach(root)
        self.modules = list(self._ordered(root, set()))
        self.names = self._names()

    def _reach(self, root: str) -> None:
        """Keep what the root needs, until nothing is added: a method found late may need more."""
        size = -1
        while size != len(self.kept) + len(self.attributes):
            size = len(self.kept) + len(self.attributes)
            waiting = [*self.kept, *read(root).statements]
            seen: set[Statement] = set()
            while waiting:
                statement = waiting.pop()
                if statement not in seen:
                    seen.add(statement)
                    waiting += self._needs(statement)
            self.kept = seen

    def _needs(self, statement: Statement) -> Iterator[Statement]:
        module = statement.module
        for _, (origin, name) in self._mentions(statement):
            if origin == OPTIONAL:
                self.optional.add(name)
            definition = read(home(origin, name)[0]).definition(home(origin, name)[1])
            if definition is not None:
                yield definition
        for part in self._nodes(statement):
            if isinstance(part, ast.Attribute):
                self.attributes.add(part.attr)
                if ast.unparse(part.value) == "torch.ops.moeut":
                    yield from self._operators(part.attr)
        for other in module.statements:  # what is done to a definition, or once for its module
            if not other.names and other.receiver in (None, *statement.names):
                yield other

    def _operators(self, name: str) -> Iterator[Statement]:
        """The statement that registers an operator."""
        for module in {statement.module for statement in self.kept}:
            definition = module.definition(module.operators.get(name, ""))
            if definition is not None:
                yield definition

    def _parts(self, statement: Statement) -> list[ast.AST]:
        """The statement, or what is left of a class with surplus methods."""
        surplus = set(self._surplus(statement))
        if not isinstance(statement.node, ast.ClassDef) or not surplus:
            return [statement.node]
        body = [node for node in statement.node.body if node not in surplus]
        return [*statement.node.bases, *statement.node.decorator_list, *body]

    def _nodes(self, statement: Statement) -> Iterator[ast.AST]:
        """Everything inside a statement but for what is left out."""
        waiting = self._parts(statement)
        while waiting:
            node = waiting.pop()
            yield node
            waiting += [child for child in ast.iter_child_nodes(node) if not is_left_out(child)]

    def _local_names(self, statement: Statement) -> set[str]:
        """Parameters and variables anywhere inside."""
        nodes = list(self._nodes(statement))
        stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        return stored | {node.arg for node in nodes if isinstance(node, ast.arg)}

    def _check_imports(self, statement: Statement) -> None:
        """Raises ValueError for an import of ours that would be left inside a function."""
        for node in self._nodes(statement):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None), *(alias.name for alias in node.names)]
                if any(str(name).partition(".")[0] in PACKAGES for name in names):
                    raise ValueError(f"{statement.module.name}: exported code cannot `{ast.unparse(node)}`")

    def _mentions(self, statement: Statement) -> Iterator[Mention]:
        for part in self._parts(statement):
            yield from statement.module.mentions(part)

    def _surplus(self, statement: Statement) -> Iterator[ast.FunctionDef]:
        """Methods of specs that nothing calls."""
        if isinstance(statement.node, ast.ClassDef) and statement.module.name.startswith(PRUNED):
            for node in statement.node.body:
                if isinstance(node, ast.FunctionDef) and node.name not in self.attributes:
                    yield node

    def _ordered(self, name: str, seen: set[str]) -> Iterator[Module]:
        """Modules after those whose definitions they use."""
        seen.add(name)
        statements = self._statements(read(name))
        used = {home(*symbol)[0] for statement in statements for _, symbol in self._mentions(statement)}
        for origin in sorted(used):
            if origin not in seen:
                yield from self._ordered(origin, seen)
        if statements:
            yield read(name)

    def _statements(self, module: Module) -> list[Statement]:
        return [statement for statement in module.statements if statement in self.kept]

    def _names(self) -> dict[Symbol, str]:
        """The name of every definition in the file: its own, unless an earlier module has another one of it."""
        names: dict[Symbol, str] = {}
        taken: dict[str, str] = {}
        for module in self.modules:
            for statement in self._statements(module):
                text = ast.unparse(statement.node)
                for name in statement.names:
                    is_free = taken.setdefault(name, text) == text
                    names[module.name, name] = name if is_free else f"{name}_of_{module.stem}"
        return names

    def render(self) -> str:
        """The file."""
        imports: set[str] = set()
        chunks: list[str] = []
        last_kernel = [module for module in self.modules if module.name.startswith(OPTIONAL)][-1:]
        for module in self.modules:
            chunks.append(f"# {module.name}")
            for statement in self._statements(module):
                used = (part.id for part in self._nodes(statement) if isinstance(part, ast.Name))
                imports |= {module.external[name] for name in used if name in module.external}
                self._check_imports(statement)
                text = self._text(statement)
                chunks += [] if text in chunks else [text]
            if module in last_kernel:
                chunks.append(self._optional_package())
                imports.add("from types import SimpleNamespace")
        given = [*(line.rpartition(" ")[2] for line in imports), *set(self.names.values())]
        twice = sorted({name for name in given if given.count(name) > 1})
        if twice:
            raise ValueError(f"names that mean two things: {', '.join(twice)}")
        return HEADER + grouped(imports) + "\n\n\n" + "\n\n\n".join(chunks) + "\n"

    def _optional_package(self) -> str:
        """The kernels by the name that modules import them under, from the package if it is installed."""
        pairs = ", ".join(f"{name}={self.names[home(OPTIONAL, name)]}" for name in sorted(self.optional))
        return f"try:\n    import {OPTIONAL} as mk\nexcept ImportError:\n    mk = SimpleNamespace({pairs})"

    def _text(self, statement: Statement) -> str:
        """The source of a statement, without what is left out, under the names of the file."""
        lines = Lines(statement.module.text)
        edits = [(*lines.whole(part, part), "") for part in self._surplus(statement)]
        inner = (part for part in ast.walk(statement.node) if isinstance(part, ast.stmt))
        edits += [(*lines.whole(part, part), "") for part in inner if is_left_out(part)]
        for expression, symbol in self._mentions(statement):
            if symbol[0] != OPTIONAL:
                name = self.names[home(*symbol)]
                if name != getattr(expression, "id", None) and name in self._local_names(statement):
                    raise ValueError(f"{statement.module.name}: {name} would mean a local variable")
                edits.append((*lines.span(expression), name))
        if isinstance(statement.node, ast.FunctionDef | ast.ClassDef) and statement.names:
            name = self.names[statement.module.name, statement.node.name]
            edits.append((*lines.name(statement.node), name))
        return lines.edited(*lines.whole(statement.node, statement.last), edits)
