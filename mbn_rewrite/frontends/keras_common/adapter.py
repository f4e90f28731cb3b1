"""Differences between the Kerases that reading, copying and rewriting models has to know of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from mbn_rewrite.frontends.keras_common.calls import Call, Describer, Record
from mbn_rewrite.ir.graph import (
    Op,
    Several,
    Shape,
)
from mbn_rewrite.ir.reasons import Reason

if TYPE_CHECKING:  # which imports this module
    from mbn_rewrite.frontends.keras_common.probing import Trace


class KerasAdapter(ABC):
    """Adapter of one Keras.

    Attributes:
        package: the name of its package.
        layers: its module of layer classes.
        model: its base class of models.
        functional: its class of Functional models.
        sequential: its class of Sequential models.
        batch_norms: the known BatchNormalization classes.
        training_layers: this package's layer classes for training, the strided and the modified
            one.
        batch_norm_base: the class from which every BatchNormalization is derived.
        linear: the identity activation.
        homogeneous: activation functions with f(s x) = s f(x) for s >= 0.
        clips: activation functions that clip, with their bounds, None where there is none.
        depthwise_kernel: the attribute in which depthwise convolutions keep their kernel.
        scale_and_shift: this package's layer class of that name.
        channel_clip: likewise.
        pass_through: likewise.
        bordered_convolution: likewise.
        biased_convolution: likewise; only where `may_misplace_bias`.
        private: attributes of layers that hold nothing of the user's.
        layer_lists: attributes in which it lists the layers of a layer.
        model_attributes: attributes that Keras sets on a Functional or Sequential model when it
            is compiled or run, and those in which it keeps its inputs and outputs.
        metric: the base class of metrics.
        optimizers: the base classes of optimizers.
        how_to_export: advice on writing a SavedModel, in words.
        export_call: the call that writes one.
        describers: the table of known layer classes; see `op_table.layer_table`.
    """

    package: str
    layers: Any
    model: type
    functional: type
    sequential: type
    batch_norms: tuple[type, ...]
    training_layers: tuple[type, type]
    batch_norm_base: type
    linear: Callable[..., Any]
    homogeneous: tuple[Callable[..., Any], ...]
    clips: tuple[tuple[Callable[..., Any], tuple[float, float | None]], ...]
    depthwise_kernel: str
    scale_and_shift: type
    channel_clip: type
    pass_through: type
    bordered_convolution: type
    biased_convolution: type
    private: frozenset[str]
    layer_lists: tuple[str, ...]
    model_attributes: frozenset[str]
    metric: type
    optimizers: tuple[type, ...]
    how_to_export: str
    export_call: str
    describers: dict[type, Describer]

    @property
    def way_around(self) -> str:
        """Advice on what hides nothing of a model, and copies none of its layers."""
        return (
            "A SavedModel of the model hides nothing, and no layer of it is copied: "
            f"{self.export_call}, then mbn-rewrite saved_model rewritten"
        )

    # -- structures and tensors ------------------------------------------------------------

    @abstractmethod
    def flatten(self, structure: Any) -> list[Any]:
        """Leaves of nested lists, tuples and dictionaries."""

    @abstractmethod
    def map_structure(self, function: Callable[[Any], Any], structure: Any) -> Any:
        """The same structure with a function applied to each leaf."""

    @abstractmethod
    def shape_of(self, tensor: Any) -> Shape:
        """Shape of a Keras tensor; () if not even its rank is known."""

    @abstractmethod
    def dtype_of(self, tensor: Any) -> str:
        """Name of a Keras tensor's dtype."""

    @abstractmethod
    def tensor_like(self, shape: Shape, dtype: str) -> Any:
        """A Keras tensor, to stand for an input."""

    @abstractmethod
    def is_symbolic(self, value: Any) -> bool:
        """Whether something is a Keras tensor."""

    def carries_mask(self, tensor: Any) -> bool:
        """Whether a Keras tensor comes with a mask."""
        return getattr(tensor, "_keras_mask", None) is not None

    def may_pass_mask(self, layer: Any) -> bool:
        """Whether a layer may pass a mask on although no Keras tensor shows it."""
        return False

    def is_private(self, attribute: str) -> bool:
        """Whether an attribute of a layer holds nothing of the user's, going by its name."""
        return attribute.startswith("_self_") or attribute in self.private

    # -- models ----------------------------------------------------------------------------

    @abstractmethod
    def is_visible(self, layer: Any) -> bool:
        """Whether this is a model that does nothing but the calls that Keras has recorded."""

    @abstractmethod
    def has_calls_on_record(self, layer: Any) -> bool:
        """Whether this is a Functional or Sequential model, perhaps with a `call` of its own."""

    @abstractmethod
    def has_stock_constructor(self, kind: type) -> bool:
        """Whether a model class is constructed as Keras's Functional or Sequential models are."""

    @abstractmethod
    def interface_of(self, model: Any) -> tuple[Any, Any]:
        """Inputs and outputs of a Functional model, as the structures of Keras tensors it has."""

    @abstractmethod
    def calls_of(self, model: Any) -> Iterator[Record]:
        """Inputs of a visible model and the calls on which its outputs depend, in order.

        Every call comes after those on which it depends. Calls that only serve training are left
        out.
        """

    @abstractmethod
    def all_calls_of(self, layer: Any) -> list[Record]:
        """All recorded calls of a layer, in whatever model."""

    @abstractmethod
    def traced(self, record: Record, probe: Any, size: int | None = None) -> Trace:
        """Traces one call of a layer by running its code on a probe; see `tracing.trace`.

        Args:
            record: the call.
            probe: what to call in the layer's place.
            size: what to take for the sizes that are open, but for the number of examples; None
                to leave them open.

        Raises:
            Exception: whatever the code raises.
        """

    @abstractmethod
    def watched(
        self, is_watched: Callable[[], bool], note_read: Callable[[Any], None]
    ) -> AbstractContextManager[None]:
        """Context manager in which methods of Keras's classes tell what code reads.

        Args:
            is_watched: whether what runs is code that is being watched; all other code runs as it
                always does.
            note_read: called with what `read_as` is the id of where code reads a variable.
        """

    @abstractmethod
    def set_apart(self) -> AbstractContextManager[None]:
        """Context manager in which code has no effect on variables, seeds and names."""

    @abstractmethod
    def read_as(self, variable: Any) -> int:
        """Id of what `watched` notes where code reads a variable."""

    @abstractmethod
    def called_on_record(
        self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
    ) -> Any:
        """Has Keras record a call of a layer, without making it.

        Args:
            layer: the layer.
            args: its positional arguments, Keras tensors among them.
            kwargs: its keyword arguments.
            outputs: what such a call gave; new Keras tensors of the same kind are returned.
        """

    @abstractmethod
    def give_outputs_of(self, layer: Any, probe: Any) -> None:
        """Has a probe give on Keras tensors what a layer gives, by running the layer's code."""

    @abstractmethod
    def call_of(self, model: Any) -> Record | None:
        """A call of a subclassed model as it was built or called; None if that is not known.

        It has no outputs, and its inputs are Keras tensors.
        """

    def training(self, own: Any, inherited: bool | None) -> Any:
        """Whether a recorded call is in training.

        Args:
            own: the call's own argument, or None.
            inherited: the argument passed to its model; see `calls.Call`.
        """
        return inherited if own is None else own

    def takes_inputs_in_order(self, model: Any, record: Record) -> bool:
        """Whether a nested model is called with its inputs in the order in which it has them."""
        return True

    def tensors_at(self, model: Any, shapes: list[Shape]) -> dict[int, Any]:
        """Keras tensors to read in the place of a visible model's own where it is called.

        Args:
            model: the model.
            shapes: of what it is called with.

        Returns:
            id of each of its tensors that has another size there -> one that has that size.
        """
        return {}  # where models that are called at other sizes have tensors of unknown sizes

    @abstractmethod
    def all_layers_in(self, layer: Any) -> list[Any]:
        """Everything that a layer is known to contain, at any depth and however it is kept."""

    # -- descriptions ----------------------------------------------------------------------

    def describe(self, call: Call) -> Op | Several | None:
        """Operation that a call performs, if this Keras has a special case for it; else None."""
        return None

    @abstractmethod
    def reason_to_stay(self, layer: Any) -> Reason | None:
        """Reason, specific to this Keras, why a known BatchNormalization must stay, or None."""

    @abstractmethod
    def trains_otherwise(self, layer: Any) -> Reason | None:
        """Reason why no layer with statistics of a sample trains like a BatchNormalization."""

    def reason_within(self, layer: Any) -> Reason | None:
        """Reason why BatchNormalizations stay that a layer holds, if it is a toolkit's wrapper."""
        return None

    @abstractmethod
    def axis_of(self, layer: Any) -> int:
        """Channel axis of a built BatchNormalization, from 0 up."""

    @abstractmethod
    def epsilon_of(self, layer: Any) -> float:
        """Epsilon that a BatchNormalization actually uses."""

    def fuses(self, layer: Any) -> bool:
        """Whether a BatchNormalization already runs as one fused operation."""
        return False

    def has_fused_operation(self) -> bool:
        """Whether the backend has a fused operation for BatchNormalization."""
        return True

    def misplaces_bias(self, axis: int, shape: Shape) -> bool:
        """Whether layers may add the bias of their output along another axis than this.

        Args:
            axis: the channel axis.
            shape: the shape of the output.
        """
        return False

    def may_misplace_bias(self, axis: int, shape: Shape) -> bool:
        """As `misplaces_bias`, on any backend on which a saved model may be loaded."""
        return False

    # -- copies ----------------------------------------------------------------------------

    def config_of(self, layer: Any) -> dict[str, Any]:
        """Configuration of a layer."""
        return layer.get_config()

    @abstractmethod
    def scope(self, objects: dict[str, Any]) -> AbstractContextManager[Any]:
        """Context manager in which configurations may name these classes and functions."""

    @abstractmethod
    def rename(self, layer: Any, name: str) -> None:
        """Renames a layer."""

    def assigns_its_own_call(self, layer: Any) -> bool:
        """Whether Keras itself, and not the user, sets `call` on layers like this one."""
        return False

    def copy_operation(self, operation: Any) -> Any:
        """A copy of something that is called in a model without being a layer."""
        raise NotImplementedError  # where everything that is called is a layer

    def copy_of_wrapper(self, layer: Any) -> tuple[Any, Callable[[], None]] | None:
        """A copy of a toolkit's wrapper, and what sets its weights once built; else None."""
        return None

    def without_functions(self, config: dict[str, Any]) -> dict[str, Any]:
        """Configuration of a stock layer without the functions that only this Keras puts there."""
        return config

    def sync_config(self, layer: Any) -> None:  # noqa: B027  (most layers keep nothing like that)
        """Updates what a copy keeps solely for its configuration to match what it does."""

    @abstractmethod
    def build_copy(self, old: Any, new: Any) -> None:
        """Builds the copy of a built layer."""

    @abstractmethod
    def reloaded(self, model: Any, classes: dict[str, type]) -> Any:
        """A model as loading its configuration would create it, before its weights are set.

        Args:
            model: the model.
            classes: its custom classes, by name.
        """

    def network_config(self, model: Any) -> dict[str, Any] | None:
        """Configuration of a model's network, if it is being saved without its class; else None."""
        return None

    @abstractmethod
    def is_variable(self, value: Any) -> bool:
        """Whether something is a variable."""

    @abstractmethod
    def copy_variable(self, variable: Any) -> Any:
        """A variable with the same name, value and flags."""

    def draws_seeds(self, value: Any) -> bool:
        """Whether something draws seeds, and keeps in a variable how far it has come."""
        return False

    def copy_seeds(self, value: Any) -> Any:
        """A copy of what draws seeds, which has come as far."""
        raise NotImplementedError  # where nothing does

    @abstractmethod
    def own_variables(self, layer: Any) -> list[Any]:
        """Variables of a layer itself, in the order in which it created them."""

    @abstractmethod
    def variables(self, layer: Any) -> list[Any]:
        """Variables of a layer and of everything it contains."""

    @abstractmethod
    def states(self, layer: Any) -> list[Any]:
        """State that a layer itself keeps between calls beside its weights; None if not created."""

    @abstractmethod
    def assign(self, target: Any, source: Any) -> None:
        """Sets a variable to the value and the flags of another."""

    def replacing(self, parent: Any, old: Any, new: Any) -> AbstractContextManager[Any]:
        """Context manager in which one sublayer of a built layer may be replaced by another."""
        return nullcontext()

    def naming_like(self, layer: Any) -> AbstractContextManager[Any]:
        """Context manager in which variables are named as those of a layer."""
        return nullcontext()

    def is_traced(self, layer: Any) -> bool:
        """Whether a layer's call goes on calling the sublayers with which it was traced."""
        return hasattr(type(layer).call, "get_concrete_function")

    # -- compiled models -------------------------------------------------------------------

    @abstractmethod
    def is_compiled(self, model: Any) -> bool:
        """Whether a model is compiled."""

    @abstractmethod
    def compile_arguments(self, model: Any) -> dict[str, Any]:
        """The arguments for `compile` that make another model train as this one, which is compiled.

        The optimizer is left out. Metrics are as the user gave them.
        """

    def name_given(self, model: Any, metric: Any) -> str:
        """The name that the user gave a metric of a compiled model."""
        return str(metric.name)

    def inner_optimizer(self, optimizer: Any) -> Any:
        """The optimizer that one holds that scales losses; of others, the optimizer itself."""
        return optimizer

    @abstractmethod
    def functions_of(self, optimizer: Any) -> dict[str, Any]:
        """The schedules and functions that an optimizer has for arguments of its constructor."""

    @abstractmethod
    def known_variables(self, optimizer: Any, variables: list[Any]) -> list[Any] | None:
        """Those that an optimizer was built for, in its order; None if it is not built.

        Args:
            optimizer: the optimizer.
            variables: those of its model; for one that is not among them there is a None, or
                what it is.
        """

    @abstractmethod
    def build_optimizer(self, optimizer: Any, variables: list[Any]) -> None:
        """Builds an optimizer for variables."""

    @abstractmethod
    def optimizer_state(self, optimizer: Any) -> list[Any]:
        """All variables of a built optimizer, in an order that depends on its class alone."""
