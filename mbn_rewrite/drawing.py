"""Drawings of models and plans, as text of Mermaid flowcharts (https://mermaid.js.org).

Mermaid's text is drawn by many viewers of Markdown and by notebooks. Nothing is needed to write it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mbn_rewrite.frontends.registry import front_end_of
from mbn_rewrite.ir.graph import Graph, Node
from mbn_rewrite.plans import Plan

_STYLES = {
    "kept": "stroke:#c62828,stroke-width:3px",
    "gone": "stroke:#2e7d32,stroke-width:2px,stroke-dasharray:5 4",
    "replaced": "stroke:#ef6c00,stroke-width:3px",
    "absorbing": "stroke:#1565c0,stroke-width:3px",
}
_ESCAPES = str.maketrans({"#": "#35;", '"': "#quot;", "<": "#lt;", ">": "#gt;"})


def mermaid(model: Any, plan: Plan | None = None) -> str:
    """A model as a flowchart, and what a plan makes of each BatchNormalization.

    Each call of a layer is a box with its class and its name. With a plan, what goes has a dashed
    outline, a BatchNormalization that something else takes the place of an orange one, and one
    that stays a red one; layers that absorb something have a blue one.

    Args:
        model: a built model of tf_keras or Keras 3.
        plan: what `plan` gave for it; None to draw the model alone.

    Returns:
        The text of a flowchart, to be put in a Markdown fence of the language `mermaid`.

    Raises:
        RewriteError: as for `plan`.
    """
    return "\n".join(_lines(front_end_of(model).read(model).graph, plan))


def _lines(graph: Graph, plan: Plan | None) -> Iterator[str]:
    styles = {} if plan is None else _styles(plan)
    actions = {} if plan is None else {d.name: str(d.action) for d in plan.decisions}
    yield "flowchart TD"
    calls: Counter[str] = Counter()
    for number, node in enumerate(graph.nodes):
        if plan is not None:
            calls[node.owner] += 1
            node = replace(node, owner=plan.maker(node.owner, calls[node.owner] - 1))
        style = f":::{styles[node.owner]}" if node.owner in styles else ""
        yield f'    n{number}["{_label(node, actions.get(node.owner, ""))}"]{style}'
    producer = {value: number for number, node in enumerate(graph.nodes) for value in node.outputs}
    for number, node in enumerate(graph.nodes):
        for value in node.inputs:
            yield f"    n{producer[value]} --> n{number}"
    for style in sorted(set(styles.values())):
        yield f"    classDef {style} {_STYLES[style]}"


def _label(node: Node, action: str) -> str:
    # A line break is the only markup that Mermaid draws at its strictest.
    return "<br>".join(part.translate(_ESCAPES) for part in (node.kind, node.owner, action) if part)


def _styles(plan: Plan) -> dict[str, str]:
    """The style of each layer that the plan decides on or edits, by owner."""
    styles = {owner: "absorbing" for d in plan.decisions for owner in d.into}
    for owner, gone in plan.merged.items():
        styles |= {owner: "absorbing", **dict.fromkeys(gone, "gone")}
    for decision in plan.decisions:
        others = {"kept": "kept", "folded": "gone"}
        styles[decision.name] = others.get(decision.action, "replaced")
    return styles
