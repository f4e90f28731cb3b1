"""Describes tf_keras layers as operations of the neutral graph.

`_DESCRIBERS` lists every layer class that is known, by exact type: a subclass may compute
anything, so it is opaque. Each describer takes a `Call` and says what that call does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras
from tf_keras.src.layers.core.tf_op_layer import TFOpLambda
from tf_keras.src.layers.normalization.batch_normalization import BatchNormalizationBase

from mbn_rewrite import layouts
from mbn_rewrite.algebra import ChannelMap, Kernel
from mbn_rewrite.graph import (
    Affine,
    BatchNorm,
    Chain,
    Concat,
    Input,
    Linear,
    Merge,
    Monotone,
    Op,
    Opaque,
    Permute,
    PositivelyHomogeneous,
    Recurrent,
    Reshape,
    Shape,
    ZeroPadding,
)
from mbn_rewrite.tf_keras_frontend import weights

keras = tf_keras.layers


@dataclass(frozen=True)
class Call:
    """One call of a layer.

    Attributes:
        layer: the layer.
        inputs: the shapes of all tensors that it was given.
        output: the shape of its first output.
        training: False at inference, True where its caller asked for training, None where
            that is decided at run time.
        arguments: what it was called with beside its data.
    """

    layer: Any
    inputs: tuple[Shape, ...]
    output: Shape
    training: bool | None = False
    arguments: tuple[Any, ...] = ()


def describe(call: Call) -> Op:
    """What a call does; `Opaque` for all that is not known."""
    describer = _DESCRIBERS.get(type(call.layer))
    if describer is None:
        if is_batch_norm(call.layer):
            return batch_norm(call.layer, call.training)
        return Opaque()
    if call.arguments and describer is not _tensorflow_function:
        return Opaque("is called with constants")
    return describer(call)


def is_batch_norm(layer: Any) -> bool:
    """Whether a layer is a BatchNormalization or derived from one."""
    return isinstance(layer, BatchNormalizationBase)


# ------------------------------------------------------------------ BatchNormalization


def batch_norm(layer: Any, training: bool | None) -> BatchNorm:
    """A BatchNormalization, or why it must stay as it is."""
    unfit = _unfit(layer, training)
    if unfit:
        return BatchNorm(None, unfit)
    (axis,) = layer.axis
    shape = layer.moving_mean.shape
    parameters = (
        weights.read(layer, "gamma") if layer.scale else np.ones(shape),
        weights.read(layer, "beta") if layer.center else np.zeros(shape),
        weights.read(layer, "moving_mean"),
        weights.read(layer, "moving_variance"),
    )
    if not all(np.all(np.isfinite(array.astype(np.float64))) for array in parameters):
        return BatchNorm(None, "its weights or moving statistics hold NaN or infinity")
    channel_map = ChannelMap.of_batch_norm(*parameters, effective_epsilon(layer), axis)
    if not channel_map.is_finite:
        return BatchNorm(None, "its moving variance and epsilon give no finite scale")
    return BatchNorm(channel_map)


def _unfit(layer: Any, training: bool | None) -> str:
    if type(layer) not in (
        keras.BatchNormalization,
        keras.experimental.SyncBatchNormalization,
    ):
        return f"{type(layer).__name__} is a class of its own, which may compute something else"
    if not layer.built:
        return "it was never called, so it has no weights"
    # A frozen layer uses its moving statistics even when called with training=True.
    if training and layer.trainable:
        return "it is called with training=True, so it normalises by the batch it is given"
    if training is None and layer.trainable:
        return "whether it trains is decided when the model is called"
    if layer.renorm:
        return "it uses batch renormalisation"
    if layer.virtual_batch_size is not None:
        return "it uses virtual batches"
    if layer.adjustment is not None:
        return "it adjusts its output by a function of its own"
    if len(layer.axis) != 1:
        return f"it normalises over several axes {tuple(layer.axis)}"
    return ""


def effective_epsilon(layer: Any) -> float:
    """The epsilon that TensorFlow uses for this layer.

    Earlier releases raise the epsilon of the fused operation to 1.001e-5, the least that
    cuDNN takes; later ones take it as it is.
    """
    epsilon = float(layer.epsilon)
    return max(epsilon, _least_fused_epsilon()) if layer.fused and epsilon < 1.001e-5 else epsilon


@cache
def _least_fused_epsilon() -> float:
    """What the installed TensorFlow makes of a fused epsilon of 0, seen in a result."""
    one, zero = np.ones((1,), np.float32), np.zeros((1,), np.float32)
    variance = np.full((1,), 1e-5, np.float32)
    y, *_ = tf.compat.v1.nn.fused_batch_norm(
        np.ones((1, 1, 1, 1), np.float32), one, zero, zero, variance, 1e-12, is_training=False
    )
    return 1.001e-5 if float(y[0, 0, 0, 0]) < 300.0 else 0.0  # 1/sqrt(1e-5) is 316


# ------------------------------------------------------------------------ linear layers


def activation_kind(activation: Any) -> str:
    """ "linear", "homogeneous" or "other", as in `graph.Linear`."""
    if activation is None or activation is tf_keras.activations.linear:
        return "linear"
    return "homogeneous" if activation in _HOMOGENEOUS else "other"


_HOMOGENEOUS = (tf_keras.activations.relu, tf.nn.relu, tf.nn.leaky_relu)


def _channel_axis(layer: Any, rank: int) -> int:
    if getattr(layer, "data_format", None) != "channels_first":
        return rank - 1
    # Convolutions take further axes like the batch before the channels.
    return rank - 1 - getattr(layer, "rank", rank - 2)


def _linear(
    call: Call, kernels: tuple[Kernel, ...], in_axis: int | None, out_axis: int, pads: bool = False
) -> Op:
    layer = call.layer
    if len(call.inputs) != 1:
        return Opaque("is called with several tensors")
    bias = "bias" if layer.bias is not None else None
    return Linear(kernels, bias, in_axis, out_axis, pads, activation_kind(layer.activation))


def _reads_padding(layer: Any) -> bool:
    reach = [
        (size - 1) * step for size, step in zip(layer.kernel_size, layer.dilation_rate, strict=True)
    ]
    return layer.padding != "valid" and any(reach)


def _conv(call: Call) -> Op:
    layer, axis = call.layer, _channel_axis(call.layer, len(call.inputs[0]))
    kernel = layouts.conv("kernel", layer.kernel.shape, layer.groups)
    return _linear(call, (kernel,), axis, axis, _reads_padding(layer))


def _conv_transpose(call: Call) -> Op:
    layer, axis = call.layer, _channel_axis(call.layer, len(call.inputs[0]))
    kernel = layouts.conv_transpose("kernel", layer.kernel.shape)
    # A constant input gives a constant output only if each output reads one input by the
    # same weights.
    uneven = any(size != 1 for size in (*layer.kernel_size, *layer.strides))
    return _linear(call, (kernel,), axis, axis, uneven)


def _depthwise_conv(call: Call) -> Op:
    layer, axis = call.layer, _channel_axis(call.layer, len(call.inputs[0]))
    kernel = layouts.depthwise("depthwise_kernel", layer.depthwise_kernel.shape)
    return _linear(call, (kernel,), axis, axis, _reads_padding(layer))


def _separable_conv(call: Call) -> Op:
    layer, axis = call.layer, _channel_axis(call.layer, len(call.inputs[0]))
    kernels = (
        layouts.depthwise("depthwise_kernel", layer.depthwise_kernel.shape),
        layouts.conv("pointwise_kernel", layer.pointwise_kernel.shape),
    )
    return _linear(call, kernels, axis, axis, _reads_padding(layer))


def _dense(call: Call) -> Op:
    kernel = layouts.matrix("kernel", call.layer.kernel.shape)
    return _linear(call, (kernel,), len(call.inputs[0]) - 1, len(call.output) - 1)


def _einsum_dense(call: Call) -> Op:
    """Products with one output channel axis that comes from the kernel alone."""
    layer = call.layer
    read = layouts.einsum(layer.equation, len(call.inputs[0]), len(call.output))
    if isinstance(read, str):
        return Opaque(read)
    if layer.bias is not None and layer.bias_axes != read.channels:
        return Opaque("has a bias along other axes than its output channels")
    if read.out_axis != len(call.output) - 1:
        return Opaque("does not have its output channels last")
    kernel = read.layout("kernel", layer.kernel.shape)
    return _linear(call, (kernel,), read.in_axis, read.out_axis)


def _time_distributed(call: Call) -> Op:
    layer = call.layer
    if type(layer.layer) is not keras.Dense or len(call.inputs) != 1:
        return Opaque()
    inner = _dense(Call(layer.layer, call.inputs, call.output))
    return _prefixed(inner, "layer.") if isinstance(inner, Linear) else inner


def _prefixed(op: Linear, prefix: str) -> Linear:
    (kernel,) = op.kernels
    return Linear(
        (Kernel(prefix + kernel.name, kernel.view, kernel.in_dims, kernel.out_dims),),
        op.bias and prefix + op.bias,
        op.in_axis,
        op.out_axis,
        op.pads,
        op.activation,
    )


# --------------------------------------------------------------------- recurrent layers

_RECURRENT = (keras.GRU, keras.LSTM, keras.SimpleRNN)


def _recurrent(call: Call) -> Op:
    return _sequence(call, (("", call.layer),))


def _bidirectional(call: Call) -> Op:
    pair = (
        ("forward_layer.", call.layer.forward_layer),
        ("backward_layer.", call.layer.backward_layer),
    )
    if any(type(layer) not in _RECURRENT for _, layer in pair):
        return Opaque()
    return _sequence(call, pair)


def _sequence(call: Call, layers: tuple[tuple[str, Any], ...]) -> Op:
    branches: list[Chain] = []
    for prefix, layer in layers:
        if call.training is not False and layer.dropout:
            return Opaque("drops out inputs, since it is called with training=True")
        kernel = layouts.matrix(prefix + "cell.kernel", layer.cell.kernel.shape)
        branches.append(((kernel,), prefix + "cell.bias" if layer.use_bias else None))
    return Recurrent(tuple(branches), in_axis=2)


# --------------------------------------------------------------- layers that let it pass


def _spatial(kind: type[Affine] | type[Monotone] | type[ZeroPadding]) -> Callable[[Call], Op]:
    def describer(call: Call) -> Op:
        axis = _channel_axis(call.layer, len(call.inputs[0]))
        return kind(axis, axis)

    return describer


def _global_pool(kind: type[Affine] | type[Monotone]) -> Callable[[Call], Op]:
    def describer(call: Call) -> Op:
        axis = _channel_axis(call.layer, len(call.inputs[0]))
        return kind(axis, axis if call.layer.keepdims else 1)

    return describer


def _upsampling(call: Call) -> Op:
    if getattr(call.layer, "interpolation", "nearest") not in ("nearest", "bilinear"):
        return Opaque(f"interpolates by {call.layer.interpolation}")
    return _spatial(Affine)(call)


def _dropout(call: Call) -> Op:
    if call.training is False:
        return Affine()
    return Opaque("is random, since it is called with training=True")


def _flatten(call: Call) -> Op:
    if call.layer.data_format == "channels_first" and len(call.inputs[0]) > 2:
        return Opaque("moves the channels last before it flattens")
    return Reshape()


def _permute(call: Call) -> Op:
    return Permute((0, *call.layer.dims))


def _activation(call: Call) -> Op:
    kind = activation_kind(call.layer.activation)
    if kind == "linear":
        return Affine()
    if kind == "homogeneous":
        return PositivelyHomogeneous()
    name = getattr(call.layer.activation, "__name__", "")
    return Opaque(f"is a {name} activation" if name else "is an activation")


def _relu(call: Call) -> Op:
    layer = call.layer
    if layer.max_value is None and not np.any(layer.threshold):
        return PositivelyHomogeneous()
    return Opaque("is an activation with a limit")


def _concatenate(call: Call) -> Op:
    return Concat(call.layer.axis % len(call.output))


# ------------------------------------------------- TensorFlow functions on Keras tensors

_TF_MERGES = {
    "__operators__.add": "add",
    "math.add": "add",
    "add": "add",
    "math.subtract": "subtract",
    "math.maximum": "maximum",
    "math.minimum": "minimum",
}


def _tensorflow_function(call: Call) -> Op:
    """Functions of tensors alone; a constant among the arguments makes them opaque."""
    symbol = call.layer.symbol
    if symbol == "concat" and len(call.arguments) == 1 and isinstance(call.arguments[0], int):
        return Concat(call.arguments[0] % len(call.output))
    if call.arguments:
        return Opaque()
    if symbol in _TF_MERGES and len(call.inputs) == 2:
        return Merge(_TF_MERGES[symbol])
    if symbol == "nn.relu":
        return PositivelyHomogeneous()
    if symbol in ("identity", "stop_gradient"):
        return Affine()
    return Opaque()


# ----------------------------------------------------------------------------- the table


def _always(op: Op) -> Callable[[Call], Op]:
    return lambda call: op


def _named(names: str, describer: Callable[[Call], Op]) -> dict[type, Callable[[Call], Op]]:
    return {getattr(keras, name): describer for name in names.split()}


_DESCRIBERS: dict[type, Callable[[Call], Op]] = {
    keras.InputLayer: _always(Input()),
    **_named("Conv1D Conv2D Conv3D", _conv),
    **_named("Conv1DTranspose Conv2DTranspose Conv3DTranspose", _conv_transpose),
    **_named("DepthwiseConv1D DepthwiseConv2D", _depthwise_conv),
    **_named("SeparableConv1D SeparableConv2D", _separable_conv),
    keras.Dense: _dense,
    keras.EinsumDense: _einsum_dense,
    keras.TimeDistributed: _time_distributed,
    **dict.fromkeys(_RECURRENT, _recurrent),
    keras.Bidirectional: _bidirectional,
    **_named("AveragePooling1D AveragePooling2D AveragePooling3D", _spatial(Affine)),
    **_named("Cropping1D Cropping2D Cropping3D", _spatial(Affine)),
    **_named("MaxPooling1D MaxPooling2D MaxPooling3D", _spatial(Monotone)),
    **_named("ZeroPadding1D ZeroPadding2D ZeroPadding3D", _spatial(ZeroPadding)),
    **_named(
        "GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D",
        _global_pool(Affine),
    ),
    **_named("GlobalMaxPooling1D GlobalMaxPooling2D GlobalMaxPooling3D", _global_pool(Monotone)),
    **_named("UpSampling1D UpSampling2D UpSampling3D", _upsampling),
    keras.RepeatVector: _always(Affine(1, 2)),
    **_named("Dropout SpatialDropout1D SpatialDropout2D SpatialDropout3D", _dropout),
    **_named("GaussianDropout GaussianNoise AlphaDropout", _dropout),
    **_named("Identity ActivityRegularization", _always(Affine())),
    keras.Activation: _activation,
    keras.ReLU: _relu,
    **_named("LeakyReLU PReLU", _always(PositivelyHomogeneous())),
    keras.Flatten: _flatten,
    keras.Reshape: _always(Reshape()),
    keras.Permute: _permute,
    **{
        getattr(keras, name): _always(Merge(name.lower()))
        for name in ("Add", "Subtract", "Average", "Maximum", "Minimum")
    },
    keras.Concatenate: _concatenate,
    TFOpLambda: _tensorflow_function,
}
