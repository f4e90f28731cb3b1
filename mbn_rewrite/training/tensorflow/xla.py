"""Detection, while a function is traced, that XLA will compile it.

TensorFlow has operations that XLA does not know. A function that would use one has to know,
while it is traced, who will run its graph; the graph itself tells only for TPUs. The arguments of
`tf.function` are held by the objects that are tracing, so those are looked up on the stack.
(Leaving the choice to a `Case` on `DeviceIndex` is what TensorFlow itself does, but XLA then
evaluates whatever leads up to each of them while it compiles, which takes minutes for a network.)
"""

from __future__ import annotations

import sys
from functools import cache
from types import FrameType
from typing import Any

import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext


def will_be_compiled() -> bool:
    """Whether a `tf.function` with jit_compile=True is being traced, or a graph for a TPU.

    It cannot tell for a function that was traced before such a function calls it.
    """
    if tf.executing_eagerly():
        return False
    return GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()) or _traced_with_jit()


def _traced_with_jit() -> bool:
    function, file = _function_class()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == file:
            tracing = frame.f_locals.get("self")
            if isinstance(tracing, function) and tracing._jit_compile:
                return True
        frame = frame.f_back
    return False


@cache
def _function_class() -> tuple[Any, str]:
    """The class of tf.functions, and the file with its methods."""
    function = type(tf.function(lambda: None))
    return function, str(sys.modules[function.__module__].__file__)
