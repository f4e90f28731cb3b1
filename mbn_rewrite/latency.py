"""`measure`: latencies of models, in memory or on disk, called in turn."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mbn_rewrite.errors import RewriteError, cause_of, is_out_of_memory
from mbn_rewrite.frontends.protocols import FrontEnd, ModelSource, Run
from mbn_rewrite.frontends.registry import check_source, front_end_of, open_source
from mbn_rewrite.measurement import UNCHANGED, Latencies, Timing, ratio
from mbn_rewrite.named_arrays import as_arrays
from mbn_rewrite.options import DEFAULT_SECONDS, Options, RunConfig
from mbn_rewrite.tuning.timing import time_calls
from mbn_rewrite.tuning.trial import MEASURING

FIGURE_SECONDS = 5.0  # of the figure that a rewrite ends with
_STARTING = 10e-6  # seconds: starting one of TensorFlow's operations takes some microseconds


@dataclass(frozen=True)
class OnDisk:
    """A model on disk, and how it is opened.

    Attributes:
        path: of the model.
        trusted, tags, set_input: as for `rewrite_saved_model`.
        signature: which to run; by default "serving_default", or else the first by name.
    """

    path: Path
    trusted: bool = False
    tags: Sequence[str] | None = None
    set_input: Mapping[str, Any] | None = None
    signature: str | None = None

    def opened(self) -> ModelSource:
        """The model."""
        signatures = None if self.signature is None else [self.signature]
        return open_source(self.path, self.trusted, self.tags, signatures, self.set_input)


def measure(
    *models: Any,
    batch_size: int = 1,
    jit_compile: bool = False,
    dtype: str | None = None,
    inputs: Any = None,
    signature: str | None = None,
    tags: Sequence[str] | None = None,
    trusted: bool = False,
    seconds: float = DEFAULT_SECONDS,
    progress: Callable[[str], None] | None = None,
) -> Latencies:
    """Measures the latency of models that take the same inputs, called in turn.

    Each call runs to the end, and each model as one compiled function: of a SavedModel the
    signature that is served. What is written or downloaded is not counted, nor is the first call.

    Args:
        models: models of one Keras, or paths of SavedModels and of files of Keras. All are compared
            with the first.
        batch_size: examples in a call.
        jit_compile: whether XLA compiles them.
        dtype: as for `convert`.
        inputs: what to call them with, cut or repeated to the batch size: as for `convert`, or for
            paths as for `rewrite_saved_model`. Made up by default.
        signature: the signature of SavedModels to run. "serving_default" by default, or else the
            first by name.
        tags: as for `rewrite_saved_model`.
        trusted: as for `rewrite_saved_model`.
        seconds: how long to measure, about. Each is called once however long that takes.
        progress: called with a line when a step begins.

    Returns:
        The latencies. They print as a table with the 50th, 90th and 99th percentile, and how many
        times as fast as the first each is, with its 95% interval: the median of the ratios of calls
        that were made in the same turn.

    Raises:
        RewriteError: one is no model, cannot be run, or changes its state when it runs; they take
            other inputs than the first; or the options make no sense.
    """
    if not models:
        raise RewriteError("give at least one model to measure")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
        raise RewriteError(f"seconds must be a number above 0, not {seconds!r}")
    say = progress or (lambda line: None)
    options = Options(run_config=RunConfig(batch_size, jit_compile, dtype), progress=say)
    are_paths = {isinstance(model, (str, os.PathLike)) for model in models}
    if len(are_paths) > 1:
        raise RewriteError("give models in memory, or paths of models on disk, not both")
    if are_paths == {True}:
        paths = [OnDisk(Path(model), trusted, tags, None, signature) for model in models]
        arrays = None if inputs is None else as_arrays(inputs)
        return on_disk(paths, replace(options, inputs=arrays), seconds)
    if signature is not None or tags is not None:
        raise RewriteError("models in memory have no signatures and no tags")
    return in_memory(models, replace(options, inputs=inputs), seconds)


def figure_on_disk(
    original: OnDisk, written: Path, options: Options, changed: bool, operations: int
) -> Latencies:
    """Latencies of a model on disk and of what was written in its place; see `figure`."""
    new = OnDisk(written, original.trusted, signature=original.signature)
    pair, names = (original, new), ("original", "rewritten")
    return figure(
        lambda: on_disk(pair, options, FIGURE_SECONDS, names), changed, options, operations
    )


def freezing_figure(variables: OnDisk, constants: OnDisk, options: Options) -> Latencies:
    """Latencies of a model whose weights are variables, and of it with constants for them.

    They are measured for some seconds, or for the budget if that is less.
    """
    say = options.progress
    pair, names = (variables, constants), ("variables", "constants")
    seconds = min(FIGURE_SECONDS, options.budget)

    def named(said: str) -> str:  # the paths are those of a working folder
        for model, name in zip(pair, names, strict=True):
            said = said.replace(str(model.path), f"the model with {name} for weights")
        return said

    options = replace(options, progress=lambda line: say(named(line)))
    found = _or_why_not(lambda: on_disk(pair, options, seconds, names), options)
    return replace(found, why=named(found.why))


def figure(
    measured: Callable[[], Latencies], changed: bool, options: Options, operations: int = 0
) -> Latencies:
    """Latencies of an original and of its rewritten model, with why there is no more to gain.

    Args:
        measured: measures them.
        changed: whether anything was done to the model.
        options: how they are run.
        operations: how many the rewritten model has, if known.
    """
    if not changed:
        return not_measured(UNCHANGED, options)
    found = _or_why_not(measured, options)
    return replace(found, why=_why_no_faster(found, operations)) if found.timings else found


def _or_why_not(measured: Callable[[], Latencies], options: Options) -> Latencies:
    """Latencies, or why they cannot be had."""
    try:
        return measured()
    except RewriteError as error:
        return not_measured(str(error), options)


def not_measured(why: str, options: Options) -> Latencies:
    """What stands for latencies that there are not, with why as a phrase."""
    return Latencies("", options.run_config, (), why=why)


def _why_no_faster(found: Latencies, operations: int) -> str:
    median = statistics.median(found.timings[1].seconds)
    if operations and median < operations * _STARTING:
        each = 1e6 * median / operations
        return (
            f"its {operations} operations take {each:.1f} microseconds each, which is about what "
            "starting one takes"
        )
    return "BatchNormalization had too small a part in what a call takes"


# ----------------------------------------------------------------------- models in memory


def in_memory(
    models: Sequence[Any], options: Options, seconds: float, names: Sequence[str] = ()
) -> Latencies:
    """Latencies of models of one Keras in memory; see `measure`."""
    front_ends = [front_end_of(model) for model in models]
    first = front_ends[0]
    if any(type(front_end) is not type(first) for front_end in front_ends):
        raise RewriteError("give models of one Keras: tf_keras and Keras 3 take other inputs")
    names = _told_apart(names or [model.name for model in models])
    config = options.run_config
    with first.set_up(config), ExitStack() as stack:
        # What is made up for the model that leaves fewest sizes open fits the others.
        least_open = min(models, key=_open_sizes)
        inputs = first.inputs_of_batch(least_open, options.inputs, config.batch_size)

        def run_of(model: Any) -> AbstractContextManager[Run]:
            return first.running(model, inputs, config)

        runs = {
            name: stack.enter_context(run_of(model))
            for name, model in zip(names, models, strict=True)
        }
        return _timed(runs, first, options, seconds)


def _open_sizes(model: Any) -> int:
    """How many sizes of its inputs a model leaves open, as far as it says."""
    inputs = getattr(model, "inputs", None) or ()
    return sum(size is None for tensor in inputs for size in tensor.shape)


# ------------------------------------------------------------------------- models on disk


def on_disk(
    models: Sequence[OnDisk], options: Options, seconds: float, names: Sequence[str] = ()
) -> Latencies:
    """Latencies of models on disk; see `measure`."""
    for model in models:
        check_source(model.path, model.trusted)
    names = _told_apart(names or _short_paths([model.path for model in models]))
    opened = []  # what runs does not keep a model alive
    for model in models:
        options.progress(f"loading {model.path}")
        opened.append(model.opened())
    runs: dict[str, Run] = {}
    with opened[0].set_up(options.run_config), ExitStack() as stack:
        if options.inputs is not None:
            opened[0].check_inputs(options.inputs)
        taken, config = _inputs_of_each(models, opened, options)
        for name, source, inputs in zip(names, opened, taken, strict=True):
            with _naming(name):
                run = source.running(None, replace(options, inputs=inputs))
            runs[name] = stack.enter_context(run)
        return _timed(runs, opened[0], replace(options, run_config=config), seconds)


def _inputs_of_each(
    models: Sequence[OnDisk], opened: Sequence[ModelSource], options: Options
) -> tuple[list[dict[str, np.ndarray]], RunConfig]:
    """What to call each model with, the same for all but for names, and conditions with its size.

    That is made up for the first model, or, since it may leave sizes open that others do not, for
    the first whose inputs all take.
    """
    made = [source.inputs_to_measure(options) for source in opened]
    by_model = [
        [_as_named(inputs, own, model.path) for model, own in zip(models, made, strict=True)]
        for inputs in (made if options.inputs is None else made[:1])
    ]

    def fits(inputs: Sequence[Mapping[str, np.ndarray]]) -> bool:
        return all(_takes(*each, options) for each in zip(opened, inputs, made, strict=True))

    # Where none fits, the model that does not take the first says so.
    chosen = next((i for i, inputs in enumerate(by_model) if fits(inputs)), 0)
    config = _as_run(options.run_config, by_model[chosen][chosen], models[chosen].path)
    return by_model[chosen], config


def _takes(
    source: ModelSource,
    inputs: Mapping[str, np.ndarray],
    own: Mapping[str, np.ndarray],
    options: Options,
) -> bool:
    """Whether a model takes inputs; it does if they have the shapes of its own."""
    if all(inputs[name].shape == array.shape for name, array in own.items()):
        return True
    try:
        source.inputs_to_measure(replace(options, inputs=inputs))
    except RewriteError:
        return False
    return True


def _as_run(config: RunConfig, inputs: Mapping[str, np.ndarray], path: Path) -> RunConfig:
    """The conditions with the batch size that inputs have: a model may take one alone.

    Raises:
        RewriteError: another was asked for.
    """
    sizes = {array.shape[0] for array in inputs.values() if array.ndim}
    if len(sizes) != 1 or sizes == {config.batch_size}:
        return config
    (size,) = sizes
    if config.batch_size != 1:
        raise RewriteError(
            f"{path} takes batches of {size} alone, not of {config.batch_size}. Leave the batch "
            "size out"
        )
    return replace(config, batch_size=int(size))


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Context manager that names a model in what is wrong with it."""
    try:
        yield
    except RewriteError as error:
        raise RewriteError(f"{name} cannot be measured: {error}") from error


