"""Compiles a copy of a model as the original is compiled, with the state of its optimizer.

The optimizer is made anew from its configuration, built for the copy's weights in the order in
which the original's knows its own, and given the values of the original's: one slot holds as many
numbers as the other, though in another shape where a depthwise kernel took gamma's place. Losses
and schedules, which keep nothing, are shared; metrics are made anew, and begin as they do at the
start of an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from mbn_rewrite.errors import RewriteError, cause_of
from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter
from mbn_rewrite.frontends.keras_common.batch_norm import affine_weights, is_batch_norm
from mbn_rewrite.frontends.keras_common.cloning import is_stock, label, parts
from mbn_rewrite.frontends.keras_common.custom_models import attributes, leaves
from mbn_rewrite.passes.wording import listed

_COMPILE_IT = "Leave keep_compiled out, and compile the new model yourself"


def check_compiled(model: Any, keras: KerasAdapter) -> None:
    """Raises RewriteError where a copy of a model cannot be compiled as the model is."""
    if not keras.is_compiled(model):
        raise RewriteError(
            f"{label(model)} is not compiled, so there is nothing for keep_compiled to keep. "
            "Compile it first, or leave keep_compiled out"
        )
    kind = next(kind for kind in type(model).__mro__ if "compile" in vars(kind))
    if not is_stock(kind):
        raise RewriteError(
            f"how {label(model)} is compiled cannot be kept: its class has a compile() of its "
            f"own, whose arguments are not known. {_COMPILE_IT}"
        )
    others = [
        name
        for name, value in attributes(model, keras).items()
        if name != "optimizer" and any(isinstance(leaf, keras.optimizers) for leaf in leaves(value))
    ]
    if others:
        raise RewriteError(
            f"how {label(model)} is compiled cannot be kept: it also trains with the optimizers "
            f"in {listed(others)}, whose state would be left behind. {_COMPILE_IT}"
        )
    optimizer = model.optimizer
    if optimizer is not None and not isinstance(optimizer, keras.optimizers):
        raise RewriteError(
            f"how {label(model)} is compiled cannot be kept: its optimizer is a "
            f"{type(optimizer).__name__}, not one of {keras.package}. {_COMPILE_IT}"
        )


def compile_like(old: Any, new: Any, keras: KerasAdapter) -> None:
    """Compiles a copy of a model for training as the model is compiled.

    Args:
        old: the model.
        new: its copy, with training layers in the places of BatchNormalizations.
        keras: the adapter of their Keras.

    Raises:
        RewriteError: the optimizer or a metric cannot be copied, or state of the optimizer has no
            place in the copy.
    """
    check_compiled(old, keras)
    optimizer = None if old.optimizer is None else _with_state(old, new, keras)
    arguments = keras.compile_arguments(old)
    for name in ("metrics", "weighted_metrics"):
        arguments[name] = keras.map_structure(
            lambda metric: _copied_metric(old, metric, keras), arguments[name]
        )
    new.compile(optimizer, **arguments)


def counterparts(old: Any, new: Any, keras: KerasAdapter) -> dict[int, Any]:
    """The weights of a copy that do the work of a model's, by the ids of these.

    A weight that nothing in the copy does the work of is missing.
    """
    found: dict[int, Any] = {}
    taken: set[int] = set()
    for old_part, new_part in zip(parts(old), parts(new), strict=True):
        for old_own, new_own in _own_pairs(old_part, new_part, keras):
            found[id(old_own)] = new_own
            taken.add(id(new_own))
    # The rest is kept where Keras does not look, in the same order in both.
    rest = [v for v in keras.variables(old) if id(v) not in found]
    new_rest = [v for v in keras.variables(new) if id(v) not in taken]
    if [_size(v) for v in rest] == [_size(v) for v in new_rest]:
        found.update(zip(map(id, rest), new_rest, strict=True))
    return found


def _own_pairs(old: Any, new: Any, keras: KerasAdapter) -> Iterator[tuple[Any, Any]]:
    if type(old) is type(new) or not is_batch_norm(old, keras):
        yield from zip(keras.own_variables(old), keras.own_variables(new), strict=True)
        return
    moving = ("moving_mean", "moving_variance")
    names = ((*affine_weights(layer, keras), *moving) for layer in (old, new))
    for old_name, new_name in zip(*names, strict=True):
        if old_name:
            yield getattr(old, old_name), getattr(new, new_name)


# ----------------------------------------------------------------------------- optimizers


def _with_state(old: Any, new: Any, keras: KerasAdapter) -> Any:
    """A copy of a model's optimizer, with its state, for the weights of a copy of the model."""
    optimizer = old.optimizer
    found = counterparts(old, new, keras)
    known = keras.known_variables(optimizer, keras.variables(old))
    for variable in known or ():
        if id(variable) not in found:
            if variable is None:
                why = "a weight that is not the model's (does it train another model, too?)"
            else:
                why = f"a weight that has no counterpart in the new model: {variable.name}"
            raise RewriteError(
                f"the optimizer of {label(old)} keeps state for {why}. {_COMPILE_IT}"
            )
    copied = _copied_optimizer(optimizer, keras)
    _exclude_from_decay(
        optimizer, copied, old.trainable_variables if known is None else known, found, keras
    )
    if known is not None:
        keras.build_optimizer(copied, [found[id(variable)] for variable in known])
        _copy_state(optimizer, copied, keras)
    return copied


