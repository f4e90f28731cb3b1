"""What all tests share: a quiet, small TensorFlow and reproducible random numbers."""

import gc
import itertools
import os
import sys
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

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("suite")


def pytest_collection_finish():
    """What was imported stays, so no collection of garbage need look at it again."""
    gc.collect()
    gc.freeze()


# Keras looks for garbage whenever it forgets its state, among all that a process holds by then,
# which takes longer than most tests.
_TESTS_PER_COLLECTION = 25
_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def _fresh_keras():
    """Names that count from 1 in every test, and no policy or graph left from another."""
    yield
    with mock.patch.object(gc, "collect"):
        for name in {"tf_keras", "keras"} & set(sys.modules):
            sys.modules[name].mixed_precision.set_global_policy("float32")
            sys.modules[name].backend.clear_session()
    if next(_tests) % _TESTS_PER_COLLECTION == 0:
        gc.collect()


@pytest.fixture(params=["tf_keras", "keras"])
def each_keras(request):
    """Runs a test once with each Keras; the value is the package in use."""
    from tests.support import kerases

    kerases.use(request.param)
    yield kerases.package()
    kerases.use("tf_keras")
