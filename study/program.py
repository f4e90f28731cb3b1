"""Digest of the code that trains, by which runs of different code are told apart.

A version of the package may have many states, and runs of two that train differently are no pairs.
What counts is code, definition by definition: files may be moved, split and renamed, and imports,
docstrings and comments may change, without a study begun before being lost.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mbn_rewrite
from benchmarks.models import training_networks

# Digests of programs that train alike; the last is this one's. Where code that trains changes, its
# digest is added if results stay the same, and stands here alone if they do not. The first two were
# taken in another way, of files.
TRAIN_ALIKE = (
    "3c482476c619b332",
    "fa8880dd70377ef1",
    "e7768f0f3e74f678",
    "8a8d64cf8d4ac602",
    "c3a6505a085b91d5",
    "e8601c9168315689",
    "63800db25a17dd9c",
    "26bf13e3a6d4dd6e",
)


def digest() -> str:
    """Changes with the code of the layers and of training."""
    text = hashlib.sha256()
    definitions = (code for file in _files() for code in _definitions(file.read_text()))
    for code in sorted(set(definitions)):
        text.update(f"{code}\n".encode())
    return text.hexdigest()[:16]


def renewed(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the digest of this program, if the one it names trains alike."""
    versions, now = dict(configuration["versions"]), digest()
    if {versions.get("program"), now} <= set(TRAIN_ALIKE):
        versions["program"] = now
    return {**configuration, "versions": versions}


def _files() -> list[Path]:
    here, package = Path(__file__).parent, Path(mbn_rewrite.__file__).parent
    return [
        *(here / f"{name}.py" for name in ("models", "pipeline", "recipes", "training")),
        *package.glob("training/*.py"),
        *package.glob("training/tensorflow/*.py"),
        *package.glob("frontends/*/training_layers.py"),
        Path(training_networks.__file__),
    ]


def _definitions(text: str) -> Iterator[str]:
    """The code of each statement of a module, less imports, strings on their own and comments."""
    lines = text.splitlines()
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
            continue
        silent = {
            number
            for node in ast.walk(statement)
            if isinstance(node, (ast.Import, ast.ImportFrom)) or _is_text(node)
            for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
        }
        decorators = getattr(statement, "decorator_list", [])
        first = min(node.lineno for node in (statement, *decorators))
        code = [
            lines[number - 1]
            for number in range(first, (statement.end_lineno or first) + 1)
            if number not in silent and not lines[number - 1].lstrip().startswith("#")
        ]
        if any(map(str.strip, code)):
            yield "\n".join(line for line in code if line.strip())


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
