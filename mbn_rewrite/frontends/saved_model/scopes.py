"""Scopes of operations, which give the owners of weights their names."""

from __future__ import annotations

import re
from collections.abc import Iterable

from mbn_rewrite.frontends.saved_model.inlining import display_name


def shared_scope(names: Iterable[str]) -> str:
    """The outermost scope, usually the model's name, if all these operations are in it, or ""."""
    first = {display_name(name).partition("/") for name in names}
    scopes = {scope + slash for scope, slash, _ in first if slash}
    inner = all(slash and "/" in rest for _, slash, rest in first)
    return scopes.pop() if len(scopes) == 1 and inner else ""


def without_leaf(name: str) -> str:
    """The scope of an operation: the name of the layer that it comes from."""
    scope, _, leaf = name.rpartition("/")
    scope = re.sub(r"/(Stateful)?PartitionedCall(_\d+)?$", "", scope)  # a function of the layer's
    return scope or leaf


def common_scope(names: list[str]) -> str:
    """The scope that operations share, without parts that TensorFlow's own functions add."""
    split = [name.split("/") for name in names]
    common = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    if len(names) == 1 and len(common) > 1:
        common = common[:-1]
    while len(common) > 1 and re.fullmatch(r"(batchnorm|batch_normalization_?)(_\d+)?", common[-1]):
        if common[-1].startswith("batchnorm") or len(common) > 2:
            common = common[:-1]
        else:
            break
    return "/".join(common) or names[0]
