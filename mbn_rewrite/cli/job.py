"""Messages between the command-line tool and the process that works for it.

The tool says what to do, once. The worker says what it is doing, step by step, and at last how it
ended: one JSON object a line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

# What a job can be.
REWRITE, VERIFY, MEASURE = "rewrite", "verify", "measure"
FIGURE = "figure"  # how much faster a rewritten model is

# How a job can end: as it should; refused for a reason, as RewriteError; verified and found wrong;
# for want of memory; or by an error that nobody has thought of.
DONE, REFUSED, DIFFERENT = "done", "refused", "different"
NO_MEMORY, UNEXPECTED = "no memory", "unexpected"


@dataclass(frozen=True)
class Job:
    """A model to rewrite, or models to compare or to measure.

    Attributes:
        source: the path of the original.
        destination: what the user calls the output, or "" where nothing is written.
        folder: the folder to write it to, which does not exist yet.
        options: what the function takes beside that does the job, by name.
        inputs: the path of an .npz file with inputs, or None to make them up.
        import_modules: what to import before loading.
        width: how wide tables are, in characters.
        encoding: what the tool's output is encoded in.
        full: whether long tables have all their rows.
        quiet_log: whether TensorFlow logs errors only.
        task: REWRITE, VERIFY, MEASURE or FIGURE.
        others: the paths of the models beside the original, to compare with it.
        threads: how many threads of the CPU an operation may use; 0 for one a core.
    """

    source: str
    destination: str = ""
    folder: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: str | None = None
    import_modules: tuple[str, ...] = ()
    width: int = 100
    encoding: str = "utf-8"
    full: bool = False
    quiet_log: bool = True
    task: str = REWRITE
    others: tuple[str, ...] = ()
    threads: int = 0

    @property
    def outcome(self) -> str:
        """What to say of the output where the job fails."""
        return "; nothing was written" if self.task == REWRITE else ""

    def to_json(self) -> str:
        """The job as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The inverse of `to_json`."""
        read = json.loads(text)
        tuples = {name: tuple(read[name]) for name in ("import_modules", "others")}
        return cls(**read | tuples)


@dataclass(frozen=True)
class Ending:
    """End of a job.

    Attributes:
        how: DONE, REFUSED, DIFFERENT, NO_MEMORY or UNEXPECTED.
        message: what went wrong, in a sentence, or "".
        text: the report for people, or "" where there is none.
        report: the report in types that JSON knows, or {}.
    """

    how: str
    message: str = ""
    text: str = ""
    report: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """A step of a job, which begins.

    Attributes:
        line: what is done.
        planned: how many seconds it may take whatever the model is.
    """

    line: str
    planned: float = 0.0


def step_to_json(step: Step) -> str:
    """A step, as a message."""
    return json.dumps({"step": asdict(step)})


def ending_to_json(ending: Ending) -> str:
    """An ending, as a message."""
    return json.dumps({"ending": asdict(ending)})


def read_message(text: str | bytes) -> Step | Ending:
    """A step or an ending; ValueError where it is neither."""
    read = json.loads(text)
    try:
        return Step(**read["step"]) if "step" in read else Ending(**read["ending"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"no message: {text!r}") from error
