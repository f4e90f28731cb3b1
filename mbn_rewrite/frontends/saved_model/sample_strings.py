"""Sample strings for signatures: words, numbers, files of images and sound, tf.train.Examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from mbn_rewrite.frontends.saved_model.function_graph import FunctionGraph

Text = Callable[[np.random.Generator], bytes]

_STEPS = 3  # values of a feature whose number is left open
_SIDE, _SAMPLES, _RATE = 64, 1600, 16_000
# Encoders of the lists of values that examples hold, by dtype.
_LISTS = {
    tf.int64: lambda values: tf.train.Feature(int64_list=tf.train.Int64List(value=values)),
    tf.float32: lambda values: tf.train.Feature(float_list=tf.train.FloatList(value=values)),
    tf.string: lambda values: tf.train.Feature(bytes_list=tf.train.BytesList(value=values)),
}


def texts_for(function: FunctionGraph | None) -> list[Text]:
    """Kinds of strings to try, the likeliest first; `function` is the graph of the signature."""
    examples = [] if function is None else _examples(function)
    return [*examples, _word, _png, _jpeg, _in_base64(_jpeg), _in_base64(_png), _number, _wav]


def _word(rng: np.random.Generator) -> bytes:
    return bytes(rng.integers(ord("a"), ord("z") + 1, rng.integers(1, 6)).astype(np.uint8))


def _number(rng: np.random.Generator) -> bytes:
    return str(rng.integers(0, 10)).encode()


def _picture(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (_SIDE, _SIDE, 3), np.uint8)


def _png(rng: np.random.Generator) -> bytes:
    return bytes(tf.io.encode_png(_picture(rng)).numpy())


def _jpeg(rng: np.random.Generator) -> bytes:
    return bytes(tf.io.encode_jpeg(_picture(rng)).numpy())


def _wav(rng: np.random.Generator) -> bytes:
    sound = rng.uniform(-1, 1, (_SAMPLES, 1)).astype(np.float32)
    return bytes(tf.audio.encode_wav(sound, _RATE).numpy())


def _in_base64(text: Text) -> Text:
    """The same in base64 as TensorFlow decodes it: for the web, without padding."""
    return lambda rng: bytes(tf.io.encode_base64(text(rng)).numpy())


# -------------------------------------------------------------------------------- examples


def _examples(function: FunctionGraph) -> list[Text]:
    """Makers of serialized tf.train.Examples with the features that a graph parses."""
    library = function.graph_def.library.function
    bodies = [function.graph_def.node, *(each.node_def for each in library)]
    found = (_features(node, body) for body in bodies for node in body)
    parsed = next(filter(None, found), None)
    if parsed is None:
        return []
    holds_text = any(dtype == tf.string for dtype, _ in parsed.values())
    texts = (_word, _jpeg, _png) if holds_text else (_word,)
    return [partial(_example, features=parsed, text=text) for text in texts]


def _features(node: Any, body: Iterable[Any]) -> dict[str, tuple[Any, int]]:
    """The features that a node parses: name -> dtype and number of values.

    `body` is the graph or function that it is in.
    """
    if node.op not in ("ParseExampleV2", "ParseExample", "ParseSingleExample"):
        return {}
    sparse_types, dense_types = (
        [tf.as_dtype(number) for number in node.attr[key].list.type]
        for key in ("sparse_types", "Tdense")
    )
    if node.op == "ParseSingleExample":
        sparse, dense = (list(node.attr[key].list.s) for key in ("sparse_keys", "dense_keys"))
    elif node.op == "ParseExampleV2":
        sparse, dense = (_constants(node.input[place], body) for place in (2, 3))
    else:
        start = 2 + len(sparse_types)
        keys = [node.input[2:start], node.input[start : start + len(dense_types)]]
        sparse, dense = ([_constants(name, body)[0] for name in names] for names in keys)
    sizes = [
        math.prod(dim.size if dim.size > 0 else _STEPS for dim in shape.dim)
        for shape in node.attr["dense_shapes"].list.shape
    ]
    features = {key: (dtype, _STEPS) for key, dtype in zip(sparse, sparse_types, strict=False)}
    features |= {
        key: (dtype, size) for key, dtype, size in zip(dense, dense_types, sizes, strict=False)
    }
    return {tf.compat.as_str(key): kind for key, kind in features.items()}


def _constants(name: str, body: Iterable[Any]) -> list[bytes]:
    """The strings of a constant; [] where it is none."""
    node = next((node for node in body if node.name == name.partition(":")[0]), None)
    if node is None or node.op != "Const":
        return []
    return list(np.ravel(tf.make_ndarray(node.attr["value"].tensor)))


def _example(rng: np.random.Generator, features: dict[str, tuple[Any, int]], text: Text) -> bytes:
    makers: dict[Any, Callable[[int], Any]] = {
        tf.int64: lambda size: rng.integers(0, 2, size),
        tf.float32: lambda size: rng.standard_normal(size),
        tf.string: lambda size: [text(rng) for _ in range(size)],
    }
    feature = {key: _LISTS[dtype](makers[dtype](size)) for key, (dtype, size) in features.items()}
    example = tf.train.Example(features=tf.train.Features(feature=feature))
    return bytes(example.SerializeToString())
