"""Messages between the command-line tool and the process that works for it.

The tool says what to do, once. The worker says what it is doing, step by step, and at last how it
ended: one JSON object a line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

# How a job can end: as it should; refused for a reason, as RewriteError; verified and found wrong;
# for want of memory; or by an error that nobody has thought of.
DONE, REFUSED, DIFFERENT = "done", "refused", "different"
NO_MEMORY, UNEXPECTED = "no memory", "unexpected"


@dataclass(frozen=True)
class Job:
    """A model to rewrite.

    Attributes:
        source: the path of the original.
        destination: what the user calls the output, or "" for a dry run.
        folder: the folder to write it to, which does not exist yet.
        options: what `rewrite_saved_model` takes beside, by name.
        verify_inputs: the path of an .npz file, or None to make inputs up.
        import_modules: what to import before loading.
        width: how wide tables are, in characters.
        encoding: what the tool's output is encoded in.
        full: whether long tables have all their rows.
        quiet_log: whether TensorFlow logs errors only.
    """

    source: str
    destination: str
    folder: str
    options: Mapping[str, Any] = field(default_factory=dict)
    verify_inputs: str | None = None
    import_modules: tuple[str, ...] = ()
    width: int = 100
    encoding: str = "utf-8"
    full: bool = False
    quiet_log: bool = True

    def to_json(self) -> str:
        """The job as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The inverse of `to_json`."""
        read = json.loads(text)
        return cls(**read | {"import_modules": tuple(read["import_modules"])})


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
        shown: whether people are told.
    """

    line: str
    planned: float = 0.0
    shown: bool = True


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
