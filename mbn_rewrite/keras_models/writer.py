"""Carries out a plan on a copy of a Keras model.

Every layer is copied from its configuration and called again in the order of the original,
except that removed BatchNormalizations are passed by, replaced ones give way to another
layer of the same name, and layers that absorbed a map get a bias where they had none. As
soon as a layer is built its weights are set, so that no more than one layer's initial values
are held beside them: computed ones where the plan has an edit, the original's values
everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mbn_rewrite.algebra import ChannelMap, fold
from mbn_rewrite.decisions import Edit, Plan, Sampled
from mbn_rewrite.errors import RewriteError, cause_of
from mbn_rewrite.keras_models import weights
from mbn_rewrite.keras_models.copying import config_of, copy_weights, from_config
from mbn_rewrite.keras_models.describe import affine_weights
from mbn_rewrite.keras_models.dialect import Dialect, LayerCall
from mbn_rewrite.keras_models.holders import Place, at, exchange, held, label
from mbn_rewrite.keras_models.reader import Reading
from mbn_rewrite.layouts import einsum_channels

# They were meant for the weights as they were, and would spoil the folded ones.
_MEANT_FOR_OLD_WEIGHTS = {
    f"{weight}_{kind}"
    for weight in ("kernel", "bias", "depthwise", "pointwise", "gamma", "beta")
    for kind in ("regularizer", "constraint")
}


def write(model: Any, reading: Reading, plan: Plan, dialect: Dialect) -> Any:
    """A rewritten copy of a model.

    Args:
        model: the model that was read.
        reading: what was read of it.
        plan: what was planned for it.

    Raises:
        RewriteError: a layer cannot be copied.
    """
    writer = _Writer(reading, plan, dialect)
    new = writer.model(model) if dialect.is_visible(model) else writer.subclassed(model)
    writer.exchange_in_holders()
    missed = plan.touched ^ writer.done
    if missed:  # a defect of this library, never of the model
        raise RewriteError(f"the plan was not carried out on {sorted(missed)}; please report this")
    return new


class _Writer:
    def __init__(self, reading: Reading, plan: Plan, dialect: Dialect) -> None:
        self.dialect = dialect
        self.layers = dialect.keras.layers
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
            is_sequential = type(old) is self.dialect.keras.Sequential
            new = self._sequential(old) if is_sequential else self._functional(old)
            self._copies[id(old)] = new
            if new.trainable != old.trainable:
                self.dialect.set_own_trainable(new, old.trainable)
        return self._copies[id(old)]

    def _functional(self, old: Any) -> Any:
        tensors: dict[int, Any] = {}
        outputs = {id(t) for t in old.outputs}
        for call in self.dialect.calls_of(old):
            if self._owner(call.layer) in self.plan.removed:
                self.done.add(self._owner(call.layer))
                (given,) = call.outputs
                tensors[id(given)] = self._passed_by(
                    call.layer, tensors[id(call.tensors[0])], id(given) in outputs
                )
                continue
            new = self.layer(call)
            results = self._results(new, call, tensors)
            self._finish()
            for tensor, result in zip(call.outputs, results, strict=True):
                tensors[id(tensor)] = result
        return self.dialect.new_functional(old, tensors)

    def _results(self, new: Any, call: LayerCall, tensors: dict[int, Any]) -> list[Any]:
        """What a new layer gives when it is called as the old one was, with new tensors."""
        if call.is_input:
            (made,) = self.dialect.calls_on(new)
            return made.outputs
        args, kwargs = self.dialect.map_structure(
            lambda t: tensors.get(id(t), t), (call.args, dict(call.kwargs))
        )
        return self.dialect.flatten(_called(new, args, kwargs))

    def _sequential(self, old: Any) -> Any:
        calls = {id(call.layer): call for call in self.dialect.calls_of(old)}

        def new_layers() -> Iterator[Any]:
            for layer in old.layers:
                if self._owner(layer) not in self.plan.removed:
                    yield self.layer(calls[id(layer)])
                    continue
                self.done.add(self._owner(layer))
                if layer is old.layers[-1]:
                    yield self._standing_in_for(layer)

        new = self.dialect.new_sequential(old, self._copied, new_layers(), self._finish)
        self._finish()
        return new

    def subclassed(self, old: Any) -> Any:
        """A copy of a model that calls its layers in Python code."""
        self._check_not_traced(old)
        new = self._copied(old)
        self.dialect.call_as_before(old, new)
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
            self._copies[id(layer)] = self._standing_in_for(layer)
        return self._copies[id(layer)](tensor)

    def layer(self, call: LayerCall) -> Any:
        """The new layer for a call, the same for all calls of one layer."""
        old = call.layer
        if self.dialect.is_visible(old):
            return self.model(old)
        if id(old) not in self._copies:
            owner = self._owner(old)
            if owner in self.plan.replaced:
                rank = len(call.outputs[0].shape)
                new = self._replacement(old, rank, owner in self.reading.masked)
            elif owner in self.plan.sampled:
                new = self._sampled(old, self.plan.sampled[owner])
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
        operation = self.dialect.without_weights(old)
        if operation is not None:
            return operation
        new = from_config(old, config_of(old), self.dialect)
        self._unfinished.append(lambda: copy_weights(old, new, self.dialect))
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
        if needs_bias and isinstance(old, self.layers.EinsumDense) and not config["bias_axes"]:
            config["bias_axes"] = einsum_channels(old.equation)
        new = from_config(old, config, self.dialect)
        self._drop_what_was_meant_for_old_weights(new)

        def finish() -> None:
            copy_weights(old, new, self.dialect)
            _fold_in(old, new, edit, needs_bias)

        self._unfinished.append(finish)
        return new

    def _renewed(self, old: Any, m: ChannelMap) -> Any:
        """A BatchNormalization with another map, by way of its gamma and beta."""
        self.done.add(self._owner(old))
        config = config_of(old) | {"scale": True, "center": True}
        new = from_config(old, config, self.dialect)
        self._drop_what_was_meant_for_old_weights(new)

        def finish() -> None:
            mean, variance = (
                weights.read(old, f"moving_{name}").astype(np.float64)
                for name in ("mean", "variance")
            )
            new.moving_mean.assign(old.moving_mean)
            new.moving_variance.assign(old.moving_variance)
            gamma, beta = affine_weights(new, self.dialect)
            scale = m.scale * np.sqrt(variance + self.dialect.epsilon(old))
            _write_affine(new, gamma, scale)
            _write_affine(new, beta, m.shift + mean * m.scale)

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
            new = self.layers.DepthwiseConv2D(1, data_format=layout, **common)
        elif rank == 3 and last and not masked:
            new = self.layers.DepthwiseConv1D(1, data_format="channels_last", **common)
        else:
            new = self.dialect.scale_and_shift(m.axis, **common)

        def finish() -> None:
            if not new.built:  # held by a layer, so that no call has built it
                new.build([m.channels if i == m.axis else None for i in range(rank)])
            if isinstance(new, self.dialect.scale_and_shift):
                weights.write(new, "scale", m.scale)
                weights.write(new, "shift", m.shift)
                return
            kernel_shape = (1,) * (rank - 2) + (-1, 1)
            weights.write(new, self.dialect.depthwise_kernel, m.scale.reshape(kernel_shape))
            weights.write(new, "bias", m.shift)

        self._unfinished.append(finish)
        return new

    def _sampled(self, old: Any, sampled: Sampled) -> Any:
        """The training layer that takes a BatchNormalization's place, with its weights."""
        self.done.add(self._owner(old))
        kind = self.dialect.training_layers[sampled.depthwise]
        own = {"stride": sampled.stride, "synchronized": bool(getattr(old, "synchronized", False))}
        new = from_config(old, config_of(old) | own, self.dialect, kind)

        def finish() -> None:
            if not new.built:  # held by a layer, so that no call has built it
                new.build(self.dialect.input_shape(old))
            for name in ("moving_mean", "moving_variance"):
                getattr(new, name).assign(getattr(old, name))
            names = affine_weights(old, self.dialect), affine_weights(new, self.dialect)
            for old_name, new_name in zip(*names, strict=True):
                if new_name:
                    _write_affine(new, new_name, weights.read(old, old_name))
            self.dialect.set_own_trainable(new, old.trainable)

        self._unfinished.append(finish)
        return new

    # -- layers that hold layers ---------------------------------------------------------

    def exchange_in_holders(self) -> None:
        """Exchanges, in copies of layers that hold others, those with something planned."""
        while self._holders:  # making what is put in their place may copy more holders
            self._exchange_held(*self._holders.pop(0))

    def _exchange_held(self, old: Any, new: Any) -> None:
        for place, inner in held(old, self.dialect):
            if not self._is_planned(inner):
                continue
            self._check_not_traced(old)
            inner_copy = _counterpart(new, place)
            if self.dialect.is_visible(inner):
                exchange(new, place, inner_copy, self.model(inner), self.dialect)
            elif self._owner(inner) in {**self.plan.replaced, **self.plan.sampled}:
                exchange(new, place, inner_copy, self._held_replacement(inner), self.dialect)
            else:
                self._exchange_held(inner, inner_copy)

    def _held_replacement(self, old: Any) -> Any:
        if id(old) not in self._copies:
            owner = self._owner(old)
            if owner in self.plan.sampled:
                self._copies[id(old)] = self._sampled(old, self.plan.sampled[owner])
            else:
                # A mask may reach it; only ScaleAndShift lets masks flow on in every rank.
                rank = old.input_spec.ndim
                self._copies[id(old)] = self._replacement(old, rank, masked=rank == 3)
            self._finish()
        return self._copies[id(old)]

    def _is_planned(self, layer: Any) -> bool:
        return any(self._owner(part) in self._touched for part in self.dialect.parts(layer))

    # -- what is the same for all ------------------------------------------------------

    def _standing_in_for(self, layer: Any) -> Any:
        """Keeps the name of an output whose BatchNormalization is gone; computes nothing."""
        return self.layers.Activation("linear", name=layer.name, dtype=layer.dtype_policy)

    def _drop_what_was_meant_for_old_weights(self, layer: Any) -> None:
        for part in self.dialect.parts(layer):
            for name in _MEANT_FOR_OLD_WEIGHTS & set(vars(part)):
                setattr(part, name, None)

    def _check_not_traced(self, layer: Any) -> None:
        if self.dialect.is_traced(layer):
            raise RewriteError(
                f"{label(layer)} cannot be rewritten: its call method is a tf.function, which goes "
                "on calling the layers it was traced with. Remove the decorator; Keras compiles "
                "predict() and saved models all the same"
            )


# -------------------------------------------------------------------------------- helpers


def _write_affine(layer: Any, name: str, array: np.ndarray) -> None:
    """Sets what scales or shifts each channel, of whatever rank the weight is."""
    shape = tuple(getattr(layer, name).shape)
    weights.write(layer, name, array.reshape(shape))


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


def _fold_in(old: Any, new: Any, edit: Edit, needs_bias: bool) -> None:
    """Sets the weights that absorb an edit."""
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


def _counterpart(holder: Any, place: Place) -> Any:
    try:
        return at(holder, place)
    except (AttributeError, KeyError, IndexError) as error:
        raise RewriteError(
            f"{label(holder)} was copied without its attribute '{place.attribute}': make the "
            "layer in __init__ or build, so that a copy of the model has it too"
        ) from error
