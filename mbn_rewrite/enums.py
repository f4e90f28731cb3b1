"""Base of the enumerations whose values are part of reports and of what callers write."""

from __future__ import annotations

from enum import Enum


class Name(str, Enum):
    """A word out of a closed list. It equals, hashes, prints and serialises as the word."""

    def __str__(self) -> str:
        return str(self.value)

    def __repr__(self) -> str:
        return repr(str(self.value))

    def __format__(self, spec: str) -> str:
        return format(str(self.value), spec)

    def __hash__(self) -> int:  # that of an enumeration is another
        return hash(str(self.value))
