"""What all tests share: a quiet, small TensorFlow and reproducible random numbers."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Tests run in several processes; one thread each is faster than many threads in turn.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")

import hypothesis
import pytest

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _fresh_keras():
    """Names that count from 1 in every test, and no policy or graph left from another."""
    import sys

    yield
    if "tf_keras" in sys.modules:
        import tf_keras

        tf_keras.mixed_precision.set_global_policy("float32")
        tf_keras.backend.clear_session()
