"""TensorFlow operations with effects beyond computing.

A graph is a program: its operations can write and read files, run Python, and talk to other
machines. Only a list of harmless operations tells them apart from the rest, so an operation that
TensorFlow declares stateful counts as acting unless it is listed here, and so do a few that it
declares stateless. Graphs are read as data, so that nothing runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tensorflow.python.framework import op_def_registry

# Stateful operations that only keep numbers in memory, draw random ones, check, or order others.
_HARMLESS = re.compile(
    "|".join(
        (
            # variables
            "VarHandleOp|VarIsInitializedOp|Variable(V2|Shape)?|TemporaryVariable|DeepCopy|Empty",
            "ReadVariableOp|Assign(Add|Sub)?VariableOp|DestroyResourceOp|DisableCopyOnRead",
            "ReadVariableXlaSplitND|AssignVariableXlaConcatND|IsResourceHandleRefCounting",
            "Resource(Apply|SparseApply|Scatter|Gather|StridedSlice|CountUpTo|Accumulator).*",
            # tables, queues and other containers
            "(Anonymous)?(Mutable)?(Dense)?HashTable(OfTensors)?(V2)?|InitializeTableV2",
            "LookupTable(Export|Find|Import|Insert|Remove|Size)V2|InitializeTableFromDataset",
            "TensorArray.*|Stack.*|.*Queue(V2)?|Queue.*V2|Barrier|Mutex.*|ConsumeMutexLock",
            "(Sparse|Resource)?ConditionalAccumulator|Stage.*|Unstage|(Ordered)?Map[A-Z][a-z]*",
            "MapIncompleteSize|OrderedMapIncompleteSize|(Ordered)?MapUnstageNoKey",
            "Add(Many)?SparseToTensorsMap|TakeManySparseFromTensorsMap|BoostedTrees.*",
            # random numbers
            "Random.*|Stateful(Random|Standard|Truncated|Uniform).*|StatelessRandomGetAlg",
            "Multinomial|(Parameterized)?TruncatedNormal|NonDeterministicInts|Rng.*",
            "SampleDistortedBoundingBox(V2)?|Anonymous(Random)?SeedGenerator|DummySeedGenerator",
            "Delete(Random)?SeedGenerator|(All|Learned|LogUniform|ThreadUnsafe|Uniform).*Sampler",
            # control flow
            "If|While|Case|StatefulPartitionedCall|Xla(If|While|Launch|CallModule)|_If|_While",
            "_?(Arg|Retval)|GuaranteeConst|DeviceIndex|IsTensorFloat32Enabled|Timestamp",
            # checks and words
            "Assert|Print|CheckNumerics(V2)?|CudnnRNN.*|XlaDequantize|GraphDefVersion",
            # datasets in memory
            "Tensor(Slice)?Dataset|SparseTensorSliceDataset|RangeDataset|GeneratorDataset",
            "Shuffle.*Dataset.*|(Experimental)?GroupByReducerDataset|ReduceDataset",
            "DatasetToSingleElement|ExperimentalRandomDataset|GlobalShuffleDataset",
            "(Anonymous|Make|OneShot|Delete)?(MultiDevice)?Iterator(V[23])?|IteratorGet.*",
            "Iterator(To|From)StringHandle(V2)?|MultiDeviceIterator.*|Dummy(IterationCounter)",
            "(Anonymous|Delete|Dummy)MemoryCache|(Experimental)?ThreadPool(Dataset|Handle)",
            # tokenizers of TensorFlow Text
            "SentencepieceOp",
        )
    )
)
# Operations that act although TensorFlow calls them stateless.
_ACTING = {
    *("PyFuncStateless", "ReadFile", "MatchingFiles", "XlaCustomCall", "XlaCustomCallV2"),
    *("SnapshotDataset", "SnapshotDatasetV2", "SnapshotDatasetReader", "SnapshotChunkDataset"),
    *("SnapshotNestedDatasetReader", "RegisterDataset", "RegisterDatasetV2"),
    *("GenerateVocabRemapping", "DatasetFromGraph", "MlirPassthroughOp"),  # graphs in strings
}
# Operations that act depending on an attribute: its name, and the values that are harmless.
_BY_ATTRIBUTE = {
    "PrintV2": ("output_stream", ("stderr", "stdout", "log(info)", "log(warning)", "log(error)")),
    "FixedUnigramCandidateSampler": ("vocab_file", ("",)),
    "DecodeProtoV2": ("descriptor_source", ("", "local://")),
    "EncodeProto": ("descriptor_source", ("", "local://")),
}
TABLES_FROM_FILES = ("InitializeTableFromTextFile", "InitializeTableFromTextFileV2")
_CACHES = ("CacheDataset", "CacheDatasetV2")
_WORDS = (
    (r".*PyFunc.*", "runs Python code"),
    (r"(Write|Save|MergeV2|DistributedSave|DumpTensor|DatasetToTFRecord|Create.*Summary).*|.*Saver",
     "writes files"),
    (r"Cache.*|Snapshot.*|PrintV2|.*DatasetToTFRecord|.*Summary.*", "writes files"),
    (r".*(Read|Restore|Load|Matching|TextFile|TFRecord|TextLine|RecordDataset|CSV|LMDB|Sql).*",
     "reads files"),
    (r"FixedUnigramCandidateSampler|GenerateVocabRemapping|.*Proto.*", "reads files"),
    (r"DatasetFromGraph|MlirPassthroughOp", "runs a program that a text holds"),
    (r".*(Send|Recv|Rpc|RemoteCall|DataService|RegisterDataset|Collective).*",
     "talks to other processes"),
)  # fmt: skip
_ALIASES = ("Identity", "IdentityN", "Snapshot", "StopGradient", "PlaceholderWithDefault")


@dataclass(frozen=True)
class Effect:
    """An operation that does more than compute.

    Attributes:
        op: its type.
        node: its name.
        function: the function that it is in, or "" where it is in the graph itself.
    """

    op: str
    node: str
    function: str = ""

    def __str__(self) -> str:
        """The effect in words that follow "it", such as "reads files (ReadFile 'read')"."""
        words = next((w for pattern, w in _WORDS if re.fullmatch(pattern, self.op)), "")
        return f"{words or 'does more than compute'} ({self.op} '{self.node}')"


def in_words(effects: Iterable[Effect]) -> str:
    """Effects in words that follow "it", each operation type once."""
    first = {effect.op: str(effect) for effect in effects}
    listed = list(first.values())
    more = f" and more ({', '.join(list(first)[3:6])})" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more


def acts(op: str) -> bool:
    """Whether operations of a type do more than compute, as far as their type tells."""
    if op in _ACTING or op in _BY_ATTRIBUTE or op in TABLES_FROM_FILES or op in _CACHES:
        return True
    if op.startswith("Debug"):  # they write to wherever an attribute says
        return True
    definition = op_def_registry.get(op)  # what TensorFlow does not know it does not run
    stateful = definition is not None and definition.is_stateful
    return bool(stateful) and not _HARMLESS.fullmatch(op)


def in_graph(graph_def: Any, assets: Iterable[str] = ()) -> list[Effect]:
    """The operations of a graph, and of the functions that it calls, that act.

    Args:
        graph_def: a GraphDef.
        assets: the nodes that stand for the paths of the model's own assets.
    """
    library = library_of(graph_def)
    return [*_in_nodes(graph_def.node, "", library, set(assets)),
            *in_functions(library, called(graph_def.node, library))]  # fmt: skip


def in_functions(library: Mapping[str, Any], names: Iterable[str]) -> list[Effect]:
    """The operations of some functions, and of those that they call, that act."""
    found: list[Effect] = []
    for name in reached(library, names):
        found += _in_nodes(library[name].node_def, name, library, set())
    return found


def in_ancestors(graph_def: Any, names: Iterable[str], assets: Iterable[str] = ()) -> list[Effect]:
    """The operations that act among those that run when some nodes are fetched; see `in_graph`."""
    nodes = {node.name: node for node in graph_def.node}
    pending, seen = [_node_of(name) for name in names], dict[str, Any]()
    while pending:
        name = pending.pop()
        if name in nodes and name not in seen:
            seen[name] = nodes[name]
            pending += map(_node_of, nodes[name].input)
    part = type(graph_def)(library=graph_def.library)
    part.node.extend(seen.values())
    return in_graph(part, assets)


def library_of(graph_def: Any) -> dict[str, Any]:
    """The functions of a graph by name."""
    return {function.signature.name: function for function in graph_def.library.function}


def reached(library: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The names of functions and of all that they call, each once."""
    pending, seen = list(names), dict[str, None]()
    while pending:
        name = pending.pop()
        if name in library and name not in seen:
            seen[name] = None
            pending += called(library[name].node_def, library)
    return list(seen)


