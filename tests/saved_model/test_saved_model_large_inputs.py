"""Signatures whose inputs are larger than memory: they can be planned, for nothing is made up."""

import pytest
import tensorflow as tf

import mbn_rewrite as mbn
from mbn_rewrite.frontends.saved_model.inlining import inlined

pytestmark = pytest.mark.slow


class Large(tf.Module):
    """A convolution and a BatchNormalization of an input with a static shape."""

    def __init__(self):
        super().__init__()
        self.kernel = tf.Variable(tf.ones([1, 1, 1, 2]))
        self.norm = [tf.Variable(tf.ones([2])) for _ in range(4)]

    @tf.function
    def __call__(self, x):
        y = tf.nn.conv2d(x, self.kernel, 1, "VALID")
        y, _, _ = tf.compat.v1.nn.fused_batch_norm(y, *self.norm, is_training=False)
        return {"y": tf.reduce_max(y, [1, 2])}


@pytest.mark.parametrize("size", [8, 400_000])
def test_an_input_of_a_static_shape_is_planned(size, tmp_path):
    model = Large()
    spec = tf.TensorSpec([1, size, size, 1], tf.float32, name="x")
    function = model.__call__.get_concrete_function(spec)
    graph_def = inlined(function).graph_def
    (argument,) = [node for node in graph_def.node if node.name == "x"]
    assert [d.size for d in argument.attr["shape"].shape.dim] == [1, size, size, 1]
    tf.saved_model.save(model, str(tmp_path / "m"), signatures=function)
    report = mbn.rewrite_saved_model(tmp_path / "m", "", "fold", dry_run=True)
    assert report.plan.counts == {"folded": 1}
