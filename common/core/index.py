"""What methods there are, read from the source text: `list`, `show` and a workflow's planning import no torch.

A method is a class of `methods/<slug>/method.py` that gives itself a `name`. Its role, options and docstring are those
that Python would find: from the class itself, else from its bases, wherever in this project these are defined.
"""

from __future__ import annotations

import ast
import builtins
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import annotated_types
import pydantic

from prunelab.common.core import options
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.files import ROOT

METHODS = ROOT / "methods"
PACKAGE = "prunelab"


@dataclass(frozen=True)
class Option:
    """A hyper-parameter. hint: its type, as `typing.get_type_hints` gives it, `Any` for a class of the project's.
    default: its repr, None where a value must be given."""

    name: str
    hint: Any
    default: str | None

    def __str__(self) -> str:
        return self.name + ("" if self.default is None else f" = {self.default}") + f": {options.words(self.hint)}"


@dataclass(frozen=True)
class Entry:
    """A method: its registry name, the class `class_name` of `methods/<slug>/method.py`, its role, docstring and
    options in the order of its fields."""

    name: str
    class_name: str
    slug: str
    role: str
    doc: str
    options: tuple[Option, ...]

    @property
    def module(self) -> str:
        """Where the class is imported from."""
        return f"{PACKAGE}.methods.{self.slug}.method"

    def __str__(self) -> str:
        options = "".join(f"\n  {option}" for option in self.options)
        return f"{self.name} ({self.role})\n\n{self.doc}" + (f"\n\noptions:{options}" if options else "")


@cache
def entries() -> Mapping[str, Entry]:
    """Every method by name. Raises PrunelabError where two share a name or a file cannot be read."""
    results: dict[str, Entry] = {}
    for path in sorted(METHODS.glob("*/method.py")):
        for entry in _read(path):
            if entry.name in results:
                raise PrunelabError(
                    f"two methods are named '{entry.name}': {results[entry.name].module} and {entry.module}; rename one"
                )
            results[entry.name] = entry
    return results


def _read(path: Path) -> Iterator[Entry]:
    module = _Module.of(path)
    for name, node in module.classes.items():
        if "name" not in _assigned(node):
            continue
        lineage = list(_lineage(module, node))
        role = next((_text(m, c, "role") for m, c in lineage if "role" in _assigned(c)), None)
        if role is not None:
            doc = ast.get_docstring(node) or next((d for _, c in lineage if (d := ast.get_docstring(c))), "")
            yield Entry(_text(module, node, "name"), name, path.parent.name, role, doc, _options(lineage))


