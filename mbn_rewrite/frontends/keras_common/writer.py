"""Carries out a plan on a copy of a model made of layers.

Every layer is copied from its configuration and called again in the order of the original. Removed
BatchNormalizations are bypassed, replaced ones give way to another layer of the same name. Layers
that absorb a map are given a bias if they have none, or give way to a layer of the same name that
adds a border map.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from mbn_rewrite.errors import RewriteError, cause_of
from mbn_rewrite.frontends.keras_common.adapter import KerasAdapter
from mbn_rewrite.frontends.keras_common.calls import Record
from mbn_rewrite.frontends.keras_common.cloning import label, stock_call
from mbn_rewrite.frontends.keras_common.custom_models import (
    CheckedConfig,
    attributes,
    made_without_constructor,
    needs_check,
)
from mbn_rewrite.frontends.keras_common.layer_writer import LayerWriter
from mbn_rewrite.frontends.keras_common.reader import Reading
from mbn_rewrite.frontends.keras_common.watching import objects_left_alone
from mbn_rewrite.plans import Plan, Remove


class Writer(LayerWriter):
    """Writer of one model; each front end adds how its models are assembled.

    Args:
        keras: the adapter of the model's Keras.
        reading: the model as it was read.
        plan: the plan for it.
    """

    def __init__(self, keras: KerasAdapter, reading: Reading, plan: Plan) -> None:
        super().__init__(keras, reading, plan)
        self._models: list[tuple[Any, Any]] = []  # whose attributes are still to be copied

    def write(self, model: Any) -> Any:
        """A rewritten copy of a model.

        Raises:
            RewriteError: a layer cannot be copied.
        """
        new = self.model(model) if self.keras.is_visible(model) else self.subclassed(model)
        while self._models or self.parents:  # each may add more of either
            if self._models:
                self._copy_attributes(*self._models.pop(0))
            else:
                self.rewrite_sublayers(*self.parents.pop(0))
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
        if id(old) not in self.copies:
            is_sequential = isinstance(old, self.keras.sequential)
            if is_sequential:
                # Inner models come first: writing them sets the weights of all copies made so far,
                # and the layers of a Sequential model are not built one by one.
                for inner in filter(self.keras.is_visible, old.layers):
                    self.model(inner)
            new = self.sequential(old) if is_sequential else self._functional(old)
            self.copies[id(old)] = new
            self._models.append((old, new))
            if new.trainable != old.trainable:
                self.set_own_trainable(new, old.trainable)
        return self.copies[id(old)]

    def _copy_attributes(self, old: Any, new: Any) -> None:
        """Copies the attributes that a model has in addition to its network."""
        made = set(vars(new))
        for name, value in attributes(old, self.keras).items():
            if name not in made:
                setattr(new, name, self.copier.copied(value))
        self.finish()
        if needs_check(old, self.keras) and self.is_planned(old):
            vars(new)["get_config"] = CheckedConfig(new, self.keras)

    def _functional(self, old: Any) -> Any:
        tensors: dict[int, Any] = {}
        outputs = {id(t) for t in old.outputs}
        for record in self.keras.calls_of(old):
            if self.is_removed(record.layer):
                (given,) = record.outputs
                source = record.inputs[self._kept_input(record.layer)]
                tensors[id(given)] = self._bypassed(
                    record.layer, tensors[id(source)], id(given) in outputs, self.is_in_code(old)
                )
                continue
            results = self._called_again(record, tensors)
            self.finish()
            tensors.update(zip(map(id, record.outputs), results, strict=True))
        self.tensors.update(tensors)
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
            by_attributes = self.without_configuration(record.layer)
            if by_attributes is None:
                raise
            return self.keras.flatten(called(by_attributes, args, kwargs))

    def subclassed(self, old: Any) -> Any:
        self.check_not_traced(old)
        new = self.copied(old)
        with objects_left_alone(old):
            self.build_subclassed(old, new)
        self.finish()
        return new

    # -- layers ------------------------------------------------------------------------

    def is_in_code(self, model: Any) -> bool:
        """Whether code may have a model's layers by their number, which then have to stay."""
        return id(model) in self.reading.in_code

    def _bypassed(self, layer: Any, tensor: Any, is_output: bool, in_code: bool) -> Any:
        """The tensor that takes the place of a removed layer's output."""
        if in_code:
            return called(self.in_place_of_removed(layer), (tensor,), {})
        if not is_output:
            return tensor
        if id(layer) not in self.copies:
            dtype = self.keras.dtype_of(tensor)
            # What is no layer has no policy, and a function's need not be what it computes in.
            as_it_was = getattr(layer, "compute_dtype", None) == dtype
            self.copies[id(layer)] = self.identity_in_place_of(layer, None if as_it_was else dtype)
        return self.copies[id(layer)](tensor)

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
        """The new layer for a call, the same for all calls that share weights."""
        old = record.layer
        if self.keras.is_visible(old):
            return self.model(old)
        maker = self.maker(record)
        if maker != self.owner(old):
            if maker not in self.made:
                self.made[maker] = self.made_for_calls(old, maker)
            return self.made[maker]
        if id(old) not in self.copies:
            owner = self.owner(old)
            rank = len(self.keras.shape_of(record.outputs[0])) if record.outputs else 0
            self.copies[id(old)] = self.acted_on(old, rank, owner in self.reading.masked)
        return self.copies[id(old)]

    def _kept_input(self, layer: Any) -> int:
        """The input that the readers of a removed layer read."""
        action = self.plan.actions[self.owner(layer)]
        assert isinstance(action, Remove)
        return action.keeps


def called(layer: Any, args: Any, kwargs: Any) -> Any:
    """Outputs of the copy of a layer for these arguments.

    Raises:
        RewriteError: it cannot be called with them.
    """
    try:
        with objects_left_alone(layer):
            return stock_call(layer)(layer, *args, **kwargs)
    except Exception as error:
        raise RewriteError(
            f"the copy of {label(layer)} cannot be called as the original was: "
            f"{cause_of(error)} Check that its get_config() describes it fully"
        ) from error
