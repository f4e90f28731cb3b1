"""Random networks, in sight and wrapped at random into holders of every kind."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

import mbn_rewrite as mbn
from mbn_rewrite.frontends.keras_common.cloning import parts
from tests.support.holders import assert_same
from tests.support.kerases import K, Model
from tests.support.random_models import randomise


@dataclass
class Beside:
    """Steps that run beside the value itself, and the layer that adds what they give."""

    steps: list
    add: object


@dataclass
class Twice:
    """Steps that run, and run again."""

    steps: list


def network(rng, depth=0):
    """A random network, as a list of layers and groups of layers."""
    steps = []
    for _ in range(int(rng.integers(2, 5))):
        kinds = ["conv", "norm", "relu", "pool", "beside", "twice"] if depth < 2 else ["conv"]
        kind = rng.choice(kinds)
        if kind == "conv":
            size = int(rng.choice([1, 3]))
            steps.append(K.Conv2D(4, size, padding="same", use_bias=bool(rng.integers(2))))
        elif kind == "norm":
            steps += [K.Conv2D(4, 1), K.BatchNormalization()]
        elif kind == "relu":
            steps += [K.BatchNormalization(), K.ReLU()]
        elif kind == "pool":
            steps.append(K.AveragePooling2D(2, 1, padding="valid"))
            steps.append(K.ZeroPadding2D(((1, 0), (0, 1))))
        elif kind == "beside":
            steps.append(Beside([*network(rng, depth + 1), K.BatchNormalization()], K.Add()))
        else:
            steps.append(Twice(network(rng, depth + 1)))
    return steps


def run(steps, x):
    for step in steps:
        if isinstance(step, Beside):
            x = step.add([x, run(step.steps, x)])
        elif isinstance(step, Twice):
            x = run(step.steps, run(step.steps, x))
        else:
            x = step(x)
    return x


def wrapped(steps, rng, keras):
    """The same with parts of it in holders, which may lie in holders."""
    for step in steps:
        if isinstance(step, (Beside, Twice)):
            step.steps = wrapped(step.steps, rng, keras)
    start = int(rng.integers(0, len(steps)))
    stop = int(rng.integers(start + 1, len(steps) + 1))
    inner = steps[start:stop]
    kind = rng.choice(["layer", "model", "named", "sequential", "twice nested"])
    if kind == "sequential" and any(isinstance(step, (Beside, Twice)) for step in inner):
        kind = "named"
    return [*steps[:start], _holder(kind, inner, keras), *steps[stop:]]


def _taken_apart(steps):
    """The layers of steps, in order."""
    layers = []
    for step in steps:
        if isinstance(step, Beside):
            layers += [*_taken_apart(step.steps), step.add]
        elif isinstance(step, Twice):
            layers += _taken_apart(step.steps)
        else:
            layers.append(step)
    return layers


def _put_together(steps, layers):
    """Steps like others, of these layers, which it takes from an iterator."""
    made = []
    for step in steps:
        if isinstance(step, Beside):
            made.append(Beside(_put_together(step.steps, layers), next(layers)))
        elif isinstance(step, Twice):
            made.append(Twice(_put_together(step.steps, layers)))
        else:
            made.append(next(layers))
    return made


def _shape_of(steps):
    """What steps are made of, without their layers."""
    return [
        Beside(_shape_of(step.steps), None)
        if isinstance(step, Beside)
        else Twice(_shape_of(step.steps))
        if isinstance(step, Twice)
        else None
        for step in steps
    ]


class _Layout:
    """Steps without their layers, which nothing looks into."""

    __slots__ = ("steps",)

    def __init__(self, steps):
        self.steps = _shape_of(steps)

    def of(self, layers):
        return _put_together(self.steps, iter(layers))


def _holder(kind, steps, keras):
    class Part(keras.layers.Layer):
        def __init__(self, steps, **kwargs):
            super().__init__(**kwargs)
            self.layout, self.found = _Layout(steps), _taken_apart(steps)

        def call(self, x):
            return run(self.layout.of(self.found), x)

    class Whole(keras.Model):
        def __init__(self, steps, **kwargs):
            super().__init__(**kwargs)
            self.layout, self.found = _Layout(steps), _taken_apart(steps)

        def call(self, x):
            return run(self.layout.of(self.found), x)

    class Named(Part):
        def __init__(self, steps, **kwargs):
            super().__init__([], **kwargs)
            self.layout, found = _Layout(steps), _taken_apart(steps)
            self.named = {f"step_{i}": layer for i, layer in enumerate(found)}

        def call(self, x):
            return run(self.layout.of(self.named.values()), x)

    class Models(keras.layers.Layer):
        def __init__(self, steps, **kwargs):
            super().__init__(**kwargs)
            self.models = [keras.Sequential([K.Input((8, 8, 4)), *steps])]

        def call(self, x):
            for model in self.models:
                x = model(x)
            return x

    if kind == "twice nested":
        return Part([Whole(steps)])
    kinds = {"layer": Part, "model": Whole, "named": Named, "sequential": Models}
    return kinds[kind](steps)


def pair(seed, keras):
    """A random network in sight, and the same in holders, with the same weights."""
    models = []
    for wrap in (False, True):
        keras.backend.clear_session()  # so that layers have the same names
        rng = np.random.default_rng(seed)
        steps = [K.Conv2D(4, 1), *network(rng)]
        if wrap:
            steps[1:] = wrapped(steps[1:], rng, keras)
        x = K.Input((8, 8, 3))
        models.append(Model(x, K.Dense(2)(run(steps, x))))
    plain, held = models
    randomise(plain, np.random.default_rng(seed))
    layers = {layer.name: layer for layer in parts(plain)}
    for layer in parts(held):
        if layer.weights and not list(layer._flatten_layers(include_self=False)):
            layer.set_weights(layers[layer.name].get_weights())
    return plain, held


def check_holders(seed, keras):
    """Checks that decisions, with their reasons, and outputs do not depend on holders."""
    plain, held = pair(seed, keras)
    assert_same(plain, held)
    assert _decided(plain) == _decided(held)
    assert_same(held, mbn.convert(held, "fold"))


def _decided(model):
    """What a plan decides on each BatchNormalization, by the last part of its name, and why."""
    # In sight, calls of a shared layer may get weights of their own; where code calls it, not.
    decisions = mbn.plan(model, "fold", keep_shared=True).decisions
    return sorted((d.name.rpartition("/")[2], d.action, _told(d.reason)) for d in decisions)


def _told(reason):
    """A reason without the paths of names."""
    return re.sub(r"'[^' ]*/([^'/ ]+)'", r"'\1'", reason)
