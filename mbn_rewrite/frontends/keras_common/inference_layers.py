"""The layers of rewritten models for inference, as far as the Kerases have them in common.

A layer of one Keras cannot be used in another, so each front end derives its own classes from
these and from a layer class of its Keras. Nothing here loads TensorFlow or Keras.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class _Layer:
    """Parts of Keras that the layers below need; precedes a layer class of Keras in their bases."""

    _activations: Any  # the module of activation functions
    _cast: Callable[[Any, Any], Any]
    _reshape: Callable[[Any, Any], Any]
    _maximum: Callable[[Any, Any], Any]
    _minimum: Callable[[Any, Any], Any]

    name: str
    add_weight: Callable[..., Any]


class _PerChannel(_Layer):
    """A layer with weights of one number per channel."""

    axis: int

    def _channels(self, input_shape: Any) -> int:
        channels: int | None = tuple(input_shape)[self.axis]
        if channels is None:
            raise ValueError(
                f"{self.name} needs to know how many channels axis {self.axis} has; "
                f"it was given an input of shape {input_shape}"
            )
        return channels

    def _along_channels(self, weight: Any, inputs: Any) -> Any:
        """A weight in a shape that broadcasts over the inputs."""
        shape = [1] * len(inputs.shape)
        shape[self.axis] = -1
        return self._reshape(weight, shape)


class ScaleAndShift(_PerChannel):
    """y = scale * x + shift, per channel: what is left of a BatchNormalization.

    Takes the place of the depthwise 1x1 convolution where there is none (ranks 2 and 5, channels
    first in rank 3) and where a mask has to be passed on, which convolutions do not do.

    Args:
        axis: the channel axis.

    Input: any shape, any floating dtype. Output: the same shape; the layer's compute dtype.
    """

    def __init__(self, axis: int = -1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.axis = axis
        self.supports_masking = True

    def build(self, input_shape: Any) -> None:
        shape = (self._channels(input_shape),)
        self.scale = self.add_weight(name="scale", shape=shape, initializer="ones")
        self.shift = self.add_weight(name="shift", shape=shape, initializer="zeros")
        super().build(input_shape)  # type: ignore[misc]

    def call(self, inputs: Any, mask: Any = None) -> Any:
        scale, shift = (self._along_channels(each, inputs) for each in (self.scale, self.shift))
        # Operators of the tensors, since `keras.ops.add` may take the shift for a bias.
        return inputs * scale + shift

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "axis": self.axis}  # type: ignore[misc]


class PassThrough(_Layer):
    """y = x: what is left of a BatchNormalization that other layers do the work of.

    Takes its place where Python code calls it, with the arguments that it is called with.

    Input: any shape, any floating dtype. Output: the same shape; the layer's compute dtype.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        return inputs

    def get_config(self) -> dict[str, Any]:
        return dict(super().get_config())  # type: ignore[misc]


class ChannelClip(_PerChannel):
    """y = min(max(x, lower), upper), per channel: a ReLU, or another clip, with bounds of its own.

    Takes the place of an activation whose input and output are kept in other units, such as those
    before a BatchNormalization that is gone.

    Args:
        axis: the channel axis.
        use_lower: whether there are lower bounds, at first all 0.
        use_upper: whether there are upper bounds, at first all 1.
        pass_mask: whether a mask of the input is one of the output.

    Input: any shape, any floating dtype. Output: the same shape; the layer's compute dtype. Its
    weights `lower` and `upper` have the shape [channels]; an infinite bound is none.
    """

    def __init__(
        self,
        axis: int = -1,
        use_lower: bool = True,
        use_upper: bool = False,
        pass_mask: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.axis = axis
        self.use_lower = use_lower
        self.use_upper = use_upper
        self.pass_mask = pass_mask
        self.supports_masking = True

    def build(self, input_shape: Any) -> None:
        shape = (self._channels(input_shape),)
        if self.use_lower:
            self.lower = self.add_weight(name="lower", shape=shape, initializer="zeros")
        if self.use_upper:
            self.upper = self.add_weight(name="upper", shape=shape, initializer="ones")
        super().build(input_shape)  # type: ignore[misc]

    def call(self, inputs: Any) -> Any:
        if self.use_lower:
            inputs = self._maximum(inputs, self._along_channels(self.lower, inputs))
        if self.use_upper:
            inputs = self._minimum(inputs, self._along_channels(self.upper, inputs))
        return inputs

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        return mask if self.pass_mask else None

    def get_config(self) -> dict[str, Any]:
        names = ("axis", "use_lower", "use_upper", "pass_mask")
        config = super().get_config()  # type: ignore[misc]
        return {**config, **{name: getattr(self, name) for name in names}}


class ConvolutionPlusOffset(_Layer):
    """y = activation(convolution(x) + offset); comes before `Wrapper` in the bases."""

    layer: Any

    def __init__(self, layer: Any, activation: Any = None, **kwargs: Any) -> None:
        super().__init__(layer, **kwargs)  # type: ignore[call-arg]
        self.activation = self._activations.get(activation)
        self.supports_masking = layer.supports_masking

    def _offset(self) -> Any:
        """The offset, of a shape that broadcasts over the batch."""
        raise NotImplementedError

    def call(self, inputs: Any) -> Any:
        convolved = self.layer(inputs)
        # The operator of the tensors, since `keras.ops.add` may take the offset for a bias.
        return self.activation(convolved + self._cast(self._offset(), convolved.dtype))

    def get_config(self) -> dict[str, Any]:
        activation = self._activations.serialize(self.activation)
        return {**super().get_config(), "activation": activation}  # type: ignore[misc]


class BorderedConvolution(ConvolutionPlusOffset):
    """y = activation(convolution(x) + border): a convolution that absorbed a shift before it.

    Where a convolution pads with zeros, a shift of its input adds less at the border than inside.
    The sum that it adds does not depend on x, and takes the place of the bias.

    Args:
        layer: the convolution, which has neither a bias nor an activation of its own.
        activation: the activation, as convolutions take it.

    Input: as the convolution's, with all sizes known except that of the batch. Output: as the
    convolution's. Its weight `border` has the shape of the output without the batch.
    """

    _specification: Callable[..., Any]  # the class of specifications of inputs

    def build(self, input_shape: Any) -> None:
        sizes = tuple(input_shape)[1:]
        if None in sizes:
            raise ValueError(
                f"{self.name} needs to know all sizes of its input but that of the batch; it was "
                f"given an input of shape {input_shape}"
            )
        super().build(input_shape)  # type: ignore[misc]
        shape = tuple(self.layer.compute_output_shape((None, *sizes)))[1:]
        self.border = self.add_weight(name="border", shape=shape, initializer="zeros")
        # With other sizes, an output of size 1 would be broadcast without a word.
        self.input_spec = self._specification(shape=(None, *sizes))

    def _offset(self) -> Any:
        return self.border