def _as_named(
    inputs: Mapping[str, np.ndarray], own: Mapping[str, np.ndarray], path: Path
) -> dict[str, np.ndarray]:
    """Inputs of the first model, by the names that another has for them."""
    if len(inputs) == len(own) == 1:  # a lone one may have another name
        inputs = dict(zip(own, inputs.values(), strict=True))
    if set(inputs) != set(own):
        raise RewriteError(
            f"{path} takes inputs named {sorted(own)}, the first model {sorted(inputs)}. Measure "
            "models that take the same"
        )
    return dict(inputs)


# ------------------------------------------------------------------------------- measuring


def _timed(
    runs: Mapping[str, Run], model: FrontEnd | ModelSource, options: Options, seconds: float
) -> Latencies:
    names = list(runs)
    options.progress(f"{MEASURING} {len(runs)} models: {options.run_config}")
    for name, run in runs.items():
        with _naming(name):
            _first_call(run)
    times = time_calls(runs, seconds)
    first = times[names[0]]
    timings = tuple(
        Timing(name, tuple(times[name]), None if name == names[0] else ratio(first, times[name]))
        for name in names
    )
    return Latencies(model.device(), options.run_config, timings)


def _first_call(run: Run) -> None:
    """Runs a model once, which may show that it cannot be run.

    Raises:
        RewriteError: it cannot.
    """
    try:
        run()
    except RewriteError:
        raise
    except Exception as error:
        said = "not enough memory" if is_out_of_memory(error) else cause_of(error)
        raise RewriteError(said) from error


def _short_paths(paths: Sequence[Path]) -> list[str]:
    """Paths without the directory that all are in."""
    whole = [path.absolute() for path in paths]
    shared = os.path.commonpath([path.parent for path in whole])
    return [str(path.relative_to(shared)) for path in whole]


def _told_apart(names: Sequence[str]) -> list[str]:
    """Names with a number where one comes twice."""
    return [
        name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})"
        for i, name in enumerate(names)
    ]