class _Module:
    """One source file: its classes, its constants, and where the names that it imports come from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.classes: dict[str, ast.ClassDef] = {}
        self.constants: dict[str, ast.expr] = {}
        self.imports: dict[str, str] = {}
        for node in self._top(self._tree().body):
            if isinstance(node, ast.ClassDef):
                self.classes[node.name] = node
            elif isinstance(node, ast.Import):
                self.imports |= {alias.asname: alias.name for alias in node.names if alias.asname}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                self.imports |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                self.constants |= _targets(node)

    @staticmethod
    @cache
    def of(path: Path) -> _Module:
        """The file, read once."""
        return _Module(path)

    def _tree(self) -> ast.Module:
        try:
            return ast.parse(self.path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError) as error:
            line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
            reason = error.msg if isinstance(error, SyntaxError) else str(error)
            raise PrunelabError(f"{self.where}{line} is not valid Python: {reason}") from None

    def _top(self, body: list[ast.stmt]) -> Iterator[ast.stmt]:
        """Statements at the top level, those below `if` and `try` included."""
        for node in body:
            yield node
            if isinstance(node, ast.If | ast.Try):
                yield from self._top([*node.body, *node.orelse])

    @property
    def where(self) -> str:
        """The file, as errors name it."""
        return str(self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path)

    def absolute(self, name: str) -> str:
        """A name as its import wrote it."""
        first, _, rest = name.partition(".")
        return self.imports.get(first, first) + (f".{rest}" if rest else "")

    def find(self, name: str) -> tuple[_Module, str] | None:
        """The module that defines a name, and its name there; imports are followed, None where they leave the
        project."""
        if name.partition(".")[0] in self.imports:
            return _located(self.absolute(name))
        return (self, name) if name in self.classes or name in self.constants else None


def _located(dotted: str) -> tuple[_Module, str] | None:
    """The definition of `prunelab.<module>.<name>`."""
    package, _, name = dotted.rpartition(".")
    module = _module(package)
    return module.find(name) if module else None


def _module(package: str) -> _Module | None:
    """A module of this project; None where there is none of that name."""
    first, *parts = package.split(".")
    base = ROOT.joinpath(*parts)
    paths = (base.with_suffix(".py"), base / "__init__.py") if first == PACKAGE and parts else ()
    return next((_Module.of(path) for path in paths if path.is_file()), None)


def _lineage(module: _Module, node: ast.ClassDef) -> Iterator[tuple[_Module, ast.ClassDef]]:
    """The class and its bases in the order in which Python looks for an attribute (no diamonds are met here but those
    that end in the role's own base)."""
    yield module, node
    for base in node.bases:
        name = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
        defined = module.find(name)
        if defined is not None and defined[1] in defined[0].classes:
            yield from _lineage(defined[0], defined[0].classes[defined[1]])


def _targets(node: ast.stmt) -> dict[str, ast.expr]:
    """Names that a statement assigns, with what is assigned."""
    if isinstance(node, ast.Assign):
        return {target.id: node.value for target in node.targets if isinstance(target, ast.Name)}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
        return {node.target.id: node.value}
    return {}


def _assigned(node: ast.ClassDef) -> dict[str, ast.expr]:
    """Attributes that the body of a class assigns."""
    return {name: value for statement in node.body for name, value in _targets(statement).items()}


def _text(module: _Module, node: ast.ClassDef, attribute: str) -> str:
    value = _literal(module, _assigned(node)[attribute])
    if not isinstance(value, ast.Constant) or not isinstance(value.value, str):
        raise PrunelabError(
            f"{module.where}, line {node.lineno}: the {attribute} of {node.name} must be a literal string"
        )
    return value.value


def _literal(module: _Module, value: ast.expr) -> ast.expr:
    """The expression that a name of a constant stands for; any other expression as it is."""
    while isinstance(value, ast.Name | ast.Attribute):
        defined = module.find(ast.unparse(value))
        if defined is None or defined[1] not in defined[0].constants:
            break
        module, value = defined[0], defined[0].constants[defined[1]]
    return value


def _options(lineage: list[tuple[_Module, ast.ClassDef]]) -> tuple[Option, ...]:
    """The fields of a dataclass: those of its bases first, each in the place where it first stood."""
    results: dict[str, Option] = {}
    for module, node in reversed(lineage):
        if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            continue
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                kind = ast.unparse(statement.annotation).strip("'\"")
                if not kind.rpartition("typing.")[2].startswith("ClassVar"):
                    name = statement.target.id
                    results[name] = Option(name, _hint(module, statement.annotation), _default(module, statement.value))
    return tuple(results.values())


def _default(module: _Module, value: ast.expr | None) -> str | None:
    if isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] == "field":
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        if "default_factory" in given:
            return f"{ast.unparse(given['default_factory'])}()"
        value = given.get("default")
    if value is None:
        return None
    literal = _literal(module, value)
    if isinstance(literal, ast.BinOp) and isinstance(literal.op, ast.Div):  # such as 1 / 3
        return repr(ast.literal_eval(literal.left) / ast.literal_eval(literal.right))
    return ast.unparse(literal)


def _hint(module: _Module, node: ast.expr) -> Any:
    """The type that an annotation means; aliases are followed, `Any` where they lead to a class or out of what is
    known here."""
    if isinstance(node, ast.Constant):
        return type(None) if node.value is None else _hint(module, ast.parse(str(node.value), mode="eval").body)
    if isinstance(node, ast.Name | ast.Attribute):
        return _named(module, ast.unparse(node))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _hint(module, node.left) | _hint(module, node.right)
    if isinstance(node, ast.Subscript):
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        generic = _hint(module, node.value)
        if generic is Literal:
            return Literal[tuple(ast.literal_eval(part) for part in parts)]
        if generic is Annotated:
            return Annotated[(_hint(module, parts[0]), *(_made(part) for part in parts[1:]))]
        if generic is tuple:
            ends = [... if isinstance(p, ast.Constant) and p.value is ... else _hint(module, p) for p in parts]
            return tuple[tuple(ends)]  # type: ignore[misc]
    return Any


def _made(node: ast.expr) -> Any:
    """A bound, as `Interval(ge=0, le=1)`."""
    if not isinstance(node, ast.Call):
        return None
    values = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords if keyword.arg}
    return getattr(annotated_types, ast.unparse(node.func))(*map(ast.literal_eval, node.args), **values)


def _named(module: _Module, name: str) -> Any:
    defined = module.find(name)
    if defined is not None:
        home, own = defined
        return _hint(home, home.constants[own]) if own in home.constants else Any
    package, _, own = _outside(module, name).rpartition(".")
    known = {"": builtins, "typing": typing, "pydantic": pydantic}.get(package)
    return getattr(known, own, Any)


def _outside(module: _Module, name: str) -> str:
    """Where a name comes from that no file of this project defines."""
    dotted = module.absolute(name)
    while (home := _module(dotted.rpartition(".")[0])) is not None:
        own = dotted.rpartition(".")[2]
        if own not in home.imports:
            break
        dotted = home.imports[own]
    return dotted
