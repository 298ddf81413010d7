#!/usr/bin/env python3
"""Judge the shape of micro_queue.py: does it still read top to bottom, like a short book?

    python3 .ci/shape.py                             # the table of its sections, and findings
    python3 .ci/shape.py --most 4000 other.py

A line counts that is neither blank nor a comment; docstrings count, for they are read too.
Findings: more lines than MOST; a function of more than LONGEST lines; a `_name` of somebody
else; a name that is used above the section that defines it, in code or in an annotation; a
list of contents in the docstring that is not the banners `# ---- Name ---...`, in order.
Names are those of the module: of attributes it is not known whose they are.

Exit code: 0 good; 1 findings, each one line; 2 usage.
"""
import argparse
import ast
import contextlib
import io
import os
import re
import statistics
import sys
import tokenize
from typing import Dict, FrozenSet, Iterable, Iterator, List, NamedTuple, Tuple, Union

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MOST = 4800                      # each line here is one too many for who reads it at night
LONGEST = 40                     # lines of a function: what a screen shows at once
OURS = ("self", "cls")           # whose private names one may touch
PUBLIC = ("_replace", "_asdict", "_fields", "_exit")     # of named tuples and os: API all the same
BANNER = re.compile(r"# -{4} (.+?) -{4,}")
CONTENTS = re.compile(r"^Contents: ([^.]*)\.", re.MULTILINE)
BEFORE = "(before the sections)"
Function = Union[ast.FunctionDef, ast.AsyncFunctionDef]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Finding = Tuple[int, str]        # line, text


class Section(NamedTuple):
    """A banner and what stands below it, up to the next one."""

    name: str
    number: int
    lines: FrozenSet[int]        # those that count
    functions: List[Function]
    statements: List[ast.stmt]   # of the module's level


class Source(NamedTuple):
    """A parsed file."""

    tree: ast.Module
    sections: List[Section]      # the first is what stands before the first banner