def _copied_optimizer(optimizer: Any, keras: KerasAdapter) -> Any:
    """An optimizer of the same class and configuration, without state."""
    kind = type(optimizer)
    inner = keras.inner_optimizer(optimizer)
    try:
        config = dict(optimizer.get_config())
        if inner is not optimizer:  # which scales losses, and holds it
            del config["inner_optimizer"]
            return kind(_copied_optimizer(inner, keras), **config)
        # Functions and schedules themselves: their configurations may name what is not registered.
        functions = {k: v for k, v in keras.functions_of(optimizer).items() if k in config}
        return kind.from_config(config | functions)
    except RewriteError:
        raise
    except Exception as error:  # a class of the user's may raise anything
        raise RewriteError(
            f"the optimizer {kind.__name__} cannot be copied from its configuration: "
            f"{cause_of(error)} Define get_config() so that it returns the arguments of "
            f"__init__, or leave keep_compiled out"
        ) from error


def _exclude_from_decay(
    old: Any, new: Any, variables: list[Any], found: dict[int, Any], keras: KerasAdapter
) -> None:
    """Has weights decay where their counterparts do, which may be for their names."""
    old, new = keras.inner_optimizer(old), keras.inner_optimizer(new)
    if not hasattr(old, "_use_weight_decay"):
        return
    excluded = [found[id(v)] for v in variables if id(v) in found and not old._use_weight_decay(v)]
    if excluded:
        new.exclude_from_weight_decay(var_list=excluded)


def _copy_state(old: Any, new: Any, keras: KerasAdapter) -> None:
    states, new_states = keras.optimizer_state(old), keras.optimizer_state(new)
    sizes, new_sizes = [_size(v) for v in states], [_size(v) for v in new_states]
    if sizes != new_sizes:
        raise RewriteError(
            f"the state of the optimizer {type(old).__name__} cannot be kept: {len(sizes)} "
            f"variables with {sum(sizes)} numbers, where one for the new model has "
            f"{len(new_sizes)} with {sum(new_sizes)}, in other places. {_COMPILE_IT}"
        )
    for state, new_state in zip(states, new_states, strict=True):
        new_state.assign(state.numpy().reshape(tuple(new_state.shape)))


def _size(variable: Any) -> int:
    return math.prod(variable.shape)


# -------------------------------------------------------------------------------- metrics


def _copied_metric(model: Any, metric: Any, keras: KerasAdapter) -> Any:
    """A metric like another, without its state; names of metrics and functions as they are."""
    base: Any = keras.metric
    if not isinstance(metric, base):
        return metric
    kind = type(metric)
    functions = [value for value in vars(metric).values() if hasattr(value, "__name__")]
    try:
        with keras.scope({f.__name__: f for f in functions} | {kind.__name__: kind}):
            config = metric.get_config()
            return kind.from_config({**config, "name": keras.name_given(model, metric)})
    except Exception as error:  # a class of the user's may raise anything
        raise RewriteError(
            f"the metric {kind.__name__} '{metric.name}' cannot be copied from its "
            f"configuration: {cause_of(error)} Define get_config() so that it returns the "
            "arguments of __init__, or leave keep_compiled out"
        ) from error
