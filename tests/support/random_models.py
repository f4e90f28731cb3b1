"""Random models with BatchNormalization in every place it may stand.

A seed gives a layout, a dtype and a chain of random steps. Each step applies a layer to a
tensor made before (so tensors come to have several readers), calls an earlier layer again,
joins tensors, or calls a small nested model. BatchNormalizations get random parameters:
both signs of gamma, zeros, tiny and zero variances, with and without a shift.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.support.kerases import BATCH_NORMS, K, Model, assign, inputs_like, policy, set_policy


@dataclass
class RandomModel:
    """A model, what to call it with, and how."""

    model: Any
    inputs: Any
    needs_xla: bool  # TensorFlow's CPU kernels do not take its layout


def random_model(seed: int) -> RandomModel:
    rng = np.random.default_rng(seed)
    layout = _choose(rng, _LAYOUTS, [0.4, 0.15, 0.2, 0.1, 0.15])
    name = _choose(rng, ["float64", "float32", "mixed_float16"], [0.6, 0.3, 0.1])
    if layout.rank == 5:
        name = "float32"  # TensorFlow's CPU kernels pool in 3-D in no other dtype
    if layout.needs_xla and name == "mixed_float16":
        name = "float32"
    set_policy(name)
    model = _Builder(rng, layout).build()
    randomise(model, rng)
    arrays = [rng.standard_normal([2, *tuple(tensor.shape)[1:]]) for tensor in model.inputs]
    return RandomModel(model, inputs_like(model, arrays), layout.needs_xla)


def randomise(model, rng: np.random.Generator) -> None:
    """Gives all BatchNormalizations random parameters, and weights a moderate size."""
    for layer in model._flatten_layers(include_self=False):
        if isinstance(layer, BATCH_NORMS):
            _randomise_norm(layer, rng)
        elif not list(layer._flatten_layers(include_self=False)):
            for variable in layer.weights:
                if None in tuple(getattr(variable, "shape", (None,))):
                    continue  # the words of a lookup layer
                shape = tuple(variable.shape)
                fan = max(1, int(np.prod(shape[:-1])))
                assign(variable, rng.standard_normal(shape) / np.sqrt(fan))


def _randomise_norm(layer, rng):
    shape = tuple(layer.moving_mean.shape)
    gamma = rng.uniform(0.3, 1.5, shape)
    if rng.random() < 0.5:
        gamma = gamma * rng.choice([-1, 1], shape)
    if rng.random() < 0.2:
        gamma[rng.random(shape) < 0.3] = 0.0
    variance = rng.uniform(0.2, 2.0, shape)
    if rng.random() < 0.2:
        variance[rng.random(shape) < 0.3] = _choose(rng, [0.0, 1e-36, 1e-12])
    shifts = rng.random() < 0.6
    assign(layer.moving_mean, rng.normal(0, 0.5, shape) if shifts else np.zeros(shape))
    assign(layer.moving_variance, variance)
    if layer.scale:
        assign(layer.gamma, gamma)
    if layer.center:
        assign(layer.beta, rng.normal(0, 0.5, shape) if shifts else np.zeros(shape))


def _choose(rng, options, weights=None):
    return options[int(rng.choice(len(options), p=weights))]


# ------------------------------------------------------------------------------- layouts


@dataclass(frozen=True)
class Layout:
    """A kind of tensor: its rank with the batch, and where its channels lie."""

    rank: int
    first: bool = False

    @property
    def needs_xla(self) -> bool:
        return self.first

    @property
    def axis(self) -> int:
        return 1 if self.first else self.rank - 1

    @property
    def kwargs(self) -> dict:
        return {"data_format": "channels_first" if self.first else "channels_last"}

    @property
    def dims(self) -> str:
        return f"{self.rank - 2}D"

    def shape(self, rng) -> tuple[int, ...]:
        sizes = [int(rng.integers(5, 8))] * (self.rank - 2) if self.rank < 5 else [4, 4, 4]
        channels = [int(rng.integers(2, 5))]
        return tuple(channels + sizes if self.first else sizes + channels)


_LAYOUTS = [Layout(4), Layout(4, first=True), Layout(3), Layout(5), Layout(2)]


# ------------------------------------------------------------------------------- building


class _Builder:
    def __init__(self, rng: np.random.Generator, layout: Layout) -> None:
        self.rng = rng
        self.layout = layout
        self.tensors: list[Any] = []
        self.called: list[tuple[Any, tuple]] = []

    def build(self) -> Any:
        shape = self.layout.shape(self.rng)
        dtype = policy().compute_dtype
        dtype = "float32" if dtype == "float16" else dtype
        count = 1 + (self.rng.random() < 0.2)
        inputs = [K.Input(shape, dtype=dtype) for _ in range(count)]
        self.tensors = list(inputs)
        for _ in range(int(self.rng.integers(4, 14))):
            self.step()
        outputs = [self.tensors[-1]]
        if self.rng.random() < 0.3:
            outputs.append(_choose(self.rng, self.tensors[count:]))
        if self.rng.random() < 0.5:
            outputs = [self.head(outputs[0]), *outputs[1:]]
        single = len(inputs) == len(outputs) == 1
        return Model(*((inputs[0], outputs[0]) if single else (inputs, outputs)))

    def step(self) -> None:
        x = self.tensors[-1] if self.rng.random() < 0.8 else _choose(self.rng, self.tensors)
        steps = [self.norm, self.linear, self.passing, self.merge, self.again, self.nested]
        step = _choose(self.rng, steps, [0.34, 0.26, 0.2, 0.12, 0.05, 0.03])
        self.tensors.append(step(x))

    def call(self, layer: Any, x: Any) -> Any:
        self.called.append((layer, tuple(x.shape)))
        return layer(x)

    def norm(self, x: Any) -> Any:
        options = {
            "scale": self.rng.random() < 0.8,
            "center": self.rng.random() < 0.8,
            "epsilon": _choose(self.rng, [1e-3, 1e-5]),
        }
        axis = self.layout.axis
        if self.rng.random() < 0.05 and self.layout.rank > 2:
            axis = int(self.rng.integers(1, self.layout.rank))
        return self.call(K.BatchNormalization(axis, **options), x)

    def linear(self, x: Any) -> Any:
        rng, layout = self.rng, self.layout
        common = {"use_bias": bool(rng.random() < 0.5)}
        if rng.random() < 0.15:
            common["activation"] = "relu"
        channels = int(rng.integers(2, 6))
        if layout.rank == 2:
            return self.call(K.Dense(channels, **common), x)
        size = int(rng.integers(1, 4))
        sizes = [n for i, n in enumerate(x.shape[1:], 1) if i != layout.axis]
        padding = "valid" if rng.random() < 0.4 and min(sizes) > size else "same"
        common |= {"padding": padding, **layout.kwargs}
        kinds = ["Conv", "Conv", "Conv", "Transpose"]
        if layout.rank < 5:
            kinds += ["Depthwise", "Separable"]
        kind = _choose(rng, kinds)
        if kind == "Depthwise":
            layer = getattr(K, f"DepthwiseConv{layout.dims}")
            return self.call(layer(size, depth_multiplier=int(rng.integers(1, 3)), **common), x)
        if kind == "Separable":
            return self.call(getattr(K, f"SeparableConv{layout.dims}")(channels, size, **common), x)
        if kind == "Transpose":
            return self.call(getattr(K, f"Conv{layout.dims}Transpose")(channels, size, **common), x)
        if x.shape[layout.axis] % 2 == 0 and rng.random() < 0.3 and layout.rank < 5:
            common |= {"groups": 2}
            channels = 2 * channels
        return self.call(getattr(K, f"Conv{layout.dims}")(channels, size, **common), x)

    def passing(self, x: Any) -> Any:
        rng, layout = self.rng, self.layout
        kinds = ["ReLU", "LeakyReLU", "Dropout", "Identity", "tanh", "relu6", "dense"]
        if layout.rank > 2:
            kinds += ["MaxPooling", "AveragePooling", "ZeroPadding", "Cropping", "UpSampling"]
        kind = _choose(rng, kinds)
        sizes = [n for i, n in enumerate(x.shape[1:], 1) if i != layout.axis]
        # One-dimensional padding, cropping and upsampling know channels last only.
        layout_kwargs = layout.kwargs if layout.rank > 3 else {}
        if kind in ("MaxPooling", "AveragePooling"):
            padding = _choose(rng, ["valid", "same"]) if min(sizes) > 2 else "same"
            layer = getattr(K, f"{kind}{layout.dims}")(2, 1, padding=padding, **layout.kwargs)
        elif kind == "ZeroPadding" and max(sizes) < 10:
            layer = getattr(K, f"ZeroPadding{layout.dims}")(1, **layout_kwargs)
        elif kind == "Cropping" and min(sizes) > 3:
            layer = getattr(K, f"Cropping{layout.dims}")(1, **layout_kwargs)
        elif kind == "UpSampling" and max(sizes) < 6:
            layer = getattr(K, f"UpSampling{layout.dims}")(2, **layout_kwargs)
        elif kind == "LeakyReLU":
            layer = K.LeakyReLU(0.3)
        elif kind == "Dropout":
            layer = K.Dropout(0.5)
        elif kind == "Identity":
            layer = K.Activation("linear")
        elif kind == "tanh":
            layer = K.Activation("tanh")
        elif kind == "relu6":
            layer = K.ReLU(6.0)
        elif kind == "dense" and not layout.first:
            layer = K.Dense(int(rng.integers(2, 6)))
        else:
            layer = K.ReLU()
        return self.call(layer, x)

    def merge(self, x: Any) -> Any:
        rng = self.rng
        alike = [t for t in self.tensors if t.shape == x.shape]
        # A branch of its own makes merges whose inputs have a single reader.
        other = self.linear_like(x) if rng.random() < 0.6 else _choose(rng, alike)
        if other.shape != x.shape:
            return self.concatenate(x, other)
        kind = _choose(rng, ["Add", "Add", "Add", "Concat", "Subtract", "Average", "Maximum",
                             "Multiply", "operator"])  # fmt: skip
        if kind == "Concat":
            return self.concatenate(x, other)
        if kind == "operator" and x.dtype == other.dtype:
            return x + other
        return getattr(K, "Add" if kind == "operator" else kind)()([x, other])

    def concatenate(self, x: Any, other: Any) -> Any:
        return K.Concatenate(self.layout.axis)([x, other])

    def linear_like(self, x: Any) -> Any:
        """A 1x1 convolution of some tensor, with as many channels as x where that fits."""
        spatial = [i for i in range(1, self.layout.rank) if i != self.layout.axis]
        sources = [t for t in self.tensors if all(t.shape[i] == x.shape[i] for i in spatial)]
        channels = x.shape[self.layout.axis]
        if self.layout.rank == 2:
            return K.Dense(channels)(_choose(self.rng, sources))
        layer = getattr(K, f"Conv{self.layout.dims}")
        y = layer(channels, 1, **self.layout.kwargs)(_choose(self.rng, sources))
        return K.Dropout(0.5)(y) if self.rng.random() < 0.3 else y

    def again(self, x: Any) -> Any:
        """Calls an earlier layer once more, on the same or on another tensor."""
        options = [
            (layer, t)
            for layer, shape in self.called
            for t in self.tensors
            if tuple(t.shape) == shape
        ]
        if not options:
            return self.norm(x)
        layer, t = _choose(self.rng, options)
        return layer(t)

    def nested(self, x: Any) -> Any:
        inner = _Builder(self.rng, self.layout)
        source = K.Input(x.shape[1:], dtype=x.dtype)
        inner.tensors = [source]
        for _ in range(int(self.rng.integers(2, 5))):
            inner.step()
        model = Model(source, inner.tensors[-1])
        y = model(x)
        if self.rng.random() < 0.3 and y.shape == x.shape:
            y = model(y)
        return y

    def head(self, x: Any) -> Any:
        rank = len(x.shape)
        if rank > 2 and self.rng.random() < 0.5:
            pool = "GlobalAveragePooling" if self.rng.random() < 0.6 else "GlobalMaxPooling"
            x = getattr(K, f"{pool}{self.layout.dims}")(**self.layout.kwargs)(x)
        elif rank == 3 and self.rng.random() < 0.5:
            x = K.GRU(3)(x)
        elif rank > 2:
            x = K.Flatten()(x)
        if self.rng.random() < 0.5:
            x = K.BatchNormalization()(x)
        return K.Dense(3)(x)
