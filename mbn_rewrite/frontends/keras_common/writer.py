"""Carries out a plan on a copy of a model made of layers.

Every layer is copied from its configuration and called again in the order of the original,
except that removed BatchNormalizations are passed by, replaced ones give way to another
layer of the same name, and layers that absorbed a map get a bias where they had none, or
give way to a layer of the same name that adds a border map. As soon as a layer is built its
weights are set, so that no more than one layer's initial values are held beside them:
computed ones where the plan has an edit, the original's values everywhere else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mbn_rewrite.errors import RewriteError, cause_of
from mbn_rewrite.frontends.keras_common import weights
from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter, Record
from mbn_rewrite.frontends.keras_common.cloning import (
    config_of,
    copy_weights,
    from_config,
    label,
    parts,
    take_over_initializers,
)
from mbn_rewrite.frontends.keras_common.nested import Place, at, exchange, held
from mbn_rewrite.frontends.keras_common.own_classes import (
    Belongings,
    CheckedConfig,
    attributes,
    needs_check,
)
from mbn_rewrite.frontends.keras_common.reader import Reading
from mbn_rewrite.frontends.keras_common.replacements import (
    build_like,
    replacement,
    set_map,
    standing_for,
    training_layer,
)
from mbn_rewrite.ir.algebra import Kernel, fold
from mbn_rewrite.ir.graph import Linear
from mbn_rewrite.ir.layouts import einsum_channels
from mbn_rewrite.plans import Fold, Plan, Remap, Remove, Replace, Sample

# They were meant for the weights as they were, and would spoil the folded ones.
_MEANT_FOR_OLD_WEIGHTS = {
    f"{weight}_{kind}"
    for weight in ("kernel", "bias", "depthwise", "pointwise", "gamma", "beta")
    for kind in ("regularizer", "constraint")
}


class Writer(ABC):
    """Writes one model; each front end says how its models are put together.

    Args:
        keras: the model's Keras.
        reading: what was read of the model.
        plan: what was planned for it.
    """

    def __init__(self, keras: KerasAdapter, reading: Reading, plan: Plan) -> None:
        self.keras = keras
        self.reading = reading
        self.plan = plan
        self.done: set[str] = set()
        self._unfinished: list[Callable[[], None]] = []  # what sets weights, once built
        self._holders: list[tuple[Any, Any]] = []  # layers that may hold layers, and copies
        self._copies: dict[int, Any] = {}
        self._models: list[tuple[Any, Any]] = []  # whose attributes are still to be taken over
        self._tensors: dict[int, Any] = {}  # id(a Keras tensor) -> that of the copy

    def write(self, model: Any) -> Any:
        """A rewritten copy of a model.

        Raises:
            RewriteError: a layer cannot be copied.
        """
        new = self.model(model) if self.keras.is_visible(model) else self._subclassed(model)
        belongings = Belongings(self.keras, self._counterpart, self._tensors)
        while self._models or self._holders:  # what is put in their place may bring more of them
            if self._models:
                self._take_over_attributes(*self._models.pop(0), belongings)
            else:
                self._exchange_held(*self._holders.pop(0))
        missed = set(self.plan.actions) ^ self.done
        if missed:  # a defect of this library, never of the model
            raise RewriteError(
                f"the plan was not carried out on {sorted(missed)}; please report this"
            )
        return new

    # -- models ------------------------------------------------------------------------

    @abstractmethod
    def sequential(self, old: Any) -> Any:
        """A copy of a Sequential model."""

    @abstractmethod
    def functional(self, old: Any, tensors: dict[int, Any]) -> Any:
        """A model of a Functional model's kind.

        Args:
            old: the Functional model.
            tensors: id(a Keras tensor of it) -> the Keras tensor that stands for it.
        """

    @abstractmethod
    def built_as(self, old: Any, new: Any) -> None:
        """Builds the copy of a model that calls its layers in Python code."""

    @abstractmethod
    def set_own_trainable(self, model: Any, trainable: bool) -> None:
        """Sets a model's flag without touching those of its layers."""

    def model(self, old: Any) -> Any:
        """A copy of a Functional or Sequential model."""
        if id(old) not in self._copies:
            is_sequential = isinstance(old, self.keras.sequential)
            if is_sequential:
                # First, since they set weights of all copies so far, and those of layers of a
                # Sequential model are not built one by one.
                for inner in filter(self.keras.is_visible, old.layers):
                    self.model(inner)
            new = self.sequential(old) if is_sequential else self._called_again(old)
            self._copies[id(old)] = new
            self._models.append((old, new))
            if new.trainable != old.trainable:
                self.set_own_trainable(new, old.trainable)
        return self._copies[id(old)]

    def _take_over_attributes(self, old: Any, new: Any, belongings: Belongings) -> None:
        """Gives the copy of a model what the original has beside its network."""
        made = set(vars(new))
        for name, value in attributes(old, self.keras).items():
            if name not in made:
                setattr(new, name, belongings.exchanged(value))
        self.finish()
        if needs_check(old, self.keras) and self._is_planned(old):
            vars(new)["get_config"] = CheckedConfig(new, self.keras)

    def _counterpart(self, old: Any) -> Any:
        """What a copy has in an attribute in which the original has this layer."""
        if self.keras.is_visible(old):
            return self.model(old)
        if id(old) in self._copies:
            return self._copies[id(old)]
        owner = self.owner(old)
        action = self.plan.actions.get(owner)
        if isinstance(action, Remove):
            new = self.standing_in_for(old)
        elif isinstance(action, (Replace, Sample)):
            return self._held_replacement(old)
        elif isinstance(old, self.keras.model):
            new = self._subclassed(old)
        elif old.variables:
            new = self.copied(old)
            self.keras.build_alike(old, new)
            self.finish()
        else:
            new = old  # which has nothing that could differ
        self._copies[id(old)] = new
        return new

    def _called_again(self, old: Any) -> Any:
        tensors: dict[int, Any] = {}
        outputs = {id(t) for t in old.outputs}
        for record in self.keras.calls_of(old):
            if self.is_removed(record.layer):
                (given,) = record.outputs
                tensors[id(given)] = self._passed_by(
                    record.layer, tensors[id(record.inputs[0])], id(given) in outputs
                )
                continue
            new = self.layer(record)
            if record.inputs:
                args, kwargs = self.keras.map_structure(
                    lambda t: tensors.get(id(t), t), (record.args, record.kwargs)
                )
                results = self.keras.flatten(called(new, args, kwargs))
            else:
                results = list(self.keras.all_calls_of(new)[0].outputs)
            self.finish()
            tensors.update(zip(map(id, record.outputs), results, strict=True))
        self._tensors.update(tensors)
        return self.functional(old, tensors)

    def _subclassed(self, old: Any) -> Any:
        self._check_not_traced(old)
        new = self.copied(old)
        self.built_as(old, new)
        self.finish()
        return new

    # -- layers ------------------------------------------------------------------------

    def finish(self) -> None:
        """Sets the weights of the layers that were built since the last time."""
        unfinished, self._unfinished = self._unfinished, []
        for finish in unfinished:
            finish()

    def owner(self, layer: Any) -> str:
        """The layer's name in the plan."""
        return self.reading.owners.get(id(layer), "")

    def _passed_by(self, layer: Any, tensor: Any, is_output: bool) -> Any:
        """What stands for the output of a removed layer."""
        if not is_output:
            return tensor
        if id(layer) not in self._copies:
            self._copies[id(layer)] = self.standing_in_for(layer)
        return self._copies[id(layer)](tensor)

    def standing_in_for(self, layer: Any) -> Any:
        """Keeps the name of an output whose BatchNormalization is gone; computes nothing."""
        return self.keras.layers.Activation(
            "linear", name=layer.name, dtype=layer.dtype_policy, trainable=layer.trainable
        )

    def layer(self, record: Record) -> Any:
        """The new layer for a call, the same for all calls of one layer."""
        old = record.layer
        if self.keras.is_visible(old):
            return self.model(old)
        if id(old) not in self._copies:
            owner = self.owner(old)
            rank = len(self.keras.shape_of(record.outputs[0])) if record.outputs else 0
            self._copies[id(old)] = self._acted_on(old, rank, owner in self.reading.masked)
        return self._copies[id(old)]

    def is_removed(self, layer: Any) -> bool:
        """Whether a layer vanishes, which is then done."""
        removed = isinstance(self.plan.actions.get(self.owner(layer)), Remove)
        if removed:
            self.done.add(self.owner(layer))
        return removed

    def _acted_on(self, old: Any, rank: int, masked: bool) -> Any:
        """The layer that an action makes of another; a copy where there is none.

        Args:
            old: the layer.
            rank: the number of dimensions of its input.
            masked: whether a mask may come with its input.
        """
        action = self.plan.actions.get(self.owner(old))
        if action is None:
            return self.copied(old)
        self.done.add(self.owner(old))
        return _WRITERS[type(action)](self, old, action, rank, masked)

    def copied(self, old: Any) -> Any:
        """A layer with the same configuration and the same weights."""
        if not isinstance(old, self.keras.layers.Layer):
            return self.keras.copy_of_operation(old)
        new = from_config(old, config_of(old, self.keras), self.keras)
        self._unfinished.append(lambda: copy_weights(old, new, self.keras))
        self._holders.append((old, new))
        return new

    def _folded(self, old: Any, edit: Fold, rank: int, masked: bool) -> Any:
        """A layer that has absorbed maps."""
        if edit.border is not None or edit.outer_bias:
            return self._stood_for(old, edit)
        needs_bias = edit.has_shift
        config = config_of(old, self.keras)
        for part in _configs_within(config):
            if needs_bias and "use_bias" in part:
                part["use_bias"] = True
        if (
            needs_bias
            and isinstance(old, self.keras.layers.EinsumDense)
            and not config["bias_axes"]
        ):
            config["bias_axes"] = einsum_channels(old.equation)
        new = from_config(old, config, self.keras)
        _drop_what_was_meant_for_old_weights(new)
        self._unfinished.append(lambda: self._set_folded(old, new, edit, needs_bias))
        return new

    def _stood_for(self, old: Any, edit: Fold) -> Any:
        """What has absorbed maps and adds for a convolution what this cannot add itself."""
        bordered = edit.border is not None
        kind = self.keras.bordered_convolution if bordered else self.keras.biased_convolution
        new = standing_for(self.keras, kind, old)
        _drop_what_was_meant_for_old_weights(new)
        self._unfinished.append(lambda: self._set_stood_for(old, new, edit))
        return new

    def _remapped(self, old: Any, action: Remap, rank: int, masked: bool) -> Any:
        """A BatchNormalization with another map, by way of its gamma and beta."""
        config = config_of(old, self.keras) | {"scale": True, "center": True}
        new = from_config(old, config, self.keras)
        _drop_what_was_meant_for_old_weights(new)
        self._unfinished.append(lambda: set_map(self.keras, old, new, action.map))
        return new

    def _replaced(self, old: Any, action: Replace, rank: int, masked: bool) -> Any:
        """The layer that takes a BatchNormalization's place, under its name."""
        new, finish = replacement(self.keras, old, action, rank, masked)
        _drop_what_was_meant_for_old_weights(new)
        self._unfinished.append(finish)
        return new

    def _sampled(self, old: Any, action: Sample, rank: int, masked: bool) -> Any:
        """The layer that trains in a BatchNormalization's place, under its name."""
        new, finish = training_layer(self.keras, old, action)
        self._unfinished.append(finish)
        return new

    def _set_folded(self, old: Any, new: Any, edit: Fold, needs_bias: bool) -> None:
        """Sets a new layer's weights to those of the old with the edit folded in."""
        copy_weights(old, new, self.keras)
        _drop_what_was_meant_for_old_weights(new)
        for part in parts(new):
            self.keras.settle(part)
        for kernels, bias in edit.op.chains:
            prefix = kernels[0].name.rpartition(".")[0]
            path = f"{prefix}." if prefix else ""
            new_bias = _fold_kernels(old, new, edit, kernels, bias)
            if bias or needs_bias:
                weights.write(new, path + "bias", new_bias)
                _check_range(old, new_bias, weights.read(new, path + "bias"))

    def _set_stood_for(self, old: Any, new: Any, edit: Fold) -> None:
        """Sets the kernels of what stands for a convolution, and what it adds."""
        assert isinstance(edit.op, Linear)
        added = _fold_kernels(old, new.layer, edit, edit.op.kernels, edit.op.bias)
        if edit.border is not None and edit.op.out_axis == 1:  # channels first
            added = np.moveaxis(added, -1, 0)
        name = "bias" if edit.border is None else "border"
        weights.write(new, name, added)
        _check_range(old, added, weights.read(new, name))
        new.layer.trainable = new.trainable = old.trainable
        take_over_initializers(old, new.layer, self.keras)

    # -- layers that hold layers ---------------------------------------------------------

    def _exchange_held(self, old: Any, new: Any) -> None:
        for place, inner in held(old, self.keras):
            if not self._is_planned(inner):
                self._put_back(new, place, inner)
                continue
            self._check_not_traced(old)
            if self.keras.is_visible(inner):
                exchange(new, place, self.model(inner), self.keras)
            elif isinstance(self.plan.actions.get(self.owner(inner)), (Replace, Sample)):
                exchange(new, place, self._held_replacement(inner), self.keras)
            else:
                self._exchange_held(inner, _held_at(new, place))

    def _put_back(self, holder: Any, place: Place, old: Any) -> None:
        """Copies training layers for which the code of their holder makes others."""
        if type(old) in self.keras.training_layers:
            if type(_held_at(holder, place)) is not type(old):
                exchange(holder, place, self._held_copy(old), self.keras)
        elif any(type(part) in self.keras.training_layers for part in parts(old)):
            self._exchange_held(old, _held_at(holder, place))

    def _held_copy(self, old: Any) -> Any:
        if id(old) not in self._copies:
            new = from_config(old, config_of(old, self.keras), self.keras)
            build_like(self.keras, old, new)
            copy_weights(old, new, self.keras)
            self._copies[id(old)] = new
        return self._copies[id(old)]

    def _held_replacement(self, old: Any) -> Any:
        if id(old) not in self._copies:
            rank = old.input_spec.ndim
            # A mask may reach it; only ScaleAndShift lets masks flow on in every rank.
            self._copies[id(old)] = self._acted_on(old, rank, masked=rank == 3)
            self.finish()
        return self._copies[id(old)]

    def _check_not_traced(self, layer: Any) -> None:
        if self.keras.traced(layer):
            raise RewriteError(
                f"{label(layer)} cannot be rewritten: its call method is a tf.function, which "
                "goes on calling the layers it was traced with. Remove the decorator; Keras "
                "compiles predict() and saved models all the same"
            )

    def _is_planned(self, layer: Any) -> bool:
        return any(self.owner(part) in self.plan.actions for part in parts(layer))


