"""The verification of a written SavedModel: its signatures beside those of the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from mbn_rewrite.comparison import Comparison, judged, tolerance_for
from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.reference_io import ReferenceIO


@dataclass(frozen=True)
class Reference:
    """Outputs of an original, to compare with.

    Attributes:
        calls: the inputs and outputs of each signature and method that was run.
        made_up: whether the inputs were made up.
        dtypes: the names of the dtypes that the original computes in.
        open_again: loads the original again; see `protocols.ModelSource.opened_again`.
    """

    calls: Mapping[str, ReferenceIO]
    made_up: bool
    dtypes: set[str]
    open_again: Callable[[Path], Any]

    @property
    def not_compared(self) -> dict[str, str]:
        """The signatures and methods that were run, but give nothing to compare."""
        return {
            name: "it gives not one value to compare"
            for name, call in self.calls.items()
            if self.gives_nothing(call)
        }

    @property
    def by_xla(self) -> tuple[str, ...]:
        """The signatures and methods that only XLA could run on this machine."""
        return tuple(name for name, call in self.calls.items() if call.compiled)

    def gives_nothing(self, call: ReferenceIO) -> bool:
        """Whether there is nothing to compare, which for inputs of the caller is a mistake."""
        empty = not any(array.size for array in call.outputs.values())
        return empty and (self.made_up or not call.outputs)


@dataclass(frozen=True)
class Verification:
    """A SavedModel beside its original.

    Attributes:
        comparisons: for each signature and method that was compared.
        unverified: those that were not, and why.
    """

    comparisons: Mapping[str, Comparison]
    unverified: Mapping[str, str]

    @property
    def ok(self) -> bool:
        """Whether all that was compared agrees, and anything was."""
        return bool(self.comparisons) and all(c.ok for c in self.comparisons.values())

    def to_dict(self) -> dict[str, Any]:
        """The verification in types that JSON knows."""
        return {
            "ok": self.ok,
            "signatures": {name: c.to_dict() for name, c in self.comparisons.items()},
            "unverified": dict(self.unverified),
        }

    def __str__(self) -> str:
        lines = [f"verification of {name}: {c}" for name, c in self.comparisons.items()]
        lines += [f"not verified: {name} ({why})" for name, why in self.unverified.items()]
        return "\n".join(lines)


def verified(
    directory: Path, reference: Reference, tolerance: float | None, counted: str
) -> tuple[dict[str, Comparison], dict[str, int]]:
    """Compares a written SavedModel with its original.

    Args:
        directory: the SavedModel. Beside it there is room to write to.
        reference: outputs of the original.
        tolerance: the largest relative error to accept; None for the one of the dtypes.
        counted: the signature whose operations are counted, or "".

    Returns:
        A comparison for each signature, and the operations of one of them.

    Raises:
        RewriteError: a signature cannot be verified, or names its outputs otherwise.
    """
    from mbn_rewrite.frontends.saved_model.function_graph import op_counts

    pair = _Pair(directory, reference, tolerance)
    comparisons = {
        name: pair.compared(name, call)
        for name, call in reference.calls.items()
        if pair.runs(name, call)
    }
    counts = op_counts(pair.served.signatures[counted]) if counted else {}
    return comparisons, counts


class _Pair:
    """A written SavedModel beside its original."""

    def __init__(self, directory: Path, reference: Reference, tolerance: float | None) -> None:
        from mbn_rewrite.frontends.saved_model.served import Served

        self.served = Served(directory)
        self._directory = directory
        self._reference = reference
        self._for_rounding = tolerance is None
        self._tolerance = tolerance_for(reference.dtypes) if tolerance is None else tolerance
        self._outputs: dict[str, list[tuple[str, np.ndarray, np.ndarray]]] = {}

    def runs(self, name: str, call: ReferenceIO) -> bool:
        """Runs a signature of the written model; whether there is something to compare.

        Raises:
            RewriteError: it cannot be run, or names its outputs otherwise than the original.
        """
        results, expected = dict(self.served(name, call)), dict(call.outputs)
        if len(expected) == len(results) == 1:
            expected = dict(zip(results, expected.values(), strict=True))
        if set(expected) != set(results):
            raise RewriteError(
                f"signature '{name}' of the written model names its outputs {sorted(results)}, "
                f"that of the original {sorted(expected)}"
            )
        self._outputs[name] = [(key, expected[key], results[key]) for key in sorted(expected)]
        return not self._reference.gives_nothing(call)

    def compared(self, name: str, call: ReferenceIO) -> Comparison:
        """Compares the outputs of a signature that was run."""
        outputs = self._outputs.pop(name)
        comparison = judged(
            [expected for _, expected, _ in outputs],
            [result for _, _, result in outputs],
            self._tolerance,
            partial(self._closer_look, name, call),
            [f"'{key}'" for key, _, _ in outputs],
        )
        if not comparison.ok:
            self._check_that_it_can_be_verified(name, call, comparison)
        return comparison

    def _check_that_it_can_be_verified(
        self, name: str, call: ReferenceIO, comparison: Comparison
    ) -> None:
        """Raises RewriteError where outputs differ, but not by a mistake of ours."""
        if not comparison.compared:
            why = f"{comparison.note} (give inputs for which the original gives numbers)"
        elif not self._original_repeats(name, call):
            why = (
                "the original gives other outputs each time that it is called with the same inputs"
            )
        else:
            return
        raise RewriteError(
            f"'{name}' cannot be verified: {why}. To carry it over unverified, pass "
            f"--unverified={name} (unverified=['{name}'] in Python)"
        )

    def _original_repeats(self, name: str, call: ReferenceIO) -> bool:
        """Whether the original, loaded again, gives what it gave, but for jumps by rounding."""
        from mbn_rewrite.frontends.saved_model.closer_look import look_closer_at_served
        from mbn_rewrite.frontends.saved_model.served import called_again, loaded_call

        loaded = self._reference.open_again(self._directory.with_name("original_again"))
        again = called_again(loaded, name, call)
        look = partial(
            look_closer_at_served,
            loaded,
            loaded_call(loaded, name, call),
            name,
            call,
            rounding=self._for_rounding,
        )
        first, second = list(call.outputs.values()), list(again.outputs.values())
        return judged(first, second, self._tolerance, look).ok

    def _closer_look(self, name: str, call: ReferenceIO, plain: Comparison) -> Comparison | None:
        from mbn_rewrite.frontends.saved_model.closer_look import look_closer_at_served

        original, written = self._both
        return look_closer_at_served(
            original,
            written.call(name, call),
            name,
            call,
            plain,
            rounding=self._for_rounding,
        )

    @cached_property
    def _both(self) -> tuple[Any, Any]:
        """The original and the written model, in the states in which they were saved."""
        from mbn_rewrite.frontends.saved_model.served import Served

        original = self._reference.open_again(self._directory.with_name("original"))
        return original, Served(self._directory)
