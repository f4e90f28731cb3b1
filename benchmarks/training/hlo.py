"""Instructions of modules that XLA has compiled, read from their text."""

from __future__ import annotations

import re
from collections import Counter

# Instructions that compute nothing.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")


def instructions(module: str) -> dict[str, int]:
    """How often each instruction is in the entry of a module, by names, which say what is fused."""
    entry = module[module.index("\nENTRY") :]
    # %name.1 = f32[64]{0} fusion(..., where a type may be a tuple of types.
    lines = re.findall(r"^\s+(?:ROOT )?%?([\w.-]+) = .*?[\])}] ([\w-]+)\(", entry, re.MULTILINE)
    names = [re.sub(r"[.\d]+$", "", name) for name, kind in lines if kind not in _FREE]
    return dict(sorted(Counter(names).items()))
