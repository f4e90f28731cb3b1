"""Standing of a study: what is finished, what is being trained, and whose turn is next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from study.claims import Run
from study.pairs import ORIGINAL


@dataclass(frozen=True)
class Standing:
    """Standing of a study as one of its devices sees it.

    A pair is trained on one device: a seed that was begun on another is left to that.

    Attributes:
        runs: all that are asked for, in their order.
        device: whose turns these are.
        finished: records of runs.
        training: the device of each run that a process trains.
    """

    runs: Sequence[Run]
    device: str
    finished: Mapping[Run, Mapping[str, Any]]
    training: Mapping[Run, str]

    @cached_property
    def left(self) -> list[Run]:
        """Runs that are not finished."""
        return [run for run in self.runs if run not in self.finished]

    @property
    def here(self) -> list[Run]:
        """Those that are left to this device, be it to other processes."""
        return [(variant, seed) for variant, seed in self.left if seed not in self.elsewhere]

    @cached_property
    def elsewhere(self) -> dict[int, str]:
        """Device of each seed that was begun on another."""
        finished = {run: str(record["device"]) for run, record in self.finished.items()}
        devices = {**finished, **self.training}
        return {seed: device for (_, seed), device in devices.items() if device != self.device}

    @property
    def originals(self) -> Mapping[str, int] | None:
        """Operations that a finished original ran on this device."""
        records = (record for (variant, _), record in self.finished.items() if variant == ORIGINAL)
        return next((r["operations"] for r in records if r["device"] == self.device), None)

    @cached_property
    def next(self) -> Run | None:
        """The next run for a process, if there is one that it can begin."""
        free = self._free
        if self.originals is None:
            # A variant is compared with the original as it runs here, so that has to be there.
            free = [(variant, seed) for variant, seed in free if variant == ORIGINAL]
        return next(iter(free), None)

    @property
    def waits(self) -> bool:
        """Whether there will be one as soon as another process has trained an original."""
        originals = [run for run in self.here if run[0] == ORIGINAL and run in self.training]
        return self.next is None and bool(self._free) and bool(originals)

    @property
    def _free(self) -> list[Run]:
        return [run for run in self.here if run not in self.training]

    def __str__(self) -> str:
        """How many are finished, and what becomes of the others."""
        trained = [run for run in self.left if run in self.training]
        waiting = {seed for variant, seed in self.left if (variant, seed) not in self.training}
        begun = sorted({device for seed, device in self.elsewhere.items() if seed in waiting})
        return "".join(
            [
                f"{len(self.runs) - len(self.left)} of {len(self.runs)} runs are finished",
                f"; other processes train {len(trained)}" * bool(trained),
                f"; seeds begun on {' and '.join(begun)} are left to that" * bool(begun),
            ]
        )


def order(variants: Sequence[str], runs: int) -> Iterator[Run]:
    """All runs, seed by seed, so that a part of the study is paired too.

    The variants take turns in going first: what the machine does over time hits all alike.
    """
    for seed in range(runs):
        turn = seed % len(variants)
        for variant in (*variants[turn:], *variants[:turn]):
            yield variant, seed
