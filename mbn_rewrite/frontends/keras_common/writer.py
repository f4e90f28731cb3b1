"""Carries out a plan on a copy of a model made of layers.

Every layer is copied from its configuration and called again in the order of the original. Removed
BatchNormalizations are bypassed, replaced ones give way to another layer of the same name. Layers
that absorb a map are given a bias if they have none, or give way to a layer of the same name that
adds a border map. The weights of a layer are set as soon as it is built, so that only one layer's
initial values are in memory beside them: computed values where the plan has an edit, the
original's everywhere else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from mbn_rewrite.errors import CopyError, RewriteError, cause_of
from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter
from mbn_rewrite.frontends.keras_common.calls import Record
from mbn_rewrite.frontends.keras_common.clips import clip_layer
from mbn_rewrite.frontends.keras_common.cloning import (
    check_own_layers,
    config_of,
    copy_weights,
    from_config,
    has_the_same_layers,
    is_stock,
    label,
    parts,
)
from mbn_rewrite.frontends.keras_common.custom_models import (
    AttributeCopier,
    CheckedConfig,
    attributes,
    copied_by_attributes,
    made_without_constructor,
    needs_check,
)
from mbn_rewrite.frontends.keras_common.folded_layers import folded_layer
from mbn_rewrite.frontends.keras_common.reader import Reading
from mbn_rewrite.frontends.keras_common.replacements import (
    build_like,
    remapped_layer,
    replacement,
    training_layer,
)
from mbn_rewrite.frontends.keras_common.sublayers import (
    Place,
    replace_sublayer,
    sublayer_at,
    sublayers,
)
from mbn_rewrite.ir.channel_map import Array
from mbn_rewrite.plans import Fold, Plan, Reclip, Remap, Remove, Replace, Sample


class Writer(ABC):
    """Writer of one model; each front end adds how its models are assembled.

    Args:
        keras: the adapter of the model's Keras.
        reading: the model as it was read.
        plan: the plan for it.
    """

    def __init__(self, keras: KerasAdapter, reading: Reading, plan: Plan) -> None:
        self.keras = keras
        self.reading = reading
        self.plan = plan
        self.done: set[str] = set()
        self._unfinished: list[Callable[[], None]] = []  # set the weights of layers, once built
        self._parents: list[tuple[Any, Any]] = []  # layers that may have sublayers, and copies
        self._copies: dict[int, Any] = {}  # id(layer) -> its copy
        self._models: list[tuple[Any, Any]] = []  # whose attributes are still to be copied
        self._tensors: dict[int, Any] = {}  # id(Keras tensor) -> that of the copy
        self._copier = AttributeCopier(keras, self._counterpart, self._tensors)

    def write(self, model: Any) -> Any:
        """A rewritten copy of a model.

        Raises:
            RewriteError: a layer cannot be copied.
        """
        new = self.model(model) if self.keras.is_visible(model) else self._subclassed(model)
        copier = self._copier
        while self._models or self._parents:  # each may add more of either
            if self._models:
                self._copy_attributes(*self._models.pop(0), copier)
            else:
                self._rewrite_sublayers(*self._parents.pop(0))
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
    def build_subclassed(self, old: Any, new: Any) -> None:
        """Builds the copy of a model that calls its layers in Python code."""

    @abstractmethod
    def set_own_trainable(self, model: Any, trainable: bool) -> None:
        """Sets the `trainable` flag of a model without touching those of its layers."""

    def model(self, old: Any) -> Any:
        """A copy of a Functional or Sequential model."""
        if id(old) not in self._copies:
            is_sequential = isinstance(old, self.keras.sequential)
            if is_sequential:
                # Inner models come first: writing them sets the weights of all copies made so far,
                # and the layers of a Sequential model are not built one by one.
                for inner in filter(self.keras.is_visible, old.layers):
                    self.model(inner)
            new = self.sequential(old) if is_sequential else self._functional(old)
            self._copies[id(old)] = new
            self._models.append((old, new))
            if new.trainable != old.trainable:
                self.set_own_trainable(new, old.trainable)
        return self._copies[id(old)]

    def _copy_attributes(self, old: Any, new: Any, copier: AttributeCopier) -> None:
        """Copies the attributes that a model has in addition to its network."""
        made = set(vars(new))
        for name, value in attributes(old, self.keras).items():
            if name not in made:
                setattr(new, name, copier.copied(value))
        self.finish()
        if needs_check(old, self.keras) and self._is_planned(old):
            vars(new)["get_config"] = CheckedConfig(new, self.keras)

    def _counterpart(self, old: Any) -> Any:
        """The layer to put in an attribute in which the original model has this one."""
        if self.keras.is_visible(old):
            return self.model(old)
        if id(old) in self._copies:
            return self._copies[id(old)]
        if self.owner(old) in self.plan.actions:
            return self._sublayer_replacement(old)
        if isinstance(old, self.keras.model):
            new = self._subclassed(old)
        elif not is_stock(type(old)):  # no call builds it
            new = self._copied_by_attributes(old)
        elif old.variables:
            new = self.copied(old)
            self.keras.build_copy(old, new)
            self.finish()
        else:
            new = old  # without weights, so nothing of it changes
        self._copies[id(old)] = new
        return new

    def _functional(self, old: Any) -> Any:
        tensors: dict[int, Any] = {}
        outputs = {id(t) for t in old.outputs}
        for record in self.keras.calls_of(old):
            if self.is_removed(record.layer):
                (given,) = record.outputs
                source = record.inputs[self._kept_input(record.layer)]
                tensors[id(given)] = self._bypassed(
                    record.layer, tensors[id(source)], id(given) in outputs
                )
                continue
            results = self._called_again(record, tensors)
            self.finish()
            tensors.update(zip(map(id, record.outputs), results, strict=True))
        self._tensors.update(tensors)
        inputs, outs = self.keras.map_structure(
            lambda t: tensors[id(t)], self.keras.interface_of(old)
        )
        return made_without_constructor(old, self.keras.functional, inputs, outs, name=old.name)

    def _called_again(self, record: Record, tensors: dict[int, Any]) -> list[Any]:
        """Keras tensors that the new layer for a call returns for the copies of its inputs."""
        new = self.layer(record)
        if not record.inputs:
            return list(self.keras.all_calls_of(new)[0].outputs)
        if isinstance(new, self.keras.channel_clip):  # without the bounds that a function was given
            return [called(new, (tensors[id(record.inputs[0])],), {})]
        args, kwargs = self.keras.map_structure(
            lambda t: tensors.get(id(t), t), (record.args, record.kwargs)
        )
        try:
            return self.keras.flatten(called(new, args, kwargs))
        except RewriteError:
            by_attributes = self._without_configuration(record.layer)
            if by_attributes is None:
                raise
            return self.keras.flatten(called(by_attributes, args, kwargs))

    def _subclassed(self, old: Any) -> Any:
        self._check_not_traced(old)
        new = self.copied(old)
        self.build_subclassed(old, new)
        self.finish()
        return new

    # -- layers ------------------------------------------------------------------------

    def finish(self) -> None:
        """Sets the weights of the layers that were built since the last call."""
        unfinished, self._unfinished = self._unfinished, []
        for finish in unfinished:
            finish()

    def owner(self, layer: Any) -> str:
        """Name of a layer in the plan."""
        return self.reading.owners.get(id(layer), "")

    def _bypassed(self, layer: Any, tensor: Any, is_output: bool) -> Any:
        """The tensor that takes the place of a removed layer's output."""
        if not is_output:
            return tensor
        if id(layer) not in self._copies:
            dtype = self.keras.dtype_of(tensor)
            # What is no layer has no policy, and a function's need not be what it computes in.
            as_it_was = getattr(layer, "compute_dtype", None) == dtype
            self._copies[id(layer)] = self.identity_in_place_of(layer, None if as_it_was else dtype)
        return self._copies[id(layer)](tensor)

    def identity_in_place_of(self, layer: Any, dtype: str | None = None) -> Any:
        """A layer that does nothing but keep the name of an output whose layer was removed.

        Args:
            layer: what was removed.
            dtype: of the output; None for that of the layer's policy.
        """
        return self.keras.layers.Activation(
            "linear",
            name=layer.name,
            dtype=dtype or layer.dtype_policy,
            trainable=getattr(layer, "trainable", True),
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
        """Whether the plan removes a layer, which is then marked as done."""
        removed = isinstance(self.plan.actions.get(self.owner(layer)), Remove)
        if removed:
            self.done.add(self.owner(layer))
        return removed

    def _kept_input(self, layer: Any) -> int:
        """The input that the readers of a removed layer read."""
        action = self.plan.actions[self.owner(layer)]
        assert isinstance(action, Remove)
        return action.keeps

    def _acted_on(self, old: Any, rank: int, masked: bool) -> Any:
        """The layer that the plan's action makes of another; a copy if there is no action.

        Args:
            old: the layer.
            rank: the number of dimensions of its input.
            masked: whether its input may come with a mask.
        """
        action = self.plan.actions.get(self.owner(old))
        if action is None:
            return self.copied(old)
        self.done.add(self.owner(old))
        return _WRITERS[type(action)](self, old, action, rank, masked)

    def copied(self, old: Any) -> Any:
        """A layer with the same configuration and the same weights."""
        if not isinstance(old, self.keras.layers.Layer):
            return self.keras.copy_operation(old)
        try:
            new = from_config(old, config_of(old, self.keras), self.keras)
            check_own_layers(old, new, self.keras)
        except CopyError:
            if is_stock(type(old)):
                raise
            return self._copied_by_attributes(old)
        if not is_stock(type(old)) and not has_the_same_layers(old, new, self.keras):
            return self._copied_by_attributes(old)  # some are made later, or it lacks them
        self._unfinished.append(lambda: copy_weights(old, new, self.keras))
        self._parents.append((old, new))
        return new

    def _without_configuration(self, old: Any) -> Any | None:
        """Another copy of a layer, whose configuration made one that cannot be called; or None."""
        new = self._copies.get(id(old))
        made = [pair for pair in self._parents if pair[1] is new]
        if not made or is_stock(type(old)) or self.owner(old) in self.plan.actions:
            return None
        self._parents.remove(made[0])
        self._unfinished.pop()  # which would set the weights of that copy
        return self._copied_by_attributes(old)

    def _copied_by_attributes(self, old: Any) -> Any:
        new = self._copies[id(old)] = copied_by_attributes(old, self.keras, self._copier)
        if self._is_planned(old, but=Sample):
            vars(new)["get_config"] = CheckedConfig(new, self.keras)
        return new

    def _folded(self, old: Any, action: Fold, rank: int, masked: bool) -> Any:
        owner, stored = self.owner(old), self.reading.graph.read_weight

        def read(name: str) -> Array:
            return action.op.weight(owner, name, stored)

        return self._to_finish(*folded_layer(self.keras, old, action, read))

    def _remapped(self, old: Any, action: Remap, rank: int, masked: bool) -> Any:
        return self._to_finish(*remapped_layer(self.keras, old, action))

    def _replaced(self, old: Any, action: Replace, rank: int, masked: bool) -> Any:
        return self._to_finish(*replacement(self.keras, old, action, rank, masked))

    def _reclipped(self, old: Any, action: Reclip, rank: int, masked: bool) -> Any:
        return self._to_finish(*clip_layer(self.keras, old, action))

    def _sampled(self, old: Any, action: Sample, rank: int, masked: bool) -> Any:
        return self._to_finish(*training_layer(self.keras, old, action))

    def _to_finish(self, new: Any, finish: Callable[[], None]) -> Any:
        self._unfinished.append(finish)
        return new

    # -- sublayers ---------------------------------------------------------------------

    def _rewrite_sublayers(self, old: Any, new: Any) -> None:
        """Puts what the plan asks for in the place of layers that a layer's code calls."""
        for place, inner in sublayers(old, self.keras):
            if not self._is_planned(inner):
                self._restore_training_layers(new, place, inner)
                continue
            self._check_not_traced(old)
            if self.keras.is_visible(inner):
                replace_sublayer(new, place, self.model(inner), self.keras)
            elif self.owner(inner) in self.plan.actions:
                replace_sublayer(new, place, self._sublayer_replacement(inner), self.keras)
            else:
                self._rewrite_sublayers(inner, sublayer_at(new, place))
        if self._is_planned(old, but=Sample):
            vars(new)["get_config"] = CheckedConfig(new, self.keras)

    def _restore_training_layers(self, parent: Any, place: Place, old: Any) -> None:
        """Copies training layers where the constructor of their parent creates others."""
        if type(old) in self.keras.training_layers:
            if type(sublayer_at(parent, place)) is not type(old):
                replace_sublayer(parent, place, self._sublayer_copy(old), self.keras)
        elif any(type(part) in self.keras.training_layers for part in parts(old)):
            self._rewrite_sublayers(old, sublayer_at(parent, place))

    def _sublayer_copy(self, old: Any) -> Any:
        if id(old) not in self._copies:
            new = from_config(old, config_of(old, self.keras), self.keras)
            build_like(self.keras, old, new)
            copy_weights(old, new, self.keras)
            self._copies[id(old)] = new
        return self._copies[id(old)]

    def _sublayer_replacement(self, old: Any) -> Any:
        """The layer to have in the place of another that code calls."""
        if self.is_removed(old):
            return self.keras.pass_through(
                name=old.name, dtype=old.dtype_policy, trainable=old.trainable
            )
        if id(old) not in self._copies:
            with self.keras.naming_like(old):
                self._copies[id(old)] = self._built_in_place_of(old)
        return self._copies[id(old)]

    def _built_in_place_of(self, old: Any) -> Any:
        rank = getattr(old.input_spec, "ndim", None) or 0
        # A mask may reach it, and only ScaleAndShift passes masks on in every rank.
        new = self._acted_on(old, rank, masked=rank == 3)
        action = self.plan.actions[self.owner(old)]
        if isinstance(action, Reclip):
            new.build(self.reading.shape_read_by(self.owner(old)))
        elif isinstance(action, (Fold, Remap)):
            self.keras.build_copy(old, new)
        self.finish()
        return new

    def _check_not_traced(self, layer: Any) -> None:
        if self.keras.is_traced(layer):
            raise RewriteError(
                f"{label(layer)} cannot be rewritten: its call method is a tf.function, which "
                "goes on calling the layers it was traced with. Remove the decorator; Keras "
                "compiles predict() and saved models all the same"
            )

    def _is_planned(self, layer: Any, but: type | None = None) -> bool:
        """Whether there are actions on a layer or its sublayers, other than those of a kind."""
        actions = [self.plan.actions.get(self.owner(part)) for part in parts(layer)]
        return any(action is not None and type(action) is not but for action in actions)


# Action -> the method that makes the layer it asks for. Removed layers have none: what reads their
# output reads their input instead.
_WRITERS: dict[type, Callable[..., Any]] = {
    Fold: Writer._folded,
    Remap: Writer._remapped,
    Replace: Writer._replaced,
    Reclip: Writer._reclipped,
    Sample: Writer._sampled,
}


def called(layer: Any, args: Any, kwargs: Any) -> Any:
    """Outputs of the copy of a layer for these arguments.

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
