"""Carries out a plan on a copy of a tf_keras model.

Every layer is copied from its configuration and called again in the order of the original,
except that removed BatchNormalizations are passed by, replaced ones give way to another
layer of the same name, and layers that absorbed a map get a bias where they had none. As
soon as a layer is built its weights are set, so that no more than one layer's initial values
are held beside them: computed ones where the plan has an edit, the original's values
everywhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from mbn_rewrite.algebra import ChannelMap, fold
from mbn_rewrite.decisions import Edit, Plan
from mbn_rewrite.errors import RewriteError, cause_of
from mbn_rewrite.layouts import einsum_channels
from mbn_rewrite.tf_keras_frontend import weights
from mbn_rewrite.tf_keras_frontend.copying import (
    config_of,
    copy_weights,
    from_config,
    label,
    parts,
)
from mbn_rewrite.tf_keras_frontend.describe import effective_epsilon
from mbn_rewrite.tf_keras_frontend.holders import Place, at, exchange, held
from mbn_rewrite.tf_keras_frontend.layers import ScaleAndShift
from mbn_rewrite.tf_keras_frontend.reader import Reading, calls_of, is_visible

keras = tf_keras.layers

# They were meant for the weights as they were, and would spoil the folded ones.
_MEANT_FOR_OLD_WEIGHTS = {
    f"{weight}_{kind}"
    for weight in ("kernel", "bias", "depthwise", "pointwise", "gamma", "beta")
    for kind in ("regularizer", "constraint")
}


def write(model: Any, reading: Reading, plan: Plan) -> Any:
    """A rewritten copy of a model.

    Args:
        model: the model that was read.
        reading: what was read of it.
        plan: what was planned for it.

    Raises:
        RewriteError: a layer cannot be copied.
    """
    writer = _Writer(reading, plan)
    new = writer.model(model) if is_visible(model) else writer.subclassed(model)
    writer.exchange_in_holders()
    missed = plan.touched ^ writer.done
    if missed:  # a defect of this library, never of the model
        raise RewriteError(f"the plan was not carried out on {sorted(missed)}; please report this")
    return new


class _Writer:
    def __init__(self, reading: Reading, plan: Plan) -> None:
        self.reading = reading
        self.plan = plan
        self.done: set[str] = set()
        self._touched = plan.touched
        self._unfinished: list[Callable[[], None]] = []  # what sets weights, once built
        self._holders: list[tuple[Any, Any]] = []  # layers that may hold layers, and copies
        self._copies: dict[int, Any] = {}

    # -- models ------------------------------------------------------------------------

    def model(self, old: Any) -> Any:
        """A copy of a Functional or Sequential model."""
        if id(old) not in self._copies:
            build = self._sequential if type(old) is tf_keras.Sequential else self._functional
            new = build(old)
            self._copies[id(old)] = new
            if new.trainable != old.trainable:
                _set_own_trainable(new, old.trainable)
        return self._copies[id(old)]

    def _functional(self, old: Any) -> Any:
        tensors: dict[int, Any] = {}
        outputs = {id(t) for t in old.outputs}
        for node in calls_of(old):
            given = tf.nest.flatten(node.outputs)
            if self._owner(node.layer) in self.plan.removed:
                self.done.add(self._owner(node.layer))
                tensors[id(given[0])] = self._passed_by(
                    node.layer, tensors[id(node.keras_inputs[0])], id(given[0]) in outputs
                )
                continue
            new = self.layer(node)
            if node.is_input:
                results = new._inbound_nodes[0].outputs
            else:
                args, kwargs = tf.nest.map_structure(
                    lambda t: tensors.get(id(t), t), (node.call_args, node.call_kwargs)
                )
                results = _called(new, args, kwargs)
            self._finish()
            for tensor, result in zip(given, tf.nest.flatten(results), strict=True):
                tensors[id(tensor)] = result
        inputs, results = tf.nest.map_structure(
            lambda t: tensors[id(t)], (old._nested_inputs, old._nested_outputs)
        )
        return _functional_class(old)(inputs, results, name=old.name)

    def _sequential(self, old: Any) -> Any:
        new = tf_keras.Sequential(name=old.name)
        if old._has_explicit_input_shape:
            input_layer = old.inputs[0]._keras_history.layer
            new.add(self._copied(input_layer))
        nodes = {id(node.layer): node for node in calls_of(old)}
        for layer in old.layers:
            if self._owner(layer) not in self.plan.removed:
                new.add(self.layer(nodes[id(layer)]))
                if new.built:
                    self._finish()
                continue
            self.done.add(self._owner(layer))
            if layer is old.layers[-1]:
                new.add(_standing_in_for(layer))
        if not new.built:
            # As `build` does, which has no argument for the dtype.
            new._build_graph_network_for_inferred_shape(old.input_shape, old.inputs[0].dtype)
        self._finish()
        return new

    def subclassed(self, old: Any) -> Any:
        """A copy of a model that calls its layers in Python code."""
        _check_not_traced(old)
        new = self._copied(old)
        spec = old.save_spec(dynamic_batch=False)
        if spec is None:
            raise RewriteError(
                f"{label(old)} was built but never called, so it is not known how to call its "
                "copy. Call it once on data"
            )
        arguments, keywords = spec
        _called(
            new,
            tf.nest.map_structure(_zeros, arguments),
            tf.nest.map_structure(_zeros, keywords),
        )
        self._finish()
        return new

    # -- layers ------------------------------------------------------------------------

    def _finish(self) -> None:
        """Sets the weights of the layers that were built since the last time."""
        unfinished, self._unfinished = self._unfinished, []
        for finish in unfinished:
            finish()

    def _owner(self, layer: Any) -> str:
        return self.reading.owners.get(id(layer), "")

    def _passed_by(self, layer: Any, tensor: Any, is_output: bool) -> Any:
        """What stands for the output of a removed layer."""
        if not is_output:
            return tensor
        if id(layer) not in self._copies:
            self._copies[id(layer)] = _standing_in_for(layer)
        return self._copies[id(layer)](tensor)

    def layer(self, node: Any) -> Any:
        """The new layer for a call, the same for all calls of one layer."""
        old = node.layer
        if is_visible(old):
            return self.model(old)
        if id(old) not in self._copies:
            owner = self._owner(old)
            if owner in self.plan.replaced:
                new = self._replacement(old, len(node.outputs.shape), owner in self.reading.masked)
            elif owner in self.plan.renewed:
                new = self._renewed(old, self.plan.renewed[owner])
            elif owner in self.plan.edits:
                new = self._edited(old, self.plan.edits[owner])
            else:
                new = self._copied(old)
            self._copies[id(old)] = new
        return self._copies[id(old)]

    def _copied(self, old: Any) -> Any:
        """A layer with the same configuration and the same weights."""
        new = from_config(old, config_of(old))
        self._unfinished.append(lambda: copy_weights(old, new))
        self._holders.append((old, new))
        return new

    def _edited(self, old: Any, edit: Edit) -> Any:
        """A layer that has absorbed maps."""
        self.done.add(self._owner(old))
        needs_bias = any(m is not None and m.has_shift for m in (edit.before, edit.after))
        config = config_of(old)
        for part in _configs_within(config):
            if needs_bias and "use_bias" in part:
                part["use_bias"] = True
        if needs_bias and isinstance(old, keras.EinsumDense) and not config["bias_axes"]:
            config["bias_axes"] = einsum_channels(old.equation)
        new = from_config(old, config)
        _drop_what_was_meant_for_old_weights(new)
        self._unfinished.append(lambda: _set_folded(old, new, edit, needs_bias))
        return new

    def _renewed(self, old: Any, m: ChannelMap) -> Any:
        """A BatchNormalization with another map, by way of its gamma and beta."""
        self.done.add(self._owner(old))
        new = from_config(old, config_of(old) | {"scale": True, "center": True})
        _drop_what_was_meant_for_old_weights(new)

        def finish() -> None:
            mean, variance = (
                weights.read(old, f"moving_{name}").astype(np.float64)
                for name in ("mean", "variance")
            )
            new.moving_mean.assign(old.moving_mean)
            new.moving_variance.assign(old.moving_variance)
            weights.write(new, "gamma", m.scale * np.sqrt(variance + effective_epsilon(old)))
            weights.write(new, "beta", m.shift + mean * m.scale)

        self._unfinished.append(finish)
        return new

    def _replacement(self, old: Any, rank: int, masked: bool) -> Any:
        """The layer that does a BatchNormalization's map in its place, under its name."""
        owner = self._owner(old)
        self.done.add(owner)
        m = self.plan.replaced[owner]
        common: dict[str, Any] = {
            "name": old.name,
            "dtype": old.dtype_policy,
            "trainable": old.trainable,
        }
        last = m.axis == rank - 1
        if rank == 4 and m.axis in (1, 3) and not masked:
            layout = "channels_last" if last else "channels_first"
            new = keras.DepthwiseConv2D(1, data_format=layout, **common)
        elif rank == 3 and last and not masked:
            new = keras.DepthwiseConv1D(1, data_format="channels_last", **common)
        else:
            new = ScaleAndShift(m.axis, **common)

        def finish() -> None:
            if not new.built:  # held by a layer, so that no call has built it
                new.build([m.channels if i == m.axis else None for i in range(rank)])
            scale, shift = (
                ("scale", "shift")
                if isinstance(new, ScaleAndShift)
                else ("depthwise_kernel", "bias")
            )
            weights.write(new, scale, m.scale.reshape((1,) * (rank - 2) + (-1, 1))
                          if scale == "depthwise_kernel" else m.scale)  # fmt: skip
            weights.write(new, shift, m.shift)

        self._unfinished.append(finish)
        return new

    # -- layers that hold layers ---------------------------------------------------------

    def exchange_in_holders(self) -> None:
        """Exchanges, in copies of layers that hold others, those with something planned."""
        while self._holders:  # making what is put in their place may copy more holders
            self._exchange_held(*self._holders.pop(0))

    def _exchange_held(self, old: Any, new: Any) -> None:
        for place, inner in held(old):
            if not self._is_planned(inner):
                continue
            _check_not_traced(old)
            if is_visible(inner):
                exchange(new, place, self.model(inner))
            elif self._owner(inner) in self.plan.replaced:
                exchange(new, place, self._held_replacement(inner))
            else:
                self._exchange_held(inner, _counterpart(new, place))

    def _held_replacement(self, old: Any) -> Any:
        if id(old) not in self._copies:
            # A mask may reach it; only ScaleAndShift lets masks flow on in every rank.
            rank = old.input_spec.ndim
            self._copies[id(old)] = self._replacement(old, rank, masked=rank == 3)
            self._finish()
        return self._copies[id(old)]

    def _is_planned(self, layer: Any) -> bool:
        return any(self._owner(part) in self._touched for part in parts(layer))


