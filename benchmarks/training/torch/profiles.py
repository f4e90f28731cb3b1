"""Operations that run in a call of a function on torch, by torch.profiler, and their layers.

An operation counts with its own time alone, without that of operations that it calls. Forward,
those of a layer are what runs while it is called. What runs for their gradients has the sequence
numbers that autograd gave them then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.training.operations import ByLayer, LayerTime, OpTime

# Operations that are not listed: what moves nothing or only calls others, and plain arithmetic,
# most of which is of vectors with one element for each channel.
_UNLISTED = {
    f"aten::{name}"
    for name in (
        *("empty", "empty_like", "empty_strided", "resize_", "zeros", "ones", "fill_", "zero_"),
        *("zeros_like", "ones_like", "new_zeros", "new_empty", "full", "scalar_tensor"),
        *("view", "view_as", "reshape", "permute", "transpose", "as_strided", "slice", "select"),
        *("unsqueeze", "squeeze", "expand", "expand_as", "flatten", "alias", "detach", "detach_"),
        *("to", "_to_copy", "contiguous", "clone", "lift_fresh", "result_type", "item"),
        *("_local_scalar_dense", "is_nonzero", "_reshape_alias", "t", "unbind", "requires_grad_"),
        *("batch_norm", "_batch_norm_impl_index", "conv2d", "convolution", "_convolution"),
        *("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "neg", "rsub", "addcmul"),
        *("movedim", "multiply", "subtract", "rsqrt_"),
        *("rsqrt", "sqrt", "reciprocal", "square", "pow", "maximum", "clamp", "where", "gt", "eq"),
    )
}
_BACKWARD = "autograd::engine::evaluate_function: "
_LAYER = "layer: "


def profiled(function: Callable[[], object], calls: int, path: str | None = None) -> list[Any]:
    """Calls a function under torch's profiler; the events, in the order in which they began.

    Args:
        function: without arguments; what it returns is thrown away.
        calls: how often it is called.
        path: a file for the trace, which TensorBoard and Perfetto show; None keeps none.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        for _ in range(calls):
            function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    if path is not None:
        profiler.export_chrome_trace(path)
    return sorted(profiler.events(), key=lambda event: event.time_range.start)


def operations(events: Iterable[Any], calls: int) -> list[OpTime]:
    """Operations in the events of some calls, each kind together."""
    times: dict[tuple[str, str], list[float]] = {}
    for event in events:
        for kernel, milliseconds in _times(event):
            times.setdefault((event.name, kernel), []).append(milliseconds)
    return [
        OpTime(op, op, kernel, tuple(each), calls, op not in _UNLISTED)
        for (op, kernel), each in sorted(times.items())
    ]


def _times(event: Any) -> Iterator[tuple[str, float]]:
    """Name and milliseconds of each kernel of an operation; on a CPU those of the operation."""
    if not event.name.startswith("aten::"):
        return
    if event.kernels:
        yield from ((kernel.name, kernel.duration / 1e3) for kernel in event.kernels)
    elif not torch.cuda.is_available():
        yield "", event.self_cpu_time_total / 1e3


@contextmanager
def named(layers: Iterable[Any]) -> Iterator[None]:
    """Context manager in which the calls of layers have events of their own."""

    def recording(layer: Any) -> Callable[..., Any]:
        call = layer.call

        def recorded(*args: Any, **kwargs: Any) -> Any:
            with record_function(f"{_LAYER}{layer.name}"):
                return call(*args, **kwargs)

        return recorded

    with ExitStack() as stack:
        for layer in layers:
            layer.__dict__["call"] = recording(layer)
            stack.callback(layer.__dict__.pop, "call")
        yield


def by_layer(events: list[Any], names: list[str], calls: int) -> ByLayer:
    """Finds the BatchNormalization that each operation belongs to.

    Args:
        events: of `profiled`, within `named`.
        names: those of the layers.
        calls: how many calls were profiled.
    """
    # Of the events with a number, the last is the one that autograd has noted.
    owners = {event.sequence_nr: _around(event, _LAYER) for event in events if _is_forward(event)}
    forward: dict[str, list[Any]] = {name: [] for name in names}
    backward: dict[str, list[Any]] = {name: [] for name in names}
    elsewhere: list[Any] = []
    for event in events:
        layer = _around(event, _LAYER)
        if layer is not None:
            forward[layer].append(event)
            continue
        node = _parent(event, _BACKWARD)
        owner = None if node is None else owners.get(node.sequence_nr)
        (elsewhere if owner is None else backward[owner]).append(event)
    layers = {
        name: LayerTime(
            name,
            tuple(operations(forward[name], calls)),
            tuple(operations(backward[name], calls)),
        )
        for name in names
    }
    return ByLayer(layers, tuple(operations(elsewhere, calls)), ())


def _is_forward(event: Any) -> bool:
    return event.sequence_nr >= 0 and _parent(event, _BACKWARD) is None


def _parent(event: Any, prefix: str) -> Any | None:
    """The event, or the closest around it, whose name begins so."""
    while event is not None and not event.name.startswith(prefix):
        event = event.cpu_parent
    return event


def _around(event: Any, prefix: str) -> str | None:
    """What follows the beginning of the name of the closest such event; None if there is none."""
    found = _parent(event, prefix)
    return None if found is None else found.name.removeprefix(prefix)