# How a layer is made that an action asks for. What is removed has none: its readers read its input.
_WRITERS: dict[type, Callable[..., Any]] = {
    Fold: Writer._folded,
    Remap: Writer._remapped,
    Replace: Writer._replaced,
    Sample: Writer._sampled,
}


# -------------------------------------------------------------------------------- helpers


def _fold_kernels(
    old: Any, new: Any, edit: Fold, kernels: Sequence[Kernel], bias: str | None
) -> np.ndarray:
    """Sets kernels of `new` to those of `old` with an edit folded in; gives the new bias."""
    before = [weights.read(old, kernel.name) for kernel in kernels]
    arrays, new_bias = fold(
        list(zip(kernels, before, strict=True)),
        weights.read(old, bias) if bias else None,
        before=edit.before,
        after=edit.after,
        border=edit.border,
    )
    for kernel, old_array, array in zip(kernels, before, arrays, strict=True):
        _check_range(old, old_array, array)
        weights.write(new, kernel.name, array)
    return new_bias


def _drop_what_was_meant_for_old_weights(layer: Any) -> None:
    for part in parts(layer):
        for name in _MEANT_FOR_OLD_WEIGHTS & set(vars(part)):
            setattr(part, name, None)


def called(layer: Any, args: Any, kwargs: Any) -> Any:
    """What the copy of a layer gives for these arguments.

    Raises:
        RewriteError: it cannot be called with them.
    """
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


def _check_range(layer: Any, before: np.ndarray, after: np.ndarray) -> None:
    """Raises RewriteError where folding took finite weights out of their dtype's range."""
    if np.all(np.isfinite(before)) and not np.all(np.isfinite(after)):
        raise RewriteError(
            f"{label(layer)} cannot absorb a BatchNormalization: weights would leave the range "
            f'of {after.dtype}. Use mode="depthwise" for this model'
        )


def _held_at(holder: Any, place: Place) -> Any:
    try:
        return at(holder, place)
    except (AttributeError, KeyError, IndexError) as error:
        raise RewriteError(
            f"{label(holder)} was copied without its attribute '{place.attribute}': make the "
            "layer in __init__ or build, so that a copy of the model has it too"
        ) from error