def inlined_size(graph_def: Any) -> int:
    """Number of nodes of a graph, or of its largest function, once all calls are inlined.

    Functions that call themselves count once.
    """
    library = library_of(graph_def)
    sizes: dict[str, int] = {}
    entered: set[str] = set()
    pending = [(name, False) for name in library]
    while pending:
        name, calls_are_known = pending.pop()
        if calls_are_known:
            inner = sum(sizes.get(each, 0) for each in called(library[name].node_def, library))
            sizes[name] = len(library[name].node_def) + inner
        elif name not in entered:
            entered.add(name)
            pending.append((name, True))
            pending += [(each, False) for each in called(library[name].node_def, library)]
    own = len(graph_def.node) + sum(sizes[each] for each in called(graph_def.node, library))
    return max(own, *sizes.values(), 0)


def called(nodes: Iterable[Any], library: Mapping[str, Any]) -> Iterator[str]:
    """The functions of a library that nodes call, each as often as it is called."""
    for node in nodes:
        names = [node.op]
        for attribute in node.attr.values():
            if attribute.HasField("func"):
                names.append(attribute.func.name)
            names += [function.name for function in attribute.list.func]
        yield from (name for name in names if name in library)


def _in_nodes(
    nodes: Iterable[Any], function: str, library: Mapping[str, Any], assets: set[str]
) -> Iterator[Effect]:
    nodes = list(nodes)
    by_name = {node.name: node for node in nodes}
    for node in nodes:
        if node.op not in library and _node_acts(node, by_name, assets):
            yield Effect(node.op, node.name, function)


