"""Where tf_keras and Keras 3 differ, as far as reading and writing models goes.

Everything else in this package works with layers of either: most of what it asks of a layer has
the same name in both. A front end says the rest by a `Dialect`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mbn_rewrite.graph import Op, Shape


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One call of a layer that a model has on record.

    Attributes:
        layer: the layer, or the operation of Keras 3.
        tensors: the Keras tensors that it was given, without masks that Keras passes on its own.
        outputs: the Keras tensors that it gave.
        args, kwargs: what it was called with, those tensors among it.
        is_input: whether it stands for an input of the model.
        has_mask: whether Keras gives it a mask.
    """

    layer: Any
    tensors: list[Any]
    outputs: list[Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    is_input: bool
    has_mask: bool


@dataclass(frozen=True)
class Call:
    """One call of a layer, as far as describing what it does goes.

    Attributes:
        layer: the layer.
        inputs: the shapes of all tensors that it was given.
        output: the shape of its first output.
        dialect: the Keras it is of.
        training: False at inference, True where its caller asked for training, None where
            that is decided at run time.
        arguments: what it was called with beside its data.
    """

    layer: Any
    inputs: tuple[Shape, ...]
    output: Shape
    dialect: Dialect
    training: bool | None = False
    arguments: tuple[Any, ...] = ()


Describer = Callable[[Call], Op]


class Dialect(Protocol):
    """How one Keras says things."""

    # ---- layers

    @property
    def keras(self) -> Any:
        """The package: tf_keras, or keras."""

    @property
    def bookkeeping(self) -> frozenset[str]:
        """Attributes of layers in which Keras keeps books of what the others hold."""

    @property
    def describers(self) -> Mapping[type, Describer]:
        """What calls of each known class of layers do, by exact type."""

    @property
    def functions(self) -> Mapping[type, Describer]:
        """What functions of tensors do, by the classes that stand for their calls.

        Unlike layers, they may be called with constants.
        """

    @property
    def homogeneous(self) -> tuple[Any, ...]:
        """Activation functions f with f(s x) = s f(x) for s >= 0."""

    @property
    def depthwise_kernel(self) -> str:
        """The name of the kernel of depthwise convolutions."""

    @property
    def scale_and_shift(self) -> type:
        """The class of layers that scale and shift."""

    @property
    def training_layers(self) -> tuple[type, type]:
        """StridedBatchNormalization and ModifiedBatchNormalization."""

    @property
    def batch_norms(self) -> tuple[type, ...]:
        """The classes of BatchNormalization that are known, but for those just named."""

    def is_batch_norm(self, layer: Any) -> bool:
        """Whether a layer is a BatchNormalization or derived from one."""

    def epsilon(self, layer: Any) -> float:
        """The epsilon that a BatchNormalization really uses."""

    # ---- models

    def is_visible(self, layer: Any) -> bool:
        """Whether a layer is a model whose calls Keras has on record, and that does only these."""

    def is_functional(self, layer: Any) -> bool:
        """Whether a layer is a Functional model, visible or not."""

    def calls_of(self, model: Any) -> Iterator[LayerCall]:
        """A visible model's inputs and the calls that its outputs depend on, in order.

        Each call comes after those it depends on. Leaves out what only serves training, such as
        the layers behind `add_loss`.
        """

    def calls_on(self, layer: Any) -> list[LayerCall]:
        """All calls of a layer that are on record, in whatever model."""

    def shape(self, tensor: Any) -> Shape:
        """The shape of a Keras tensor; () where its rank is not known."""

    def dtype(self, tensor: Any) -> str:
        """The name of the dtype of a Keras tensor."""

    def input_shape(self, layer: Any) -> Shape:
        """A shape that a built BatchNormalization can be built for."""

    def submodules(self, layer: Any) -> list[Any]:
        """All layers that a layer holds, at any depth and in whatever it keeps them."""

    def flatten(self, structure: Any) -> list[Any]:
        """The leaves of a structure."""

    def map_structure(self, function: Callable[[Any], Any], structure: Any) -> Any:
        """A structure with a function of each leaf in its place."""

    # ---- copies

    def parts(self, layer: Any) -> list[Any]:
        """A layer and all layers that it holds, at any depth."""

    @property
    def call_is_made(self) -> tuple[type, ...]:
        """Layers that get their call method when they are made."""

    def rename(self, layer: Any, name: str) -> None:
        """Gives a layer a name."""

    def variables(self, layer: Any) -> list[Any]:
        """The variables of a layer and of all that it holds."""

    def own_variables(self, layer: Any) -> list[Any]:
        """The variables of a layer itself, in the order in which it made them."""

    def without_weights(self, operation: Any) -> Any:
        """A copy of what is no layer but stands for the call of a function, or None."""

    def exchange(self, holder: Any, attribute: str, value: Any, old: Any, new: Any) -> None:
        """Sets an attribute of a holder, in which a new layer stands for an old one."""

    def new_functional(self, old: Any, tensors: Mapping[int, Any]) -> Any:
        """A model like a Functional one, of other tensors: those for each id of the old."""

    def new_sequential(
        self,
        old: Any,
        copied: Callable[[Any], Any],
        layers: Iterator[Any],
        finish: Callable[[], None],
    ) -> Any:
        """A model like a Sequential one, built, with other layers.

        Args:
            old: the model.
            copied: gives a copy of a layer, for that of the inputs.
            layers: gives the other layers.
            finish: to be called whenever layers were built.
        """

    def call_as_before(self, old: Any, new: Any) -> None:
        """Builds the copy of a subclassed model, by calling it; RewriteError where one cannot."""

    def set_own_trainable(self, layer: Any, trainable: bool) -> None:
        """Sets a layer's flag without touching those of the layers that it holds."""

    def is_traced(self, layer: Any) -> bool:
        """Whether a layer's call is a function that goes on calling what it was traced with."""
