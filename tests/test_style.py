"""How the code looks: formatted, short, without what nobody uses, readable in one direction."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPT = ROOT / "train_mdlm.py"
TREE = ast.parse(SCRIPT.read_text(encoding="utf-8"))
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
MOST_BYTES = 150_000
MOST_COLUMNS = 100
MOST_LINES = 60  # of a function


@pytest.mark.parametrize("command", [["format", "--check"], ["check"]], ids=" ".join)
def test_the_whole_project_is_formatted_and_without_findings(command):
    ruff = [sys.executable, "-m", "ruff", *command, "--quiet", "--no-cache", "."]
    done = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr


def test_the_script_is_not_too_long_or_too_wide():
    source = SCRIPT.read_text(encoding="utf-8")
    assert len(source.encode()) <= MOST_BYTES
    wide = {n: line for n, line in enumerate(source.splitlines(), 1) if len(line) > MOST_COLUMNS}
    assert not wide
    functions = [node for node in ast.walk(TREE) if isinstance(node, FUNCTION)]
    lengths = [(node.end_lineno - node.lineno + 1, node.name) for node in functions]
    assert max(lengths) <= (MOST_LINES, "~")


# ---- Definitions


def names_bound_by(statement) -> list[str]:
    """What a statement at the top of a file defines."""
    if isinstance(statement, (*FUNCTION, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [(alias.asname or alias.name).split(".")[0] for alias in statement.names]
    stored = (node for node in ast.walk(statement) if isinstance(node, ast.Name))
    return [node.id for node in stored if isinstance(node.ctx, ast.Store)]


def definitions() -> dict[str, list[ast.stmt]]:
    """The statements that define each name of the script, without those under `if __name__`."""
    found: dict[str, list[ast.stmt]] = {}
    for statement in TREE.body:
        if not isinstance(statement, ast.If):
            for name in names_bound_by(statement):
                found.setdefault(name, []).append(statement)
    return found


def names_used_in(node) -> set[str]:
    """Names that are read, and attributes of anything."""
    used = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load):
            used.add(part.id)
        elif isinstance(part, ast.Attribute):
            used.add(part.attr)
        elif isinstance(part, ast.ImportFrom) and part.module == "train_mdlm":
            used.update(alias.name for alias in part.names)
    return used


def other_files() -> list[Path]:
    folders = ("tools", "data", "tests")
    paths = (path for folder in folders for path in (ROOT / folder).glob("*.py"))
    return [path for path in paths if path.name != Path(__file__).name]


def test_every_definition_is_used():
    """Somewhere else than in itself: in the script, in a tool, or at least in a test."""
    elsewhere = set()
    for path in other_files():
        elsewhere |= names_used_in(ast.parse(path.read_text(encoding="utf-8")))
    uses = [(statement, names_used_in(statement)) for statement in TREE.body]
    unused = [
        name
        for name, own in definitions().items()
        if name not in elsewhere
        and not any(name in used for statement, used in uses if statement not in own)
    ]
    assert [name for name in unused if name != "annotations"] == []


def test_every_method_and_field_is_used():
    elsewhere = names_used_in(TREE)
    for path in other_files():
        elsewhere |= names_used_in(ast.parse(path.read_text(encoding="utf-8")))
    framework = {"forward"}  # PyTorch calls it
    for statement in TREE.body:
        if isinstance(statement, ast.ClassDef) and statement.name != "Hyperparameters":
            members = {name for part in statement.body for name in names_bound_by(part)}
            members = {name for name in members if not name.startswith("__")}
            assert members <= elsewhere | framework, statement.name


class References(ast.NodeVisitor):
    """The names that a definition needs when it runs: all but annotations and its own variables."""

    def __init__(self):
        self.names: set[str] = set()

    def visit_function(self, node):
        inner = References()
        for part in (*node.args.defaults, *node.args.kw_defaults):
            if part:
                self.visit(part)
        for part in node.decorator_list if isinstance(node, FUNCTION) else ():
            self.visit(part)
        body = node.body if isinstance(node.body, list) else [node.body]
        for part in body:
            inner.visit(part)
        own = {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
        for part in body:
            own.update(names_bound_by(part))
        self.names |= inner.names - own

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = visit_function

    def visit_AnnAssign(self, node):
        if node.value:
            self.visit(node.value)

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Load):
            self.names.add(node.id)


def test_no_definition_goes_round_in_a_circle():
    """So it can be read in one direction: what a definition needs never needs that definition.

    A class is one definition, and so is a table with all that its rows name. That what runs while
    the file is imported is defined above it, importing the file shows.
    """
    found = definitions()
    graph = {}
    for name, statements in found.items():
        references = References()
        for statement in statements:
            references.visit(statement)
        graph[name] = (references.names & found.keys()) - {name}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" → ".join(error.args[1]))
