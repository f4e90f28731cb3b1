"""What a user meets first: the import, the names, and the errors for what is not a model."""

import importlib
import os
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest

import mbn_rewrite as mbn
from mbn_rewrite.errors import cause_of, is_out_of_memory
from mbn_rewrite.options import MODES

PUBLIC = [
    "Comparison",
    "Decision",
    "Latencies",
    "Measurement",
    "Mode",
    "ModifiedBatchNormalization",
    "Plan",
    "Report",
    "RewriteError",
    "StridedBatchNormalization",
    "VerificationError",
    "convert",
    "convert_with_plan",
    "measure",
    "plan",
    "rewrite_saved_model",
    "verify",
    "verify_saved_model",
]


def test_import_loads_neither_tensorflow_nor_keras():
    code = (
        "import sys, mbn_rewrite\n"
        "heavy = {'tensorflow', 'tf_keras', 'keras', 'numpy', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_planner_and_motion_do_not_load_tensorflow():
    code = (
        "import sys, mbn_rewrite.passes.planner, mbn_rewrite.rewrite, mbn_rewrite.verification\n"
        "sys.exit('loaded' if 'tensorflow' in sys.modules else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_public_names():
    assert sorted(mbn.__all__) == PUBLIC
    assert set(PUBLIC) <= set(dir(mbn))
    assert all(getattr(mbn, name).__doc__ for name in PUBLIC if name != "Mode")


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("Graph execution error:\n\nDetected at node add:\nshapes differ", "shapes differ."),
        ("Exception encountered when calling Dense.\n\nit is too small.", "it is too small."),
        ("", "ValueError."),
    ],
)
def test_what_frameworks_say_is_one_sentence(message, said):
    assert cause_of(ValueError(message)) == said


def test_want_of_memory_is_seen_behind_other_errors():
    error = mbn.RewriteError("it cannot be called")
    error.__cause__ = RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
    assert is_out_of_memory(error)
    assert not is_out_of_memory(ValueError("no room in the boom"))


def test_modes_are_the_values_of_a_literal():
    assert get_args(mbn.Mode) == tuple(MODES)
    for function in (mbn.convert, mbn.plan, mbn.convert_with_plan, mbn.rewrite_saved_model):
        assert get_type_hints(function)["mode"] == mbn.Mode


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'convrt'"):
        mbn.convrt  # noqa: B018


@pytest.mark.parametrize("function", [mbn.plan, mbn.convert])
@pytest.mark.parametrize("thing", [None, 3, [1, 2], len], ids=repr)
def test_what_is_not_a_model(thing, function):
    with pytest.raises(mbn.RewriteError, match="a model of tf_keras or Keras 3 is needed"):
        function(thing)


def test_a_path_is_not_a_model():
    with pytest.raises(mbn.RewriteError, match="rewrite_saved_model"):
        mbn.convert("model.h5")


def test_unknown_mode_lists_the_modes():
    with pytest.raises(mbn.RewriteError, match=r"'folded'.*\"fold\".*\"depthwise\""):
        mbn.plan(None, "folded")


@pytest.mark.parametrize("mode", ["fold", "depthwise"])
def test_stride_for_a_mode_without_one(mode):
    with pytest.raises(mbn.RewriteError, match=r"takes no stride.*Modes that take one"):
        mbn.convert(None, mode, stride=2)


KERASES = ["tf_keras", "keras"]


@pytest.mark.parametrize("package", KERASES)
def test_layer_is_not_a_model(package):
    layers = importlib.import_module(package).layers
    with pytest.raises(mbn.RewriteError, match=rf"not the Dense 'dense'.*{package}\.Sequential"):
        mbn.convert(layers.Dense(3, name="dense"))


@pytest.mark.parametrize("package", KERASES)
@pytest.mark.parametrize("kind", ["sequential", "subclassed"])
def test_unbuilt_model(kind, package):
    keras = importlib.import_module(package)

    class Own(keras.Model):
        pass

    layers = [keras.layers.Dense(3), keras.layers.BatchNormalization()]
    model = keras.Sequential(layers) if kind == "sequential" else Own()
    with pytest.raises(mbn.RewriteError, match=r"has not been built.*Call it once"):
        mbn.plan(model, "fold")


# ------------------------------------------------------------------------ in other processes

CONVERTED = """
import sys
{before}
import numpy as np
import {package} as keras
import mbn_rewrite as mbn

K = keras.layers
x = K.Input((8, 4))
y = K.BatchNormalization()(K.Conv1D(4, 1)(x))
y = K.BatchNormalization()(K.Bidirectional(K.GRU(3))(K.BatchNormalization()(K.ReLU()(y))))
model = keras.Model(x, [K.Dense(3)(y), y])
for layer in model.layers:
    if isinstance(layer, K.BatchNormalization):
        layer.moving_mean.assign([0.1 * i for i in range(layer.moving_mean.shape[0])])
for mode in ("fold", "depthwise"):
    new = mbn.convert(model, mode)
    comparison = mbn.verify(model, new)
    assert comparison.ok, comparison
    left = sum(isinstance(layer, K.BatchNormalization) for layer in new.layers)
    assert left == mbn.plan(model, mode).left == (1 if mode == "fold" else 0)
from mbn_rewrite.{home}.layers import ChannelClip
clip = ChannelClip(1, use_upper=True)
clip.build((None, 2, 3))
clip.set_weights([np.array([-1.0, -np.inf]), np.array([np.inf, 2.0])])
y = np.asarray(clip(np.array([[[-3.0, 0, 3]] * 2], "float32")))
assert y.tolist() == [[[-1, 0, 3], [-3, 0, 2]]], y
sys.exit("loaded {other}" if "{other}" in sys.modules else 0)
"""


def converts_without(package, other, before="", **environment):
    home = f"{package}_frontend"
    code = CONVERTED.format(package=package, home=home, other=other, before=before)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_converting_a_model_of_keras_3_does_not_load_tf_keras():
    converts_without("keras", "tf_keras")


@pytest.mark.slow
def test_converting_a_model_of_tf_keras_does_not_load_the_other_front_end():
    # tf_keras loads Keras 3 itself.
    converts_without("tf_keras", "mbn_rewrite.frontends.keras3.frontend")


WITHOUT_TENSORFLOW = """
class Refuses:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tensorflow":
            raise ImportError("this process has no TensorFlow")

sys.meta_path.insert(0, Refuses())
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["numpy", "jax"])
def test_keras_3_without_tensorflow(backend):
    pytest.importorskip("jax", reason="Keras's numpy backend needs it too")
    converts_without("keras", "tensorflow", WITHOUT_TENSORFLOW, KERAS_BACKEND=backend)
