"""What a user meets first: the import, the names, and the errors for what is not a model."""

import subprocess
import sys

import pytest

import mbn_rewrite as mbn

PUBLIC = ["RewriteError", "convert", "plan", "rewrite_saved_model", "verify"]


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
        "import sys, mbn_rewrite.planner, mbn_rewrite.exporter, mbn_rewrite.comparison\n"
        "sys.exit('loaded' if 'tensorflow' in sys.modules else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_public_names():
    assert sorted(mbn.__all__) == PUBLIC
    assert set(PUBLIC) <= set(dir(mbn))
    assert all(getattr(mbn, name).__doc__ for name in PUBLIC)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'convrt'"):
        mbn.convrt  # noqa: B018


@pytest.mark.parametrize("function", [mbn.plan, mbn.convert])
@pytest.mark.parametrize("thing", [None, 3, [1, 2], len], ids=repr)
def test_what_is_not_a_model(thing, function):
    with pytest.raises(mbn.RewriteError, match="a tf_keras model is needed, not"):
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


def test_layer_is_not_a_model():
    import tf_keras

    with pytest.raises(mbn.RewriteError, match=r"not the Dense 'dense'.*Sequential"):
        mbn.convert(tf_keras.layers.Dense(3, name="dense"))


@pytest.mark.parametrize("kind", ["sequential", "subclassed"])
def test_unbuilt_model(kind):
    import tf_keras

    class Own(tf_keras.Model):
        pass

    layers = [tf_keras.layers.Dense(3), tf_keras.layers.BatchNormalization()]
    model = tf_keras.Sequential(layers) if kind == "sequential" else Own()
    with pytest.raises(mbn.RewriteError, match=r"has not been built.*Call it once"):
        mbn.plan(model)


def test_keras_3_model():
    import keras

    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
    with pytest.raises(mbn.RewriteError, match=r"Keras 3.*tf_keras"):
        mbn.convert(model)
