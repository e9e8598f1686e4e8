"""Mutants: small faults in the source, one at a time, each of which some test should notice.

An operator, a comparison, a constant, a condition or a call that only acts is changed in the text itself, so
that all other lines stay as they are. Left out is what no test need notice: messages and annotations.
"""

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
UNTESTED = (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Assert)
"""Messages and imports; nothing in them is changed."""


@dataclass(frozen=True)
class Mutant:
    """One change of a file."""

    file: str
    """Path below the root."""
    line: int
    before: str
    after: str
    begin: int
    """Where the changed text begins and ends in the file, in bytes."""
    end: int

    @property
    def name(self) -> str:
        """Identifies it, as long as the file stays as it is."""
        return f"{self.file}:{self.line}:{self.begin}: {self.before} -> {self.after}"

    def applied_to(self, source: bytes) -> bytes:
        """Returns the file with the change."""
        return source[: self.begin] + self.after.encode() + source[self.end :]


def mutants_of(file: Path, root: Path) -> list[Mutant]:
    """Returns all mutants of a file, in the order of its text."""
    source = file.read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node, changed in _changes(ast.parse(source)):
        assert node.end_lineno is not None and node.end_col_offset is not None, "it comes from a text"
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        after = "pass" if changed is None else f"({ast.unparse(changed)})"
        if isinstance(changed, ast.stmt):
            after = ast.unparse(changed)
        before = " ".join(source[begin:end].decode().split())
        found.append(Mutant(str(file.relative_to(root)), node.lineno, before, after, begin, end))
    return sorted(found, key=lambda mutant: (mutant.begin, mutant.end, mutant.after))


def _changes(tree: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, ast.expr | ast.stmt | None]]:
    """Yields nodes of a tree, each with what may stand in its place; None: nothing."""
    for child in _tested(tree):
        if isinstance(child, ast.expr | ast.stmt):
            for changed in _changed(child):
                yield child, changed
        yield from _changes(child)


def _tested(node: ast.AST) -> Iterator[ast.AST]:
    """Yields the parts of a node that a test may notice."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_comment"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, UNTESTED) and not _is_text(child):
                yield child


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _changed(node: ast.expr | ast.stmt) -> Iterator[ast.expr | ast.stmt | None]:
    match node:
        case ast.Compare(ops=[first, *_]) if type(first) in COMPARISONS:
            yield _with(node, ops=[COMPARISONS[type(first)](), *node.ops[1:]])
        case ast.BinOp() | ast.AugAssign() if type(node.op) in OPERATORS:
            yield _with(node, op=OPERATORS[type(node.op)]())
        case ast.BoolOp():
            yield _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int() | float() as number):
            yield ast.Constant(number + 1)
        case ast.Call(func=ast.Name(id=name)) if name in NAMES:
            yield _with(node, func=ast.Name(NAMES[name]))
        case ast.IfExp():
            yield _with(node, body=node.orelse, orelse=node.body)
        case ast.Expr(value=ast.Call()):
            yield None


def _with(node: ast.expr | ast.stmt, **fields: object) -> ast.expr | ast.stmt:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed
