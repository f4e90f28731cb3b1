"""In what one Keras differs from the other, as far as reading and rewriting models goes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mbn_rewrite.ir.graph import Op, Shape

if TYPE_CHECKING:
    from mbn_rewrite.frontends.keras_common.op_table import Call, Describer


@dataclass(frozen=True, eq=False)
class Record:
    """One call of a layer, as a model has it on record.

    Attributes:
        layer: the layer, or what else was called.
        args: its positional arguments.
        kwargs: its keyword arguments.
        inputs: the Keras tensors among the arguments, flat.
        outputs: the Keras tensors that it gave, flat; alone those of an input layer.
    """

    layer: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]


class KerasAdapter(ABC):
    """One Keras.

    Attributes:
        package: the name of its package.
        layers: its module of layer classes.
        model: its class of models.
        sequential: its class of Sequential models.
        batch_norms: the classes of BatchNormalization that are known.
        training_layers: our layer classes for training, the strided and the modified one.
        batch_norm_base: the class that every BatchNormalization is derived from.
        linear: the function that does nothing.
        homogeneous: activation functions with f(s x) = s f(x) for s >= 0.
        depthwise_kernel: what depthwise convolutions call their kernel.
        scale_and_shift: our layer class of that name.
        bordered_convolution: likewise.
        biased_convolution: likewise; only where `may_misplace_bias`.
        private: attributes that begin like one of these hold nothing of the user's; `held`
            looks at all others.
        model_attributes: attributes that Keras gives a Functional or Sequential model when it
            is compiled or run, and those in which it keeps its inputs and outputs.
        metric: the base class of metrics.
        how_to_export: what to do to write a SavedModel, in words.
        describers: the table of known layer classes; see `describe.layer_table`.
    """

    package: str
    layers: Any
    model: type
    sequential: type
    batch_norms: tuple[type, ...]
    training_layers: tuple[type, type]
    batch_norm_base: type
    linear: Callable[..., Any]
    homogeneous: tuple[Callable[..., Any], ...]
    depthwise_kernel: str
    scale_and_shift: type
    bordered_convolution: type
    biased_convolution: type
    private: tuple[str, ...]
    model_attributes: frozenset[str]
    metric: type
    how_to_export: str
    describers: dict[type, Describer]

    # -- structures and tensors ------------------------------------------------------------

    @abstractmethod
    def flatten(self, structure: Any) -> list[Any]:
        """The leaves of nested lists, tuples and dictionaries."""

    @abstractmethod
    def map_structure(self, function: Callable[[Any], Any], structure: Any) -> Any:
        """The same structure with a function applied to each leaf."""

    @abstractmethod
    def shape_of(self, tensor: Any) -> Shape:
        """A Keras tensor's shape; () where not even the rank is known."""

    @abstractmethod
    def dtype_of(self, tensor: Any) -> str:
        """The name of a Keras tensor's dtype."""

    def carries_mask(self, tensor: Any) -> bool:
        """Whether a Keras tensor has a mask with it."""
        return getattr(tensor, "_keras_mask", None) is not None

    def may_pass_mask(self, layer: Any) -> bool:
        """Whether a mask may go through a layer although no Keras tensor shows it."""
        return False

    # -- models ----------------------------------------------------------------------------

    @abstractmethod
    def is_visible(self, layer: Any) -> bool:
        """Whether this is a model whose calls Keras has on record, and that does only these."""

    @abstractmethod
    def has_calls_on_record(self, layer: Any) -> bool:
        """Whether this is a Functional or Sequential model, perhaps with a `call` of its own."""

    @abstractmethod
    def is_made_alike(self, kind: type) -> bool:
        """Whether a class of models is made as the Functional or Sequential models of Keras."""

    @abstractmethod
    def calls_of(self, model: Any) -> Iterator[Record]:
        """A visible model's inputs and the calls that its outputs depend on, in order.

        Each call comes after those it depends on. Leaves out what only serves training.
        """

    @abstractmethod
    def all_calls_of(self, layer: Any) -> list[Record]:
        """All calls of a layer on record, in whatever model."""

    def training(self, own: Any, inherited: bool | None) -> Any:
        """Whether a call on record is in training.

        Args:
            own: the call's own argument, or None.
            inherited: what its model is told; see `describe.Call`.
        """
        return inherited if own is None else own

    def takes_as_it_is(self, model: Any, record: Record) -> bool:
        """Whether a nested model is given its inputs in the order in which it takes them."""
        return True

    @abstractmethod
    def everything_in(self, layer: Any) -> list[Any]:
        """All that a layer holds, at any depth and by whatever means, as far as is known."""

    # -- descriptions ----------------------------------------------------------------------

    def describe(self, call: Call) -> Op | None:
        """What a call does where this Keras has a word to say about it, or else None."""
        return None

    @abstractmethod
    def ineligible(self, layer: Any) -> str:
        """Why a BatchNormalization of a known class must stay, beside reasons of any Keras."""

    @abstractmethod
    def axis_of(self, layer: Any) -> int:
        """The channel axis of a built BatchNormalization, from 0 up."""

    @abstractmethod
    def epsilon_of(self, layer: Any) -> float:
        """The epsilon that a BatchNormalization really uses."""

    def fuses(self, layer: Any) -> bool:
        """Whether a BatchNormalization runs as one fused operation as it is."""
        return False

    def has_fused_operation(self) -> bool:
        """Whether there is one."""
        return True

    def misplaces_bias(self, axis: int, shape: Shape) -> bool:
        """Whether layers here may add the bias of their output along another axis than this.

        Args:
            axis: the axis of the channels.
            shape: that of the output.
        """
        return False

    def may_misplace_bias(self, axis: int, shape: Shape) -> bool:
        """The same on any backend that a saved model may be loaded on."""
        return False

    # -- copies ----------------------------------------------------------------------------

    def config_of(self, layer: Any) -> dict[str, Any]:
        """A layer's configuration."""
        return layer.get_config()

    @abstractmethod
    def scope(self, objects: dict[str, Any]) -> AbstractContextManager[Any]:
        """In which layers are made from configurations that name these classes and functions."""

    @abstractmethod
    def rename(self, layer: Any, name: str) -> None:
        """Gives a layer a name."""

    def makes_its_call(self, layer: Any) -> bool:
        """Whether a layer gets its `call` when it is made, so that it is no user's doing."""
        return False

    def copy_of_operation(self, operation: Any) -> Any:
        """A copy of something that is called in a model and is no layer."""
        raise NotImplementedError  # where all that is called is a layer

    def without_functions(self, config: dict[str, Any]) -> dict[str, Any]:
        """A stock layer's configuration without functions that only this Keras has in it."""
        return config

    def settle(self, layer: Any) -> None:  # noqa: B027  (where nothing is kept so)
        """Has what a copy keeps for its configuration alone agree with what it does."""

    @abstractmethod
    def build_alike(self, old: Any, new: Any) -> None:
        """Builds the copy of a layer that was built."""

    @abstractmethod
    def made_again(self, model: Any, classes: dict[str, type]) -> Any:
        """What loading makes of a model's configuration, before its weights are set.

        Args:
            model: the model.
            classes: its classes that are not Keras's own, by name.
        """

    def network_config(self, model: Any) -> dict[str, Any] | None:
        """The configuration of a model's network, where one is to be written without its class."""
        return None

    @abstractmethod
    def is_variable(self, value: Any) -> bool:
        """Whether something is a variable."""

    @abstractmethod
    def copy_of_variable(self, variable: Any) -> Any:
        """A variable of the same name, value and flags."""

    @abstractmethod
    def own_variables(self, layer: Any) -> list[Any]:
        """The variables of a layer itself, in the order in which it made them."""

    @abstractmethod
    def variables(self, layer: Any) -> list[Any]:
        """The variables of a layer and of all that it holds."""

    @abstractmethod
    def states(self, layer: Any) -> list[Any]:
        """What a layer itself keeps from call to call beside its weights; None if not made."""

    @abstractmethod
    def assign(self, target: Any, source: Any) -> None:
        """Sets a variable to the value and the flags of another."""

    def exchanging(self, holder: Any, old: Any, new: Any) -> AbstractContextManager[Any]:
        """In which a built layer, which held `old`, takes `new` for it."""
        return nullcontext()

    @abstractmethod
    def traced(self, layer: Any) -> bool:
        """Whether a layer's call goes on calling the layers that it was traced with."""
