"""Makes the layers of a rewritten model: copies, what a plan asks for, and what code calls.

The weights of a layer are set as soon as it is built, so that only one layer's initial values are
in memory beside them: computed values where the plan has an edit, the original's everywhere else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from mbn_rewrite.errors import CopyError, RewriteError
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
    copied_by_attributes,
)
from mbn_rewrite.frontends.keras_common.folded_layers import folded_layer
from mbn_rewrite.frontends.keras_common.reader import Reading
from mbn_rewrite.frontends.keras_common.references import kept_elsewhere
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


class LayerWriter(ABC):
    """Writer of the layers of one model.

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
        self.parents: list[tuple[Any, Any]] = []  # layers that may have sublayers, and copies
        self.copies: dict[int, Any] = {}  # id(layer) -> its copy
        self.made: dict[str, Any] = {}  # layers that are made for calls of others, by owner
        self.tensors: dict[int, Any] = {}  # id(Keras tensor) -> that of the copy
        self.copier = AttributeCopier(keras, self._counterpart, self.tensors)

    @abstractmethod
    def model(self, old: Any) -> Any:
        """A copy of a Functional or Sequential model."""

    @abstractmethod
    def subclassed(self, old: Any) -> Any:
        """A copy of a model that calls its layers in Python code."""

    def finish(self) -> None:
        """Sets the weights of the layers that were built since the last call."""
        unfinished, self._unfinished = self._unfinished, []
        for finish in unfinished:
            finish()

    def owner(self, layer: Any) -> str:
        """Name of a layer in the plan."""
        return self.reading.owners.get(id(layer), "")

    def maker(self, record: Record) -> str:
        """Name in the plan of the layer that makes a call."""
        owner = self.owner(record.layer)
        if owner not in self.plan.unshared:
            return owner
        return self.plan.maker(owner, self.reading.numbers[id(record.outputs[0])])

    def is_removed(self, layer: Any) -> bool:
        """Whether the plan removes a layer, which is then marked as done."""
        removed = isinstance(self.plan.actions.get(self.owner(layer)), Remove)
        if removed:
            self.done.add(self.owner(layer))
        return removed

    def acted_on(self, old: Any, rank: int, masked: bool) -> Any:
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

    def made_for_calls(self, old: Any, owner: str) -> Any:
        """A layer that makes some of the calls of another, with weights of its own."""
        action = self.plan.actions[owner]
        assert isinstance(action, Fold)  # calls that absorb nothing stay with the layer
        self.done.add(owner)
        new = self._folded(old, action)
        self.keras.rename(new, owner.rpartition("/")[2])
        return new

    def copied(self, old: Any) -> Any:
        """A layer with the same configuration and the same weights."""
        if not isinstance(old, self.keras.layers.Layer):
            return self.keras.copy_operation(old)
        wrapper = self.keras.copy_of_wrapper(old)
        if wrapper is not None:
            return self._to_finish(*wrapper)
        if self._keeps_others(old):
            return self._copied_by_attributes(old)
        try:
            new = from_config(old, config_of(old, self.keras), self.keras)
            check_own_layers(old, new, self.keras)
        except CopyError:
            if is_stock(type(old)) or self.keras.has_calls_on_record(old):
                raise
            return self._copied_by_attributes(old)
        if not is_stock(type(old)) and not has_the_same_layers(old, new, self.keras):
            return self._copied_by_attributes(old)  # some are made later, or it lacks them
        self._unfinished.append(lambda: copy_weights(old, new, self.keras))
        self.parents.append((old, new))
        return new

    def _keeps_others(self, old: Any) -> bool:
        """Whether a layer has others where Keras does not look, so that none is configured."""
        if is_stock(type(old)):
            return False
        known = {id(part) for part in parts(old)}
        return any(
            layer.variables and number not in known
            for part in parts(old)
            for number, layer in kept_elsewhere(part, self.keras).items()
        )

    def without_configuration(self, old: Any) -> Any | None:
        """Another copy of a layer, whose configuration made one that cannot be called; or None."""
        new = self.copies.get(id(old))
        made = [pair for pair in self.parents if pair[1] is new]
        if not made or is_stock(type(old)) or self.owner(old) in self.plan.actions:
            return None
        self.parents.remove(made[0])
        self._unfinished.pop()  # which would set the weights of that copy
        return self._copied_by_attributes(old)

    def _copied_by_attributes(self, old: Any) -> Any:
        new = self.copies[id(old)] = copied_by_attributes(old, self.keras, self.copier)
        self._check_config(old, new)
        return new

    def _check_config(self, old: Any, new: Any) -> None:
        """Has a copy's configuration be checked if its class makes what the plan has changed."""
        if self.is_planned(old, but=Sample):
            vars(new)["get_config"] = CheckedConfig(new, self.keras)

    def _folded(self, old: Any, action: Fold, *_: Any) -> Any:
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

    def rewrite_sublayers(self, old: Any, new: Any) -> None:
        """Puts what the plan asks for in the place of layers that a layer's code calls."""
        for place, inner in sublayers(old, self.keras):
            if not self.is_planned(inner):
                self._restore_training_layers(new, place, inner)
                continue
            self.check_not_traced(old)
            if self.keras.is_visible(inner):
                replace_sublayer(new, place, self.model(inner), self.keras)
            elif self.owner(inner) in self.plan.actions:
                replace_sublayer(new, place, self._sublayer_replacement(inner), self.keras)
            else:
                self.rewrite_sublayers(inner, sublayer_at(new, place))
        self._check_config(old, new)

    def _restore_training_layers(self, parent: Any, place: Place, old: Any) -> None:
        """Copies training layers where the constructor of their parent creates others."""
        if type(old) in self.keras.training_layers:
            if type(sublayer_at(parent, place)) is not type(old):
                replace_sublayer(parent, place, self._sublayer_copy(old), self.keras)
        elif any(type(part) in self.keras.training_layers for part in parts(old)):
            self.rewrite_sublayers(old, sublayer_at(parent, place))

    def _sublayer_copy(self, old: Any) -> Any:
        if id(old) not in self.copies:
            new = from_config(old, config_of(old, self.keras), self.keras)
            build_like(self.keras, old, new)
            copy_weights(old, new, self.keras)
            self.copies[id(old)] = new
        return self.copies[id(old)]

    def _sublayer_replacement(self, old: Any) -> Any:
        """The layer to have in the place of another that code calls."""
        if self.is_removed(old):
            return self.in_place_of_removed(old)
        if id(old) not in self.copies:
            with self.keras.naming_like(old):
                self.copies[id(old)] = self._built_in_place_of(old)
        return self.copies[id(old)]

    def in_place_of_removed(self, old: Any) -> Any:
        """The layer to have in the place of one that is removed, for code that calls it."""
        if id(old) not in self.copies:
            make: Any = self.keras.pass_through
            self.copies[id(old)] = make(
                name=old.name, dtype=old.dtype_policy, trainable=old.trainable
            )
        return self.copies[id(old)]

    def _built_in_place_of(self, old: Any) -> Any:
        rank = getattr(old.input_spec, "ndim", None) or 0
        # A mask may reach it, and only ScaleAndShift passes masks on in every rank.
        new = self.acted_on(old, rank, masked=rank == 3)
        action = self.plan.actions[self.owner(old)]
        if isinstance(action, Reclip):
            new.build(self.reading.shape_read_by(self.owner(old)))
        elif isinstance(action, (Fold, Remap)):
            self.keras.build_copy(old, new)
        self.finish()
        return new

    def check_not_traced(self, layer: Any) -> None:
        if self.keras.is_traced(layer):
            raise RewriteError(
                f"{label(layer)} cannot be rewritten: its call method is a tf.function, which "
                "goes on calling the layers it was traced with. Remove the decorator; Keras "
                "compiles predict() and saved models all the same"
            )

    def is_planned(self, layer: Any, but: type | None = None) -> bool:
        """Whether there are actions on a layer or its sublayers, other than those of a kind."""
        owners = [self.owner(part) for part in parts(layer)]
        actions = [self.plan.actions.get(owner) for owner in owners]
        return any(action is not None and type(action) is not but for action in actions) or any(
            owner in self.plan.unshared for owner in owners
        )

    def _counterpart(self, old: Any) -> Any:
        """The layer to put in an attribute in which the original model has this one."""
        if self.keras.is_visible(old):
            return self.model(old)
        if id(old) in self.copies:
            return self.copies[id(old)]
        if self.owner(old) in self.plan.actions:
            return self._sublayer_replacement(old)
        if isinstance(old, self.keras.model):
            new = self.subclassed(old)
        elif not is_stock(type(old)):  # no call builds it
            new = self._copied_by_attributes(old)
        elif old.variables:
            new = self.copied(old)
            self.keras.build_copy(old, new)
            self.finish()
        else:
            new = old  # without weights, so nothing of it changes
        self.copies[id(old)] = new
        return new


# Action -> the method that makes the layer it asks for. Removed layers have none: what reads their
# output reads their input instead.
_WRITERS: dict[type, Callable[..., Any]] = {
    Fold: LayerWriter._folded,
    Remap: LayerWriter._remapped,
    Replace: LayerWriter._replaced,
    Reclip: LayerWriter._reclipped,
    Sample: LayerWriter._sampled,
}
