"""Values given on the command line, for inputs of signatures."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

from mbn_rewrite.errors import RewriteError

_TRUTHS = {"true": True, "false": False}


def set_inputs_in(flags: Iterable[str]) -> dict[str, Any]:
    """The values that inputs are set to, by name.

    Args:
        flags: as given, each "NAME=VALUE": a number, True or False, a list of such, or a text.

    Raises:
        RewriteError: one is not of that form, or names what another one names.
    """
    found: dict[str, Any] = {}
    for flag in flags:
        name, equals, value = flag.partition("=")
        if not name or not equals:
            raise RewriteError(
                f"--set_input takes NAME=VALUE, not {flag!r}. Give one like "
                "--set_input=phase_train=False"
            )
        if name in found:
            raise RewriteError(f"--set_input sets '{name}' twice. Give it once")
        found[name] = _value(value)
    return found


def _value(text: str) -> Any:
    """What a text stands for; the text itself where that is nothing else."""
    if text.lower() in _TRUTHS:
        return _TRUTHS[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    is_plain = isinstance(value, (bool, int, float, str, list, tuple))
    return value if is_plain else text
