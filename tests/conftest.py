"""What all tests share: a quiet, small TensorFlow and reproducible random numbers."""

import contextlib
import gc
import itertools
import os
import signal
import sys
import zlib
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Tests run in several processes; one thread each is faster than many threads in turn.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
# The same kernels on every machine: oneDNN's, on by default where there is AVX-512, differ at
# the edges (no examples, NaN).
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import hypothesis
import pytest

# Where the suite runs in the background, its processes would ignore an interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("suite")


def _collect():
    """Collects garbage. What is left stays, so that no other collection looks through it again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks half of the tests that alternate as thorough: of each case that with one Keras.

    A test of one Keras names it: `alternating(only="keras")`.
    """
    for item in items:
        alternating = item.get_closest_marker("alternating")
        if not alternating:
            continue
        params = getattr(item, "callspec", None) and item.callspec.params
        if not params or "each_keras" not in params:
            raise pytest.UsageError(f"{item.nodeid} alternates, but does not take each_keras")
        case = item.nodeid.replace("tf_keras", "keras")
        by_chance = ("keras", "tf_keras")[zlib.crc32(case.encode()) % 2]
        if params["each_keras"] != alternating.kwargs.get("only", by_chance):
            item.add_marker(pytest.mark.thorough)


def pytest_collection_finish():
    gc.set_threshold(10_000)  # Python's own 700 objects are made and dropped by every operation
    _collect()


# Whenever Keras forgets its state, it looks for garbage among all that a process holds by then,
# and has TensorFlow forget its kernels, which the next test makes again. Each takes longer than
# most tests, so that it is done now and then.
_TESTS_PER_CLEARING = 25
_tests = itertools.count(1)


def _tensorflow_context():
    """TensorFlow's module of that name, if it has been imported."""
    return sys.modules.get("tensorflow.python.eager.context")


def _without_clearing():
    """Context manager in which Keras collects no garbage, and TensorFlow keeps its kernels."""
    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(gc, "collect"))
    if context := _tensorflow_context():
        stack.enter_context(mock.patch.object(context.Context, "clear_kernel_cache"))
    return stack


@pytest.fixture(autouse=True)
def _fresh_keras():
    """Names that count from 1 in every test, and no policy or graph left from another."""
    yield
    with _without_clearing():
        for name in {"tf_keras", "keras"} & set(sys.modules):
            sys.modules[name].mixed_precision.set_global_policy("float32")
            sys.modules[name].backend.clear_session()
    if next(_tests) % _TESTS_PER_CLEARING == 0:
        _collect()
        if context := _tensorflow_context():
            context.context().clear_kernel_cache()


@pytest.fixture(params=["tf_keras", "keras"])
def each_keras(request):
    """Runs a test once with each Keras; the value is the package in use."""
    from tests.support import kerases

    kerases.use(request.param)
    yield kerases.package()
    kerases.use("tf_keras")
