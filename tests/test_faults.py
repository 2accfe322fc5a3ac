"""The tests notice what they are there for: each fault of `faults.py` makes its tests fail.

The quick ones run with all other tests. All of them take some minutes:

    python -m pytest -m slow tests/test_faults.py
"""

import ast
import os
import re
import shutil
import sys
from collections import Counter

import faults
import pytest
from conftest import ROOT

FAULTS = faults.FAULTS
NOT_COPIED = ("datasets", "tokenizers", "logs", "records", "docs", ".*", "__pycache__", "sweeps")


def source_of(fault: faults.Fault) -> str:
    return (ROOT / fault.file).read_text(encoding="utf-8")


def functions_in(name: str) -> set[str]:
    """The test functions of a file in tests/."""
    tree = ast.parse((ROOT / "tests" / name).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


# ---- The list is in step with the code


def test_every_fault_can_be_made_and_is_one():
    """Its old text is in its file once, and becomes something else."""
    for fault in FAULTS:
        found = source_of(fault).count(fault.old)
        assert found == 1 and fault.old != fault.new, f"{fault.name}: {found} times"


def test_every_fault_has_a_name_and_tests_that_exist():
    names = Counter(fault.name for fault in FAULTS)
    assert max(names.values()) == 1, names.most_common(1)
    functions = {}
    for fault in FAULTS:
        assert fault.tests.split(), fault.name
        for test in fault.tests.split():
            name, _, function = test.partition("::")
            known = functions.setdefault(name, functions_in(name))
            assert function.partition("[")[0] in known, f"{fault.name}: {test}"


# ---- Faults that are made


def copy_of_the_project(folder):
    """All that the tests need."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_COPIED))


def forget_the_project():
    """What was imported from it will be imported from the copy; a virtual environment inside it
    stays."""
    folders = {str(ROOT / part) for part in (".", "data", "tools", "tests")}
    for name, module in list(sys.modules.items()):
        if os.path.dirname(getattr(module, "__file__", None) or "") in folders:
            del sys.modules[name]
    sys.path[:] = [path for path in sys.path if path not in folders]


def run_tests(folder, tests: list[str]) -> tuple[int, str]:
    """Exit status and output of pytest in a forked process, which has imported PyTorch already."""
    out = folder / "out.txt"
    child = os.fork()
    if not child:
        status = 99
        try:
            os.chdir(folder)
            descriptor = os.open(out, os.O_WRONLY | os.O_CREAT)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout = sys.stderr = open(descriptor, "w")  # noqa: SIM115
            forget_the_project()
            options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"]
            options += [f"--rootdir={folder}", f"--basetemp={folder / 'tmp'}", "-o", "addopts="]
            status = int(pytest.main([*options, *(f"tests/{test}" for test in tests)]))
        finally:
            sys.stdout.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, out.read_text(encoding="utf-8", errors="replace")


def parameter(fault):
    marks = [] if fault.quick else [pytest.mark.slow]
    return pytest.param(fault, id=re.sub(r"\W+", "-", fault.name), marks=marks)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_without_a_fault_the_same_tests_pass(tmp_path):
    copy_of_the_project(tmp_path / "copy")
    tests = sorted({test for fault in FAULTS for test in fault.tests.split()})
    status, output = run_tests(tmp_path / "copy", tests)
    assert status == pytest.ExitCode.OK, output[-5000:]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("fault", [parameter(fault) for fault in FAULTS])
def test_a_fault_is_noticed(fault, tmp_path):
    """By a test that fails, not by one that cannot be run."""
    copy_of_the_project(tmp_path / "copy")
    source = source_of(fault).replace(fault.old, fault.new)
    (tmp_path / "copy" / fault.file).write_text(source, encoding="utf-8")
    status, output = run_tests(tmp_path / "copy", fault.tests.split())
    assert status == pytest.ExitCode.TESTS_FAILED, output[-5000:]
    assert re.search(r"^FAILED tests/", output, re.MULTILINE), output[-5000:]
