"""Makes the layers of this package known to Keras, so that files that hold them load.

A file of Keras names a layer's class, and loads where that class is registered: where the module
that defines it was imported. Such a module imports Keras, which importing this package must not
do. So modules are imported at once for a Keras that is there already, and for one that is not
when its own import ends.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from threading import local
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

# The modules that register layers, by the package that they are for.
LAYERS = {
    package: tuple(
        f"mbn_rewrite.frontends.{front_end}.{kind}_layers" for kind in ("inference", "training")
    )
    for package, front_end in (("tf_keras", "tf_keras"), ("keras", "keras3"))
}


def register_layers(layers: Mapping[str, Sequence[str]] = LAYERS) -> None:
    """Registers layers with each Keras, now or when it is imported."""
    missing = {}
    for package, modules in layers.items():
        if package in sys.modules:
            _import(package, modules)
        else:
            missing[package] = modules
    if missing:
        sys.meta_path.insert(0, _Finder(missing))


def _import(package: str, modules: Sequence[str]) -> None:
    """Imports modules of ours; where that fails, Keras itself is imported all the same."""
    try:
        for module in modules:
            import_module(module)
    except Exception as error:
        warnings.warn(
            f"files that hold layers of mbn_rewrite do not load in this {package}: "
            f"{type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )


class _Finder:
    """Finder of modules that lets the others find them, and does more when one was imported.

    It is asked for every import, and leaves when all that it waits for has come.
    """

    def __init__(self, layers: Mapping[str, Sequence[str]]) -> None:
        self._missing = dict(layers)
        self._asking = local()  # whether this thread asks the other finders

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self._missing or getattr(self._asking, "others", False):
            return None
        self._asking.others = True
        try:
            spec = find_spec(name)
        finally:
            self._asking.others = False
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]
        return spec

    def imported(self, name: str) -> None:
        """Registers layers with a Keras whose import has ended."""
        modules = self._missing.pop(name, ())
        if not self._missing:
            # A list of its own: other threads may be on their way through the one that is there.
            sys.meta_path = [finder for finder in sys.meta_path if finder is not self]
        _import(name, modules)


class _Loader:
    """The loader of a module, which tells a finder when it has been loaded."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader  # as if we had not been here
        self._loader.exec_module(module)
        self._finder.imported(module.__name__)
