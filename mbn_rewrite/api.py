"""`convert` and `plan`: from a model to a rewritten model, by way of its front end."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mbn_rewrite.errors import UnverifiedWarning, VerificationError
from mbn_rewrite.frontends.in_memory import ModelInMemory
from mbn_rewrite.frontends.registry import front_end_of
from mbn_rewrite.latency import FIGURE_SECONDS, figure, in_memory
from mbn_rewrite.measurement import Latencies
from mbn_rewrite.options import Mode, Options, checked_options
from mbn_rewrite.plans import Plan
from mbn_rewrite.tuning.auto import plan_for
from mbn_rewrite.verification import checked


def convert(
    model: Any,
    mode: Mode = "auto",
    stride: Any = None,
    *,
    batch_size: int | None = None,
    jit_compile: bool | None = None,
    dtype: str | None = None,
    inputs: Any = None,
    budget: float | None = None,
    progress: Callable[[str], None] | None = None,
    check: bool = True,
    measure: bool = False,
    equalize: bool = False,
    keep_shared: bool = False,
    keep_compiled: bool = False,
) -> Any:
    """Rewrites the BatchNormalization layers of a model, for inference or for training.

    What it gives was compared with the original: both were called once, on a few made-up
    examples, at inference. Where that cannot be done (no inputs can be made up, the original
    draws random numbers) there is a warning, an `errors.UnverifiedWarning`. Where code of the
    model's layers calls others, and what came of it was not right, layers that code calls are left
    as they are; their reasons say so.

    Args:
        model: a built model of tf_keras or Keras 3. It is not changed.
        mode: for inference, "fold" lets neighbouring layers absorb each BatchNormalization
            wherever that is exact, and leaves the others; `print(plan(model, "fold"))` says why.
            "auto" folds, and measures what is best done with those others: leave them, put a
            fused operation, a depthwise convolution or a multiplication and an addition in
            their place, or have convolutions that pad with zeros absorb them and add a map for
            the border. Should all that be slower than the model as it was, it stays as it was.
            Nothing is measured where all fold. "depthwise" puts a depthwise 1x1
            convolution in the place of each. For training, "strided" puts a
            `StridedBatchNormalization` in the place of each, and "mbn" a
            `ModifiedBatchNormalization`, with the weights that it had.
        stride: for training modes: a positive int, a pair (rows, columns), or a mapping (1 for
            layers that it does not name) or function from layer names, as the plan shows
            them, to either. 4 by default.
        batch_size: for "auto", as are all that follow up to `progress`: how many examples a call
            will have. 1 by default.
        jit_compile: whether XLA will compile the model. By default not.
        dtype: "float16" (GPU) or "bfloat16" (CPU) if TensorFlow's automatic mixed precision will
            be used. By default the model computes in the dtypes that it says.
        inputs: what to call the model with, in any mode: all of it to compare, and in "auto" so
            many examples of it to measure; made up by default.
        budget: the most seconds to take for measuring, about. 60 by default.
        progress: called with a line when a step begins.
        check: whether to compare. `convert_with_plan` gives the comparison, too.
        measure: whether to measure how much faster than the original the new model is, for some
            seconds, called as `batch_size`, `jit_compile`, `dtype` and `inputs` say, in any mode
            for inference. `convert_with_plan` gives the latencies, as `plan.speed`.
        equalize: in mode "fold", whether to choose the scales between layers, which are free, so
            that rounding weights to int8 with one step for each tensor loses least. Outputs are the
            same. ReLU6 and the like take on bounds by channel for it, which may be slower. A
            BatchNormalization that stays for its shift leaves its scale to the layers around it.
        keep_shared: whether a layer that is called several times keeps one set of weights for all
            calls. By default "fold" and "auto" give calls that are followed by BatchNormalizations
            of their own also weights of their own, where these are few; the plan says how many.
        keep_compiled: for training modes: whether the new model is compiled as the original is,
            with an optimizer of the same class, configuration and state, so that training goes on
            where it was. Metrics begin anew, as they do at the start of an epoch.

    Returns:
        A new model of the same kind with the same inputs, outputs, names and, but for
        rounding, results at inference. Layers that absorbed nothing have bitwise equal
        weights. Layers that did lose their kernel and bias regularizers and constraints,
        which were meant for the weights as they were; a model for training keeps all of them,
        and its trainable weights are in the order of the original's, so that the state of an
        optimizer fits. Without `keep_compiled` the new model is not compiled. Losses and
        metrics added by `add_loss` and `add_metric` are left out.

    Raises:
        VerificationError: the new model does not give the original's outputs.
        RewriteError: the model is of a kind that cannot be rewritten, or holds a layer
            that cannot be copied; the mode is unknown or does not take what was given; or what
            was given is no stride, batch size, dtype or budget; or, with `keep_compiled`, the
            model is not compiled, compiles itself in another way, or has an optimizer or a metric
            that cannot be copied.
    """
    options = checked_options(
        mode,
        stride,
        inputs=inputs,
        check=check,
        measure=measure,
        equalize=equalize,
        progress=progress,
        batch_size=batch_size,
        jit_compile=jit_compile,
        dtype=dtype,
        budget=budget,
        keep_shared=keep_shared,
        keep_compiled=keep_compiled,
    )
    return _converted(model, options)[0]


def plan(
    model: Any,
    mode: Mode = "auto",
    stride: Any = None,
    *,
    batch_size: int | None = None,
    jit_compile: bool | None = None,
    dtype: str | None = None,
    inputs: Any = None,
    budget: float | None = None,
    equalize: bool = False,
    progress: Callable[[str], None] | None = None,
    keep_shared: bool = False,
) -> Plan:
    """The plan that `convert` would carry out on a model, without carrying it out.

    Mode "auto" makes and measures what it has to choose between; "fold" takes no time. Arguments
    are those of `convert`.

    Returns:
        A Plan. It prints as a table; `plan.decisions` has an entry for every
        BatchNormalization; `plan.measurement` is what "auto" measured; `plan.to_json()` is for
        programs. Nothing was compared: `plan.verification` is None.

    Raises:
        RewriteError: as for `convert`.
    """
    options = checked_options(
        mode,
        stride,
        inputs=inputs,
        check=False,
        equalize=equalize,
        progress=progress,
        batch_size=batch_size,
        jit_compile=jit_compile,
        dtype=dtype,
        budget=budget,
        keep_shared=keep_shared,
    )
    return plan_for(ModelInMemory(front_end_of(model), model), options)


def convert_with_plan(
    model: Any,
    mode: Mode = "auto",
    stride: Any = None,
    **options: Any,
) -> tuple[Any, Plan]:
    """`convert` and `plan` in one: reads the model once, and measures once.

    Arguments are those of `convert`.

    Returns:
        What `convert` returns, and the Plan that was carried out. `plan.verification` is the
        comparison of the two models, or None; then `plan.unverified` says why, unless `check`
        is False.

    Raises:
        VerificationError, RewriteError: as for `convert`.
    """
    return _converted(model, checked_options(mode, stride, **options))


def _converted(model: Any, options: Options) -> tuple[Any, Plan]:
    front_end = front_end_of(model)
    if options.keep_compiled:
        front_end.check_compiled(model)
    opened = ModelInMemory(front_end, model)
    made = plan_for(opened, options)
    try:
        new, made = _written(opened, made, options)
    except VerificationError:
        # Code of the user's may do something else with other layers than a trace of it shows.
        opened, failed = ModelInMemory(opened.front_end, model, leaves_code=True), made
        made = plan_for(opened, options)
        if set(made.actions) == set(failed.actions):
            raise
        new, made = _written(opened, made, options)
    if options.measure:
        made = replace(made, speed=_speed(model, new, made, options))
    if made.unverified:
        said = f"the rewritten model was not verified: {made.unverified}"
        warnings.warn(said, UnverifiedWarning, stacklevel=3)  # at the caller of `convert`
    return new, made


def _written(opened: ModelInMemory, made: Plan, options: Options) -> tuple[Any, Plan]:
    """A rewritten model, compared with the original if options say so, and its plan."""
    new = opened.write(made)
    if options.keep_compiled:
        opened.front_end.compile_like(opened.model, new)
    if options.check:
        options.progress("comparing with the original")
        made = checked(opened.front_end, opened.model, new, made, options.inputs)
    return new, made


def _speed(model: Any, new: Any, plan: Plan, options: Options) -> Latencies:
    names = ("original", "rewritten")
    return figure(
        lambda: in_memory((model, new), options, FIGURE_SECONDS, names),
        plan.changes_something,
        options,
    )
