"""Layers are registered when Keras comes, seen at small packages that play Keras."""

import importlib
import itertools
import sys
import threading

import pytest

from mbn_rewrite.registration import LAYERS, register_layers

NUMBERS = itertools.count()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The names of a package that plays Keras, and of a module that registers layers with it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    number = next(NUMBERS)
    keras, layers = f"keras_{number}", f"layers_{number}"
    write(tmp_path, keras, "registered = []\nimport time; time.sleep(0.05)\nwhole = True\n")
    write(tmp_path, layers, f"import {keras}\nassert {keras}.whole\n{keras}.registered.append(1)\n")
    before = list(sys.meta_path)
    yield keras, layers
    sys.meta_path[:] = before
    for name in (keras, layers):
        sys.modules.pop(name, None)


def write(folder, name, text):
    (folder / f"{name}.py").write_text(text)
    importlib.invalidate_caches()


def finders():
    return [finder for finder in sys.meta_path if type(finder).__module__.startswith("mbn_")]


def test_a_keras_that_is_there(package):
    keras, layers = package
    there, before = importlib.import_module(keras), finders()
    register_layers({keras: [layers]})
    assert there.registered == [1]
    assert finders() == before


def test_a_keras_that_comes_later(package):
    keras, layers = package
    before = finders()
    register_layers({keras: [layers]})
    assert len(finders()) == len(before) + 1
    assert layers not in sys.modules
    module = importlib.import_module(keras)
    assert module.registered == [1]
    assert finders() == before
    # Nobody can tell that it was waited for.
    assert module.__spec__.loader is module.__loader__
    assert type(module.__loader__).__module__ == "_frozen_importlib_external"
    assert importlib.reload(module).registered == []


def test_one_of_two(package, tmp_path):
    keras, layers = package
    other = f"other_{keras}"
    register_layers({keras: [layers], other: ["no.such.module"]})
    (finder,) = finders()[:1]
    importlib.import_module(keras)
    assert finders()[0] is finder  # it waits for the other
    with pytest.raises(ModuleNotFoundError, match=other):
        importlib.import_module(other)
    write(tmp_path, other, "")
    with pytest.warns(RuntimeWarning, match=r"do not load in this other_.*No module named 'no'"):
        importlib.import_module(other)
    assert finder not in finders()


def test_an_import_that_fails_and_is_tried_again(package, tmp_path):
    keras, layers = package
    whole = (tmp_path / f"{keras}.py").read_text()
    write(tmp_path, keras, "raise ImportError('no backend')")
    register_layers({keras: [layers]})
    with pytest.raises(ImportError, match="no backend"):
        importlib.import_module(keras)
    write(tmp_path, keras, f"{whole}\n# of another length\n")
    assert importlib.import_module(keras).registered == [1]


class Nested:
    """A finder that asks for other modules while it looks for one, and wraps what is found."""

    def __init__(self):
        self.asked = []

    def find_spec(self, name, path=None, target=None):
        if name.startswith("keras_") and name not in self.asked:
            self.asked.append(name)
            return importlib.util.find_spec(name)
        return None


def test_beside_other_hooks(package, monkeypatch):
    keras, layers = package
    nested = Nested()
    monkeypatch.setattr(sys, "meta_path", [nested, *sys.meta_path])
    register_layers({keras: [layers]})
    monkeypatch.setattr(sys, "meta_path", [Nested(), *sys.meta_path])
    assert importlib.import_module(keras).registered == [1]
    assert nested.asked == [keras]


def test_many_threads(package):
    keras, layers = package
    register_layers({keras: [layers]})
    found = []
    barrier = threading.Barrier(8)

    def look():
        barrier.wait()
        found.append(importlib.import_module(keras))

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert {id(module) for module in found} == {id(sys.modules[keras])}
    assert found[0].registered == [1]


@pytest.mark.parametrize("package_name", LAYERS)
def test_all_layers_of_ours_are_registered(package_name):
    keras = importlib.import_module(package_name)
    registered = keras.saving.get_custom_objects().values()
    for module in map(importlib.import_module, LAYERS[package_name]):
        ours = [
            value
            for value in vars(module).values()
            if isinstance(value, type) and value.__module__ == module.__name__
            if not value.__name__.startswith("_")
        ]
        assert ours
        assert set(ours) <= set(registered)
