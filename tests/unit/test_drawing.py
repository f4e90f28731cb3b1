"""Drawings: every call and every edge of a model, and what a plan makes of it."""

import re

import keras
import pytest

import mbn_rewrite as mbn
from mbn_rewrite.drawing import mermaid
from tests.support.kerases import K, Model


def branched():
    """A BatchNormalization that folds into a convolution, and one that stays."""
    x = K.Input((6, 6, 2), name="image")
    trunk = K.Conv2D(4, 1, name="trunk")(x)
    y = K.BatchNormalization(name="kept", beta_initializer="ones")(trunk)
    kept = K.Activation("tanh", name="tanh")(y)
    folded = K.BatchNormalization(name="folded")(K.Conv2D(4, 1, name="conv")(kept))
    return Model(x, K.Add(name="add")([trunk, folded]))


def styles_in(drawing):
    """The style of each layer that has one, by name."""
    return dict(re.findall(r'<br>(\w+)(?:<br>\w+)?"\]:::(\w+)$', drawing, re.MULTILINE))


def edges_in(drawing):
    names = dict(re.findall(r'^    (n\d+)\["[^"<]+<br>(\w+)', drawing, re.MULTILINE))
    found = re.findall(r"^    (n\d+) --> (n\d+)$", drawing, re.MULTILINE)
    return {(names[before], names[after]) for before, after in found}


@pytest.mark.usefixtures("each_keras")
def test_a_model_is_drawn_with_all_its_edges():
    drawing = mermaid(branched())
    assert drawing.startswith("flowchart TD\n")
    assert edges_in(drawing) == {
        *(("image", "trunk"), ("trunk", "kept"), ("kept", "tanh"), ("tanh", "conv")),
        *(("conv", "folded"), ("folded", "add"), ("trunk", "add")),
    }
    assert not styles_in(drawing)
    assert "classDef" not in drawing


@pytest.mark.usefixtures("each_keras")
def test_decisions_are_drawn():
    model = branched()
    drawing = mermaid(model, mbn.plan(model, "fold"))
    assert styles_in(drawing) == {"kept": "kept", "folded": "gone", "conv": "absorbing"}
    assert '"BatchNormalization<br>kept<br>kept"' in drawing
    assert set(re.findall(r"classDef (\w+) ", drawing)) == {"kept", "gone", "absorbing"}


@pytest.mark.usefixtures("each_keras")
def test_what_something_takes_the_place_of_does_not_absorb():
    model = branched()
    drawing = mermaid(model, mbn.plan(model, "depthwise"))
    assert styles_in(drawing) == {"kept": "replaced", "folded": "replaced"}


def test_what_mermaid_reads_as_its_own_is_escaped():
    x = keras.Input((2,), name="x")  # tf_keras has no such names
    drawing = mermaid(keras.Model(x, keras.layers.Dense(2, name='a "b" <c> #d')(x)))
    assert '["Dense<br>a #quot;b#quot; #lt;c#gt; #35;d"]' in drawing


def test_what_is_no_model():
    with pytest.raises(mbn.RewriteError, match="a model of tf_keras or Keras 3 is needed"):
        mermaid(None)
