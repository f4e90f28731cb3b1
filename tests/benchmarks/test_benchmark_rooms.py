"""What programs may import: rooms below their own, and no other program."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Where a file is -> what it may not import.
FORBIDDEN = {
    "mbn_rewrite": ("benchmarks", "study", "tests", "tools"),
    "tools": ("benchmarks", "study", "tests"),
    "benchmarks": ("study", "tests"),
    "study": ("tests",),
}
PROGRAMS = {f"benchmarks.{file.stem}" for file in (ROOT / "benchmarks").glob("*.py")}


def imports(file):
    """Full names of what a file imports, in functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("room", FORBIDDEN)
def test_rooms_import_from_below(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    found = {
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files
        for name in imports(file)
        if name.split(".")[0] in FORBIDDEN[room]
    }
    assert not found


def test_nothing_imports_a_program():
    files = [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "study").rglob("*.py")]
    found = {
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files
        for name in imports(file)
        if {name, name.rpartition(".")[0]} & PROGRAMS
    }
    assert not found
    assert "benchmarks.latency" in PROGRAMS
