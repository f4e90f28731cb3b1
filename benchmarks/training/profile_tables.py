"""Times of each BatchNormalization for people, for JSON and for charts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.training.operations import ByLayer, LayerTime, OpTime
from mbn_rewrite.tables import table


def as_dict(layers: ByLayer) -> dict[str, Any]:
    """Times for JSON, in milliseconds in a call, with all operations of the layers."""
    return {
        "milliseconds": layers.milliseconds,
        "bn_milliseconds": layers.bn_milliseconds,
        "unattributed_share": layers.unattributed_share,
        "unattributed": list(map(_op_as_dict, layers.unattributed)),
        "layers": [
            {
                "layer": layer.name,
                "forward_milliseconds": layer.forward_milliseconds,
                "backward_milliseconds": layer.backward_milliseconds,
                "forward": list(map(_op_as_dict, layer.forward)),
                "backward": list(map(_op_as_dict, layer.backward)),
            }
            for layer in layers.layers.values()
        ],
    }


def _op_as_dict(op: OpTime) -> dict[str, Any]:
    return {
        "name": op.name,
        "op": op.op,
        "kernel": op.kernel,
        "count": op.count,
        "milliseconds": op.milliseconds,
    }


def layer_table(variants: Mapping[str, ByLayer], title: str) -> str:
    """Milliseconds of each layer, forward + backward, for each variant of one model."""
    names = dict.fromkeys(itertools.chain.from_iterable(one.layers for one in variants.values()))
    rows = [[name, *(_cell(one.layers.get(name)) for one in variants.values())] for name in names]
    rows += [
        ["all BN", *(f"{one.bn_milliseconds:.3g}" for one in variants.values())],
        ["all operations", *(f"{one.milliseconds:.3g}" for one in variants.values())],
        ["not attributed", *(f"{one.unattributed_share:.2%}" for one in variants.values())],
    ]
    return table(["layer", *variants], rows, title, width=max(100, 24 + 18 * len(variants)))


def _cell(layer: LayerTime | None) -> str:
    if layer is None:
        return "-"
    return f"{layer.forward_milliseconds:.3g} + {layer.backward_milliseconds:.3g}"


def chart_data(
    variants: Mapping[str, ByLayer],
) -> tuple[list[str], dict[str, tuple[Sequence[float], Sequence[float]]]]:
    """Names of layers, and for each variant with any their times forward and backward."""
    used = {variant: one for variant, one in variants.items() if one.layers}
    names = list(dict.fromkeys(itertools.chain.from_iterable(one.layers for one in used.values())))
    none = LayerTime("", (), ())
    series = {}
    for variant, one in used.items():
        layers = [one.layers.get(name, none) for name in names]
        series[variant] = (
            [layer.forward_milliseconds for layer in layers],
            [layer.backward_milliseconds for layer in layers],
        )
    return names, series
