"""Unsafe parts of Keras files, found in their configurations before anything is loaded.

A configuration names classes and functions, and loading a file calls them: layers that call
functions of TensorFlow by name, byte code, functions and classes of any module. For a file that is
not trusted, only what is known to do nothing but compute may run: the functions in
`pure_functions`, whatever Keras itself builds models from, and whatever the user has registered or
imported. `check` works on parsed JSON without TensorFlow; `resolved_names.check_objects` resolves
the names right before loading.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.keras_common.pure_functions import computes
from mbn_rewrite.frontends.limits import CONFIG_DEPTH


@dataclass(frozen=True)
class Finding:
    """Something that loading a file would do beyond creating layers.

    Attributes:
        does: what it would do, in words that follow the file's name.
        where: the layers and keys that lead there.
    """

    does: str
    where: str


_HOLDS_CODE = "holds code, which runs when it is loaded"
# Layers that call a function of TensorFlow by name, and the key of that name.
_CALLERS = {"TFOpLambda": "function", "SlicingOpLambda": "function", "ClassMethod": "cls_symbol"}
_METHODS = {"ClassMethod": "method_name", "InstanceMethod": "attr_name",
            "InstanceProperty": "attr_name"}  # fmt: skip
# Layers that read a file of the host, and the key of its name.
_READERS = {
    **dict.fromkeys(("IndexLookup", "StringLookup", "IntegerLookup"), "vocabulary"),
    **dict.fromkeys(("TextVectorization", "VocabularyFileCategoricalColumn"), "vocabulary"),
    **dict.fromkeys(("DynamicLookup", "DynamicEmbedding"), "initial_vocabulary"),
    "TFSMLayer": "filepath",
}
# Keys under which feature columns name such a file.
_COLUMN_FILES = ("vocabulary_file", "ckpt_to_load_from")
# Layers that contain programs of other libraries.
_PROGRAMS = ("TorchModuleWrapper", "JaxLayer", "FlaxLayer")


def check(source: object, configs: Iterable[Any]) -> None:
    """Refuses configurations that can be seen to be unsafe without TensorFlow.

    Args:
        source: the file, for the message.
        configs: its configurations, as parsed JSON.

    Raises:
        RewriteError: loading them would run code, call a function that is not known to
            compute, or read a file of the host.
    """
    for config in configs:
        for part, where in parts_of(source, config):
            name = part.get("class_name")
            names = (name,) if isinstance(name, str) else ()
            refuse(source, unsafe_effect(part, part.get("config"), names, where))


def refuse(source: object, found: Finding | None) -> None:
    """Raises RewriteError for a finding, if there is one."""
    if found is not None:
        raise RewriteError(
            f"{source} {found.does} ({found.where}). If you trust whoever made it, pass --trusted "
            "(trusted=True in Python)"
        )


def parts_of(source: object, config: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """All dictionaries in a configuration, with the path to each in words.

    The configuration with which the model was compiled is left out, as it is not loaded.
    """
    if isinstance(config, dict) and "compile_config" in config:
        config = {key: value for key, value in config.items() if key != "compile_config"}
    pending: list[tuple[Any, tuple[str, ...]]] = [(config, ())]
    while pending:
        value, path = pending.pop()
        if len(path) > CONFIG_DEPTH:
            raise RewriteError(
                f"{source} holds a configuration nested more than {CONFIG_DEPTH} levels deep, "
                "which no model is. It may be damaged"
            )
        if isinstance(value, dict):
            yield value, _in_words(path)
            pending += [(inner, (*path, _label(key, inner))) for key, inner in value.items()]
        elif isinstance(value, list):
            pending += [(inner, (*path, _label("", inner))) for inner in value]


def _label(key: str, value: Any) -> str:
    """One step of the path to a part: the layer that begins there, or else the key."""
    if isinstance(value, dict) and isinstance(value.get("class_name"), str):
        inner = value.get("config")
        name = inner.get("name") if isinstance(inner, dict) else None
        return f"{value['class_name']} '{name}'" if isinstance(name, str) else value["class_name"]
    return "" if key in ("config", "layers") else str(key)


def _in_words(path: tuple[str, ...]) -> str:
    told = [step for step in path if step]
    return " > ".join(told[-6:]) or "the model"


def unsafe_effect(
    part: dict[str, Any], config: Any, names: Iterable[str], where: str
) -> Finding | None:
    """Unsafe effect of creating an object, judged by the names of its class and its bases."""
    names = set(names)
    if "__lambda__" in names or _has_byte_code(part) or names.intersection(_PROGRAMS):
        return Finding(_HOLDS_CODE, where)
    if not isinstance(config, dict):
        return None
    for name in names:
        if name in _CALLERS:
            symbol = config.get(_CALLERS[name])
            allowed = isinstance(symbol, str) and (
                symbol in _OBJECTS if name == "ClassMethod" else computes(symbol) or is_raw(symbol)
            )
            if not allowed:
                return Finding(f"calls tf.{symbol}, which is not known to compute only", where)
        if name in _METHODS and not _is_plain(config.get(_METHODS[name])):
            return Finding(f"calls the method {config.get(_METHODS[name])}", where)
        files = [_READERS[name]] if name in _READERS else []
        files += _COLUMN_FILES if name.endswith("Column") else []
        for key in files:
            if isinstance(config.get(key), str) and config[key]:
                return Finding(f"reads {config[key]!r} when it is loaded", where)
    return None


# Classes of TensorFlow whose methods only compute.
_OBJECTS = ("RaggedTensor", "SparseTensor", "compat.v1.SparseTensor", "sparse.SparseTensor")


def is_raw(symbol: str) -> bool:
    """Whether a public name of TensorFlow is that of an operation, which `check_objects` checks."""
    return symbol.startswith("raw_ops.")


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and name.isidentifier() and not name.startswith("_")


def _has_byte_code(part: dict[str, Any]) -> bool:
    """Whether a dictionary contains a function as byte code.

    Keras 2 writes the function's type beside it, except for functions in arguments of layers.
    """
    if set(part) == {"value"} and _is_byte_code(part["value"]):
        return True
    return any(
        part[key] == "lambda"
        and isinstance(part.get(key[: -len("_type")]), (str, list, dict))
        and part[key[: -len("_type")]]
        for key in part
        if key.endswith("_type")
    )


def _is_byte_code(value: Any) -> bool:
    """Whether a value is code, defaults and closure, with the code marshalled and in base64."""
    if not isinstance(value, list) or len(value) != 3 or not isinstance(value[0], str):
        return False
    try:
        return base64.b64decode(value[0][:4]).startswith((b"\xe3", b"c"))
    except ValueError:
        return False