def read(path: str) -> Source:
    with tokenize.open(path) as file:
        text = file.read()
    tree, lines = ast.parse(text), text.splitlines()
    comments = [token for token in tokenize.generate_tokens(io.StringIO(text).readline)
                if token.type == tokenize.COMMENT and not token.line[:token.start[1]].strip()]
    whole = {number for number, line in enumerate(lines, 1) if line.strip()}
    whole -= {token.start[0] for token in comments}
    starts = [(1, BEFORE)]
    for token in comments:
        banner = BANNER.fullmatch(token.line.rstrip())
        if banner:
            starts.append((token.start[0], banner[1]))
    ends = [line for line, _ in starts[1:]] + [len(lines) + 1]
    functions = [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
    return Source(tree, [
        Section(name, number, frozenset(whole & set(range(start, end))),
                [node for node in functions if start <= node.lineno < end],
                [node for node in tree.body if start <= node.lineno < end])
        for number, ((start, name), end) in enumerate(zip(starts, ends))])


# ---- Numbers ------------------------------------------------------------------------------

def length(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def table(source: Source) -> Iterator[str]:
    """Yield one line a section, and the sum."""
    everything = Section("all", 0, frozenset().union(*(s.lines for s in source.sections)),
                         [f for s in source.sections for f in s.functions], [])
    yield f"{'section':<24}{'lines':>7}{'functions':>11}{'median':>8}{'longest':>9}"
    for section in [*source.sections, everything]:
        lengths = [length(function) for function in section.functions]
        middle = f"{statistics.median(lengths):g}" if lengths else "-"
        yield (f"{section.name:<24}{len(section.lines):>7,}{len(lengths):>11}{middle:>8}"
               f"{max(lengths, default=0) or '-':>9}")


def too_large(source: Source, most: int) -> Iterator[Finding]:
    count = sum(len(section.lines) for section in source.sections)
    if count > most:
        yield 1, f"{count:,} lines where {most:,} may be; say it shorter, or drop a feature"


def too_long(source: Source) -> Iterator[Finding]:
    for section in source.sections:
        for function in section.functions:
            if length(function) > LONGEST:
                yield function.lineno, (f"{function.name} has {length(function)} lines where "
                                        f"{LONGEST} may be; give a part of it a name of its own")


# ---- Names --------------------------------------------------------------------------------

def foreign(source: Source) -> Iterator[Finding]:
    """Yield where something reaches for the private name of something else."""
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_"):
            continue
        ours = isinstance(node.value, ast.Name) and node.value.id in OURS
        special = node.attr.startswith("__") and node.attr.endswith("__")
        if not (ours or special or node.attr in PUBLIC):
            yield node.lineno, (f"{ast.unparse(node)} is another object's private name; give it a "
                                "public one with a docstring, or move the method to its data")


Comprehension = Union[ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp]
SCOPES = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def bound(nodes: Iterable[ast.AST]) -> FrozenSet[str]:
    """Return the names that these statements bind in their own scope."""
    found, elsewhere, stack = set(), set(), list(nodes)
    while stack:
        node = stack.pop()
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            found.add(node.name)
            continue
        if isinstance(node, SCOPES):
            continue
        if isinstance(node, ast.Global):
            elsewhere.update(node.names)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            found.add(node.name)
        stack.extend(ast.iter_child_nodes(node))
    return frozenset(found - elsewhere)


class Lookups(ast.NodeVisitor):
    """The names that a statement looks up in the module: those that no scope of its own binds."""

    def __init__(self) -> None:
        self.found: List[Tuple[str, int]] = []           # name, line
        self._enclosing: FrozenSet[str] = frozenset()    # what functions see from here
        self._own: FrozenSet[str] = frozenset()          # a class's, which its methods do not see

    def _look(self, name: str, line: int) -> None:
        if name not in self._enclosing | self._own:
            self.found.append((name, line))

    def _within(self, names: FrozenSet[str], nodes: Iterable[ast.AST], *,
                own: FrozenSet[str] = frozenset()) -> None:
        before = self._enclosing, self._own
        self._enclosing, self._own = self._enclosing | names, own
        for node in nodes:
            self.visit(node)
        self._enclosing, self._own = before

    def annotation(self, node: ast.AST) -> None:
        """Visit a type; a string in it is one, too."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            with contextlib.suppress(SyntaxError):       # a text after all
                for part in ast.walk(ast.parse(node.value.strip(), mode="eval")):
                    if isinstance(part, ast.Name):
                        self._look(part.id, node.lineno)
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("Literal"):
            self.visit(node.value)
        elif isinstance(node, ast.Name):
            self._look(node.id, node.lineno)
        else:
            for child in ast.iter_child_nodes(node):
                self.annotation(child)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self._look(node.id, node.lineno)

    def visit_Call(self, node: ast.Call) -> None:
        if ast.unparse(node.func).split(".")[-1] == "cast" and node.args:
            self.annotation(node.args[0])
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.annotation(node.annotation)
        for part in (node.target, node.value):
            if part is not None:
                self.visit(part)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for part in (*node.decorator_list, *node.bases, *node.keywords):
            self.visit(part)
        self._within(frozenset(), node.body, own=bound(node.body))

    def visit_FunctionDef(self, node: Function) -> None:
        for part in node.decorator_list:
            self.visit(part)
        if node.returns is not None:
            self.annotation(node.returns)
        self._within(self._arguments(node.args) | bound(node.body), node.body)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._within(self._arguments(node.args), [node.body])

    def _arguments(self, arguments: ast.arguments) -> FrozenSet[str]:
        """Visit what stands around the parameters of a function; return their names."""
        for default in (*arguments.defaults, *filter(None, arguments.kw_defaults)):
            self.visit(default)
        found = [node for node in ast.walk(arguments) if isinstance(node, ast.arg)]
        for argument in found:
            if argument.annotation is not None:
                self.annotation(argument.annotation)
        return frozenset(argument.arg for argument in found)

    def _visit_comprehension(self, node: Comprehension) -> None:
        targets = [part.target for part in node.generators]
        # What it loops over first may be a class's own name, and is taken for one throughout.
        self._within(bound(targets), ast.iter_child_nodes(node), own=self._own)

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _visit_comprehension


def is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def lookups(node: ast.stmt) -> List[Tuple[str, int]]:
    found = Lookups()
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
        found.annotation(node.value)                     # an alias of a type
    found.visit(node)
    return found.found


def upward(source: Source) -> Iterator[Finding]:
    """Yield where a section uses what stands below it."""
    home: Dict[str, Section] = {}
    for section in source.sections:
        for name in bound(section.statements):
            home.setdefault(name, section)
    for section in source.sections:
        for node in section.statements:
            for name, line in lookups(node) if not is_main_guard(node) else ():
                if name in home and home[name].number > section.number:
                    yield line, (f"{section.name} uses {name}, which stands below it in "
                                 f"{home[name].name}; hand it in, or move one of them")


def contents(source: Source) -> Iterator[Finding]:
    """Yield where the docstring's list of sections is not the sections."""
    docstring = ast.get_docstring(source.tree, clean=False) or ""
    found = CONTENTS.search(docstring)
    line = source.tree.body[0].lineno + docstring[:found.start() if found else 0].count("\n")
    listed = [" ".join(name.split()) for name in found[1].split(",")] if found else []
    names = [section.name for section in source.sections[1:]]
    if listed != names:
        yield line, f"the docstring lists other sections; write: Contents: {', '.join(names)}."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", default=os.path.join(ROOT, "micro_queue.py"))
    parser.add_argument("--most", type=int, default=MOST, help=f"lines, by default {MOST:,}")
    arguments = parser.parse_args()
    source = read(arguments.file)
    print(*table(source), sep="\n")
    findings = sorted({*too_large(source, arguments.most), *too_long(source), *foreign(source),
                       *upward(source), *contents(source)})
    for line, text in findings:
        print(f"{os.path.basename(arguments.file)}:{line}: {text}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
