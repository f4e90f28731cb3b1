"""SavedModels on disk, opened for rewriting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mbn_rewrite.device import give_back_memory
from mbn_rewrite.errors import RewriteError, cause_of
from mbn_rewrite.frontends import effects
from mbn_rewrite.frontends.execution import device, set_up
from mbn_rewrite.frontends.execution import runner as run_of
from mbn_rewrite.frontends.footprint import Footprint, bytes_on_disk
from mbn_rewrite.frontends.protocols import Run
from mbn_rewrite.frontends.reference_io import ReferenceIO
from mbn_rewrite.frontends.saved_model import flags, opaque_calls, saving, writer
from mbn_rewrite.frontends.saved_model.fingerprints import fingerprint
from mbn_rewrite.frontends.saved_model.function_graph import (
    FunctionGraph,
    Writes,
    function_graph_of,
)
from mbn_rewrite.frontends.saved_model.graph_editor import Rewritten, unchanged
from mbn_rewrite.frontends.saved_model.loaded_model import Entry, Loaded
from mbn_rewrite.frontends.saved_model.loading import load
from mbn_rewrite.frontends.saved_model.reader import read
from mbn_rewrite.frontends.saved_model.saving import size_of
from mbn_rewrite.frontends.saved_model.signature_calls import (
    call_method,
    call_signature,
    given_for,
    method_reference,
    signature_reference,
    specs_of,
)
from mbn_rewrite.ir.graph import Graph
from mbn_rewrite.options import Options, RunConfig
from mbn_rewrite.plans import Plan

_NONE = Writes()
_LARGE = 10_000_000  # weights


class SavedModelDirectory:
    """See `protocols.ModelSource`."""

    def __init__(
        self,
        source: Path,
        tags: Sequence[str] | None,
        signatures: Sequence[str] | None,
        trusted: bool = False,
        set_input: Mapping[str, Any] | None = None,
    ) -> None:
        self._source = source
        self._asked_for = (tags, signatures, trusted, set_input)
        self._loaded = load(source, *self._asked_for)
        self.left_out: dict[str, str] = self._loaded.left_out
        self.as_it_was: dict[str, str] = {}
        self.unverifiable: dict[str, str] = {}
        self._graphs: dict[str, FunctionGraph] = {}
        self._acting: dict[str, str] = {}
        self._copies: dict[Any, Any] = {}  # weights of forms that were run
        self._measured_with: Mapping[str, Any] | None = None
        self._read_functions()
        self._initializer = self._read_initializer()
        self._decide_branches()
        self._note_unverifiable(trusted)
        self._leave_out_what_trains()
        self._writes = self._all_writes()
        pinned = [v for entry in self._unread for v in entry.function.graph.variables]
        graphs = list(self._graphs.values())
        self._notes_on_graphs = (*flags.notes_on(graphs), *opaque_calls.notes_on(graphs))
        self._first = self._first_of_alike()
        self._reading = read(self._distinct.values(), self._writes, pinned)

    # -- steps of opening ----------------------------------------------------------------

    def _read_functions(self) -> None:
        """Reads the graphs of functions; notes those that cannot be read."""
        for entry in self._loaded.entries:
            try:
                graph = function_graph_of(
                    entry.name, entry.function, self._loaded.variable_in_graph, look_inside=True
                )
                # Only inputs of signatures can be set.
                self._graphs[entry.name] = replace(graph, labels={}) if entry.method else graph
            except RewriteError:
                raise
            except Exception as error:
                self.as_it_was[entry.name] = cause_of(error)

    def _decide_branches(self) -> None:
        """Takes out the branches that functions never take, as far as that can be known."""
        undecided = set(self._graphs)
        while undecided:
            writes = self._all_writes()
            found = {name: flags.decided(self._graphs[name], writes) for name in sorted(undecided)}
            new = {name: graph for name, graph in found.items() if graph is not None}
            self._graphs |= new
            # Where a write is gone, others may be decided, too.
            undecided = set(self._graphs) if self._all_writes().by != writes.by else set(new)

    def _note_unverifiable(self, trusted: bool) -> None:
        """Notes the functions whose outputs are random, or that may act when they are called."""
        for entry in self._loaded.entries:
            graph = self._graphs.get(entry.name)
            if graph is not None and graph.draws_random_numbers:
                self.unverifiable[entry.name] = "it draws random numbers"
            if not trusted:
                graph_def = (
                    entry.function.graph.as_graph_def() if graph is None else graph.graph_def
                )
                self._note_acts(entry.name, graph_def)
        self._note_siblings_of_what_acts()

    def _read_initializer(self) -> FunctionGraph | None:
        function = self._loaded.initializer
        if function is None:
            return None
        return function_graph_of("initializer", function, self._loaded.variable_in_graph)

    def _all_writes(self) -> Writes:
        """The variables that functions write to, or may because they could not be read."""
        writes = Writes.of(*self._graphs.values(), *filter(None, [self._initializer]))
        for entry in self._unread:
            writes.suspect(entry.function.graph.variables, entry.name)
        return writes

    @property
    def _unread(self) -> list[Entry]:
        """The functions that are carried over as they were."""
        return [entry for entry in self._loaded.entries if entry.name in self.as_it_was]

    def _note_acts(self, name: str, graph_def: Any) -> None:
        """Notes the effects of a function beyond computing, so that it is not run."""
        found = effects.in_graph(graph_def)
        if found:
            self._acting[name] = effects.in_words(found)
            self.unverifiable[name] = (
                f"it {self._acting[name]}, so it was not run; pass --trusted (trusted=True in "
                "Python) to run it"
            )

    def _note_siblings_of_what_acts(self) -> None:
        """Notes functions beside one that acts in a method, which picks the one to run."""
        methods = {e.method: e.name for e in self._loaded.entries if e.name in self._acting}
        for entry in self._loaded.entries:
            if entry.method and entry.method in methods and entry.name not in self._acting:
                sibling = methods[entry.method]
                self.unverifiable[entry.name] = (
                    f"calling it might run '{sibling}' of the same method, which "
                    f"{self._acting[sibling]}; pass --trusted (trusted=True in Python) to run it"
                )

    def _leave_out_what_trains(self) -> None:
        """Leaves out methods that write to the weights of other functions."""
        methods = {entry.name for entry in self._loaded.entries if entry.method}
        written = {name: Writes.of(self._graphs[name]) for name in methods & set(self._graphs)}
        if not any(writes.by for writes in written.values()):
            return
        others = [graph for name, graph in self._graphs.items() if not written.get(name, _NONE).by]
        weights = read(others, Writes()).variables
        for name, writes in written.items():
            if weights & set(writes.by):
                self.left_out[name] = "it trains: it writes to weights of other functions"
                del self._graphs[name]
        kept = [entry for entry in self._loaded.entries if entry.name not in self.left_out]
        self._loaded.entries = kept

    def _first_of_alike(self) -> dict[str, str]:
        """Name of each function -> the first one that computes the same, maybe itself.

        A model is read and rewritten without those that only repeat what others compute. Each is
        run: that is how a mistake would be seen.
        """
        if len(self._graphs) == 1:
            return {name: name for name in self._graphs}
        firsts: dict[bytes | str, str] = {}
        return {
            name: firsts.setdefault(fingerprint(graph) or name, name)
            for name, graph in self._graphs.items()
        }

    @property
    def _distinct(self) -> dict[str, FunctionGraph]:
        """The functions of which no two compute the same."""
        return {name: self._graphs[name] for name in dict.fromkeys(self._first.values())}

    # -- the protocol --------------------------------------------------------------------

    @property
    def footprint(self) -> Footprint:
        variables = {
            id(variable): size_of(variable)
            for entry in self._loaded.entries
            for variable in entry.function.graph.variables
        } | {id(variable): size_of(variable) for variable in self._loaded.in_graph.values()}
        name = next(iter(sorted(self._loaded.signatures, key=lambda key: key != "serving_default")))
        ops = self._graphs[name].op_counts if name in self._graphs else {}
        return Footprint(sum(variables.values()), bytes_on_disk(self._source), ops, name)

    @property
    def dtypes(self) -> set[str]:
        results = {
            tensor.dtype.name
            for function in self._loaded.signatures.values()
            for tensor in function.outputs
        }
        resized = {
            op.outputs[0].dtype.name  # float32, whatever is given to it
            for graph in self._graphs.values()
            for op in graph.operations
            if op.type.startswith("Resize")
        }
        return set(self._reading.dtypes) | results | resized

    @property
    def graph(self) -> Graph:
        return self._reading.graph

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self._loaded.notes, *self._notes_on_graphs, *self._notes())

    def set_up(self, run_config: RunConfig) -> AbstractContextManager[None]:
        return set_up(run_config)

    def device(self) -> str:
        return device()

    def _notes(self) -> list[str]:
        """Notes for the user on functions that act, in sentences."""
        return [
            f"'{name}' {acts} when it runs: it is rewritten, but was not run to verify it."
            for name, acts in self._acting.items()
        ]

    def running(self, plan: Plan | None, options: Options) -> AbstractContextManager[Run]:
        """See `protocols.OpenModel`: one signature is run."""
        entry = self._entry_to_measure()
        function = entry.function
        if plan is not None:
            rewritten = self._rewritten(plan, self._copies)
            function = saving.signature_of(entry, rewritten[entry.name])
        if self._measured_with is None:
            self._measured_with = self._inputs_to_measure(entry, options)
        inputs = self._measured_with
        return nullcontext(run_of(lambda data: function(**data), inputs, options.run_config))

    def inputs_to_measure(self, options: Options) -> dict[str, np.ndarray]:
        inputs = self._inputs_to_measure(self._entry_to_measure(), options)
        return {name: tensor.numpy() for name, tensor in inputs.items()}

    def _entry_to_measure(self) -> Entry:
        """The signature that is measured.

        Raises:
            RewriteError: there is none, or it cannot be called again and again.
        """
        name = self.footprint.signature
        entry = next((e for e in self._loaded.entries if e.name == name), None)
        if entry is None or name not in self._graphs:
            raise RewriteError("there is no signature to measure")
        if name in self._acting:
            raise RewriteError(f"it was not run, since it {self._acting[name]}")
        if self._graphs[name].changes_state:
            raise RewriteError("running it changes its state, so that no two calls are alike")
        return entry

    def keep_only(self, plan: Plan | None) -> None:
        # Forms share variables, so none is kept: what is chosen is written to the original's.
        self._copies.clear()
        self._measured_with = None

    def _inputs_to_measure(self, entry: Entry, options: Options) -> Mapping[str, Any]:
        name, batch = entry.name, options.run_config.batch_size
        given = given_for(name, entry.function, options.inputs)
        graph = self._graphs[name]
        made = signature_reference(name, entry.function, graph, given, batch)
        return made.inputs

    def check_inputs(self, inputs: Mapping[str, np.ndarray] | None) -> None:
        """Raises RewriteError where no signature has an input of a name."""
        signatures = self._loaded.signatures
        taken = {
            path
            for name, function in signatures.items()
            for key in specs_of(function)
            for path in (key, f"{name}/{key}")
        }
        unknown = sorted(set(inputs or ()) - taken)
        if unknown:
            listed = "; ".join(
                f"'{name}' takes {sorted(specs_of(function))}"
                for name, function in signatures.items()
            )
            raise RewriteError(f"the inputs are named {sorted(inputs or ())}; {listed}")

    @property
    def names(self) -> list[str]:
        return [entry.name for entry in self._loaded.entries]

    def reference_io(self, inputs: Mapping[str, np.ndarray] | None) -> dict[str, ReferenceIO]:
        self.check_inputs(inputs)
        if not self._unread and all(graph.repeats for graph in self._graphs.values()):
            return self._reference_io(self._loaded, inputs)
        # Calls change state, which must not be written, and failed attempts to make up inputs must
        # not count: so inputs are found on one copy and used on a fresh one.
        found = self._reference_io(self._loaded_again(), inputs)
        fresh = self._loaded_again()
        return {
            name: call_method(fresh.root, e.method, e.inputs, name, e.compiled)
            if e.method
            else call_signature(fresh.signatures[name], e.inputs, name, e.compiled)
            for name, e in found.items()
        }

    def _reference_io(
        self, loaded: Loaded, inputs: Mapping[str, np.ndarray] | None
    ) -> dict[str, ReferenceIO]:
        found: dict[str, ReferenceIO] = {}
        large = self.footprint.weights > _LARGE
        for entry in loaded.entries:
            name, graph = entry.name, self._graphs.get(entry.name)
            if name in self.unverifiable or name in self.left_out:
                continue
            if large:
                give_back_memory()  # which running the one before has left
            if not entry.method:
                given = given_for(name, entry.function, inputs)
                found[name] = signature_reference(name, entry.function, graph, given)
                continue
            try:
                found[name] = method_reference(entry, loaded.root, graph, found.values())
            except RewriteError as error:
                self.unverifiable[name] = str(error)
        return found

    def _loaded_again(self) -> Loaded:
        return load(self._source, *self._asked_for)

    @property
    def opened_again(self) -> Callable[[Path], Loaded]:
        source, asked_for = self._source, self._asked_for
        return lambda work: load(source, *asked_for)

    def write(self, plan: Plan, directory: Path) -> int:
        # The graphs were read; the functions themselves hold more memory than small models do.
        self._loaded.release(self._graphs)
        give_back_memory()
        new = self._rewritten(plan)
        initializer = None if self._initializer is None else unchanged(self._initializer)
        del self._reading, self._graphs, self._initializer
        give_back_memory()
        functions = [(entry, new.get(entry.name)) for entry in self._loaded.entries]
        return saving.save(self._loaded, functions, initializer, self._source, directory)

    def _rewritten(self, plan: Plan, copies: dict[Any, Any] | None = None) -> dict[str, Rewritten]:
        """Name of each function -> its new graph; see `writer.rewritten`."""
        distinct = self._distinct
        functions = list(distinct.values())
        graphs = writer.rewritten(functions, self._reading, plan, self._writes, copies)
        new = dict(zip(distinct, graphs, strict=True))
        return {name: new[first] for name, first in self._first.items()}