def _node_acts(node: Any, nodes: Mapping[str, Any], assets: set[str]) -> bool:
    if node.op in _BY_ATTRIBUTE:
        attribute, harmless = _BY_ATTRIBUTE[node.op]
        value = node.attr[attribute].s.decode(errors="replace") if attribute in node.attr else ""
        return value not in harmless and not (value == "" and node.op == "PrintV2")
    if node.op in TABLES_FROM_FILES:
        # The paths of assets are given; a path in the graph is one of the host.
        source = source_of(node.input[1], nodes)
        return source not in assets and source in nodes and nodes[source].op != "Placeholder"
    if node.op in _CACHES:
        source = source_of(node.input[1], nodes)
        values = nodes[source].attr["value"].tensor.string_val if source in nodes else None
        return values is None or nodes[source].op != "Const" or any(values)
    if node.op.startswith("Debug"):
        return any(node.attr["debug_urls"].list.s) if "debug_urls" in node.attr else False
    return acts(node.op)


def source_of(name: str, nodes: Mapping[str, Any]) -> str:
    """The name of the node whose output a tensor is, past operations that only forward it."""
    name = _node_of(name)
    while name in nodes and nodes[name].op in _ALIASES and nodes[name].input:
        name = _node_of(nodes[name].input[0])
    return name


def _node_of(tensor: str) -> str:
    return tensor.lstrip("^").partition(":")[0]
