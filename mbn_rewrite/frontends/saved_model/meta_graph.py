"""The MetaGraphDef of a SavedModel, read from its file by tags."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tensorflow.core.protobuf import saved_model_pb2

from mbn_rewrite.errors import RewriteError, cause_of
from mbn_rewrite.frontends.saved_model.files import GRAPH_FILES


def read_meta_graph(source: Path, tags: Sequence[str] | None) -> Any:
    """The MetaGraphDef with these tags, or the only one."""
    proto = saved_model_pb2.SavedModel()
    file = next(source / name for name in GRAPH_FILES if (source / name).is_file())
    try:
        if file.suffix == ".pb":
            proto.ParseFromString(file.read_bytes())
        else:
            text_format.Parse(file.read_text(), proto)
    except OSError as error:
        raise RewriteError(f"{file} cannot be read: {cause_of(error)}") from error
    except Exception as error:
        raise RewriteError(f"{file} is damaged; it may be cut short") from error
    if not proto.meta_graphs:
        raise RewriteError(f"{file} is damaged or empty: it holds no graph")
    found = {frozenset(graph.meta_info_def.tags): graph for graph in proto.meta_graphs}
    listed = " and ".join("{" + ", ".join(sorted(names)) + "}" for names in found)
    if tags is None:
        if len(found) > 1 and frozenset({"serve"}) not in found:
            raise RewriteError(f"{source} has graphs tagged {listed}. Say which: --tags")
        return found.get(frozenset({"serve"}), proto.meta_graphs[0])
    if frozenset(tags) not in found:
        raise RewriteError(f"{source} has no graph tagged {', '.join(tags)}; there is {listed}")
    return found[frozenset(tags)]


def check_signatures(source: Path, stored: list[str], wanted: Sequence[str] | None) -> None:
    """Raises RewriteError where no signature is wanted or stored, or a wanted one is missing."""
    if not stored:
        raise RewriteError(f"{source} has no signatures, so there is nothing to serve")
    if wanted is not None and not wanted:
        raise RewriteError(f"no signature is asked for; there is {', '.join(stored)}")
    unknown = sorted(set(wanted or ()) - set(stored))
    if unknown:
        raise RewriteError(
            f"{source} has no signature {', '.join(unknown)}; there is {', '.join(stored)}"
        )