# -------------------------------------------------------------------------------- helpers


def _drop_what_was_meant_for_old_weights(layer: Any) -> None:
    for part in parts(layer):
        for name in _MEANT_FOR_OLD_WEIGHTS & set(vars(part)):
            setattr(part, name, None)


def _called(layer: Any, args: Any, kwargs: Any) -> Any:
    try:
        return layer(*args, **kwargs)
    except Exception as error:
        raise RewriteError(
            f"the copy of {label(layer)} cannot be called as the original was: "
            f"{cause_of(error)} Check that its get_config() describes it fully"
        ) from error


def _configs_within(config: dict[str, Any]) -> list[dict[str, Any]]:
    """A layer's configuration, and those of the layers that it wraps."""
    inner = [config[key]["config"] for key in ("layer", "backward_layer") if key in config]
    return [config, *inner]


def _set_folded(old: Any, new: Any, edit: Edit, needs_bias: bool) -> None:
    """Sets a new layer's weights to those of the old with the edit folded in."""
    copy_weights(old, new)
    for kernels, bias in edit.op.chains:
        prefix = kernels[0].name.rpartition(".")[0]
        path = f"{prefix}." if prefix else ""
        before = [weights.read(old, kernel.name) for kernel in kernels]
        arrays, new_bias = fold(
            list(zip(kernels, before, strict=True)),
            weights.read(old, bias) if bias else None,
            before=edit.before,
            after=edit.after,
        )
        for kernel, old_array, array in zip(kernels, before, arrays, strict=True):
            _check_range(old, old_array, array)
            weights.write(new, kernel.name, array)
        if bias or needs_bias:
            weights.write(new, path + "bias", new_bias)
            _check_range(old, new_bias, weights.read(new, path + "bias"))


