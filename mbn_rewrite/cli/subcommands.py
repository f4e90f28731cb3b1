"""Commands of the tool, and the flags that each takes."""

from __future__ import annotations

from collections.abc import Sequence

from mbn_rewrite.cli import flags
from mbn_rewrite.cli.job import MEASURE, REWRITE, VERIFY
from mbn_rewrite.errors import RewriteError

PLAN = "plan"

_ALWAYS = {"report", "tags", "signatures", "trusted", "import_modules", "timeout", "quiet"}
_RUNNING = {"inputs", "batch_size", "jit_compile", "dtype"}
_TAKES = {
    VERIFY: {*_ALWAYS, "inputs", "set_input", "unverified", "tolerance"},
    MEASURE: {*_ALWAYS, *_RUNNING, "seconds", "threads", "chart"},
    PLAN: {
        *_ALWAYS,
        *_RUNNING,
        "mode",
        "budget",
        "equalize",
        "keep_shared",
        "set_input",
        "full",
        "dry_run",
    },
}
_REWRITE_LEAVES = {"seconds", "threads", "chart"}


def command_of(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The command that arguments begin with, and the rest; to rewrite is what needs no word."""
    if arguments and arguments[0] in (REWRITE, *_TAKES):
        return arguments[0], list(arguments[1:])
    return REWRITE, list(arguments)


def check_flags(command: str) -> None:
    """Raises RewriteError where flags were given that a command does not take."""
    given = [flag.name for flag in flags.FLAGS.get_flags_for_module(flags.__name__) if flag.present]
    takes = _TAKES.get(command)
    wrong = [
        f"--{name}"
        for name in given
        if (name in _REWRITE_LEAVES if takes is None else name not in takes)
    ]
    if wrong:
        raise RewriteError(f"the command {command} takes no {' and no '.join(wrong)}; see --help")
