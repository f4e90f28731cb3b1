"""The processor's name, and what of the memory collections of garbage look at."""

import gc
import os
import subprocess
import sys
import weakref

import pytest

from mbn_rewrite import device


@pytest.mark.parametrize(("cores", "named"), [({0}, "1 core"), ({0, 3}, "2 cores")])
def test_a_processor_is_named_with_the_cores_of_this_process(monkeypatch, cores, named):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    assert device.processor() == f"{device.cpu_name()}, {named}"


@pytest.fixture
def nothing_frozen():
    """As in a process of its own: this suite freezes TensorFlow."""
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    yield
    if frozen:
        gc.freeze()


class Cycle:
    """Garbage that only a collection finds, once it is let go."""

    def __init__(self):
        self.self = self


@pytest.fixture
def many():
    """More objects than Python itself freezes."""
    return [[] for _ in range(20_000)]


def test_older_objects_are_spared_until_the_end(nothing_frozen, many):
    old, kept = Cycle(), Cycle()
    gone = weakref.ref(old)
    with device.older_objects_spared():
        assert gc.get_freeze_count()
        del old
        young = weakref.ref(Cycle())
        gc.collect()
        assert gone() is not None
        assert young() is None
    assert not gc.get_freeze_count()
    gc.collect()
    assert gone() is None
    assert kept.self is kept


def test_garbage_of_before_is_not_spared(nothing_frozen):
    gone = weakref.ref(Cycle())
    with device.older_objects_spared():
        assert gone() is None


def test_objects_are_thawed_when_something_fails(nothing_frozen):
    with pytest.raises(ValueError, match="fails"), device.older_objects_spared():
        raise ValueError("fails")
    assert not gc.get_freeze_count()


def test_what_the_caller_froze_stays_frozen(nothing_frozen, many):
    gc.freeze()
    with device.older_objects_spared():
        pass
    assert gc.get_freeze_count() >= len(many)
    gc.unfreeze()


def test_what_python_itself_freezes_does_not_count(nothing_frozen, monkeypatch):
    """Python 3.12 and later start with objects that are frozen."""
    frozen = []
    monkeypatch.setattr(gc, "get_freeze_count", lambda: 375)
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(True))
    with device.older_objects_spared():
        assert frozen


@pytest.mark.slow
def test_a_rewrite_spares_tensorflow(tmp_path):
    """In a process of its own, since this suite spares it already."""
    program = (
        "import gc, sys, mbn_rewrite, tensorflow as tf\n"
        "module = tf.Module()\n"
        "module.f = tf.function(lambda x: x + 1, input_signature=[tf.TensorSpec([2])])\n"
        "tf.saved_model.save(module, sys.argv[1], signatures=module.f)\n"
        "counts = {}\n"
        "def note(line): counts[line.split()[0]] = gc.get_freeze_count()\n"
        "mbn_rewrite.rewrite_saved_model(sys.argv[1], sys.argv[2], progress=note)\n"
        "assert counts['planning,'] > 100_000, counts\n"
        "assert gc.get_freeze_count() < 10_000\n"
    )
    paths = [str(tmp_path / name) for name in ("original", "rewritten")]
    done = subprocess.run(
        [sys.executable, "-c", program, *paths], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