def _check_range(layer: Any, before: np.ndarray, after: np.ndarray) -> None:
    """Raises RewriteError where folding took finite weights out of their dtype's range."""
    if np.all(np.isfinite(before)) and not np.all(np.isfinite(after)):
        raise RewriteError(
            f"{label(layer)} cannot absorb a BatchNormalization: weights would leave the range "
            f'of {after.dtype}. Use mode="depthwise" for this model'
        )


def _standing_in_for(layer: Any) -> Any:
    """Keeps the name of an output whose BatchNormalization is gone; computes nothing."""
    return keras.Activation("linear", name=layer.name, dtype=layer.dtype_policy)


def _check_not_traced(layer: Any) -> None:
    if hasattr(type(layer).call, "get_concrete_function"):
        raise RewriteError(
            f"{label(layer)} cannot be rewritten: its call method is a tf.function, which goes on "
            "calling the layers it was traced with. Remove the decorator; Keras compiles "
            "predict() and saved models all the same"
        )


def _functional_class(model: Any) -> type:
    """The model's class where it is made as Functional models are, or else Functional."""
    arguments = inspect.getfullargspec(type(model).__init__).args
    made_alike = arguments == ["self", "inputs", "outputs", "name", "trainable"]
    return type(model) if made_alike else tf_keras.Model


def _set_own_trainable(model: Any, trainable: bool) -> None:
    """Sets a model's flag without touching those of its layers, which setting it changes."""
    flags = [(layer, layer.trainable) for layer in parts(model) if layer is not model]
    model.trainable = trainable
    for layer, flag in flags:
        layer._trainable = flag


def _zeros(spec: Any) -> Any:
    if not isinstance(spec, tf.TensorSpec):
        return spec
    return tf.zeros([1 if size is None else size for size in spec.shape], spec.dtype)


def _counterpart(holder: Any, place: Place) -> Any:
    try:
        return at(holder, place)
    except (AttributeError, KeyError, IndexError) as error:
        raise RewriteError(
            f"{label(holder)} was copied without its attribute '{place.attribute}': make the "
            "layer in __init__ or build, so that a copy of the model has it too"
        ) from error
