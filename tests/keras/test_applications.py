"""The networks that people train: everything that can be folded is, and outputs stay."""

import keras
import numpy as np
import pytest

import mbn_rewrite as mbn
from benchmarks.models.networks import STATISTICS, build, random_images, set_statistics
from mbn_rewrite.comparison import TOLERANCES, compare_outputs
from mbn_rewrite.plans import Reclip
from tests.support.checks import check_rewrites, outputs
from tests.support.thorough import thorough_but_for

pytestmark = pytest.mark.slow

MODES = ("fold", "depthwise")

# (BatchNormalizations, left after fold). In the last two, values that several of them read pass
# through activations or maxima, which a gamma of the other sign cannot; none is left without.
# benchmarks/coverage.py has more networks, whose tests take a minute each.
EXPECTED = {
    "ResNet50": (53, 0),
    "MobileNet": (27, 0),
    "MobileNetV2": (52, 0),
    "MobileNetV3Small": (34, 0),
    "EfficientNetB0": (49, 0),
    "ResNet50V2": (49, 17),
    "DenseNet121": (121, 62),
}


@pytest.mark.parametrize("name", thorough_but_for(EXPECTED, ["MobileNetV2", "ResNet50V2"]))
def test_network(name):
    model = build(name, seed=0, image_size=96)
    rng = np.random.default_rng(0)
    # The harder set of statistics; benchmarks/coverage.py compares both, at full size.
    set_statistics(model, STATISTICS["hard"], rng)
    images = random_images(model, rng)
    check_rewrites(model, images, MODES)
    plans = {mode: mbn.plan(model, mode) for mode in MODES}
    total, left = EXPECTED[name]
    assert (len(plans["fold"].decisions), plans["fold"].left) == (total, left)
    assert plans["depthwise"].left == 0
    check_twin(name, model, images, plans)


# (BatchNormalizations, clips, merged sums)
POSITIVE = {
    "ResNet50V2": (49, 1, 0),
    "DenseNet121": (121, 59, 0),
    "RepVGG-A0": (61, 0, 22),
    "WideResNet-16-4": (13, 0, 0),
}


@pytest.mark.parametrize("name", thorough_but_for(POSITIVE, ["RepVGG-A0", "WideResNet-16-4"]))
def test_none_is_left_where_no_gamma_is_negative(name):
    model = build(name, seed=0, image_size=96)
    rng = np.random.default_rng(0)
    set_statistics(model, STATISTICS["typical"], rng)
    images = random_images(model, rng)
    check_rewrites(model, images, ["fold"])
    plan = mbn.plan(model, "fold")
    found = len(plan.decisions), len(plan.of(Reclip)), len(plan.merged)
    assert (plan.left, found) == (0, POSITIVE[name])


def check_twin(name, model, images, plans):
    """The same network of Keras 3 with the same weights fares the same."""
    twin = build(name, seed=0, image_size=96, keras=keras)
    twin.set_weights(model.get_weights())
    both = outputs(model, images), outputs(twin, images)
    assert compare_outputs(*both, TOLERANCES["float32"]).ok, "not the same network"
    check_rewrites(twin, images, ["fold"])
    for mode, plan in plans.items():
        ours, theirs = plan.decisions, mbn.plan(twin, mode).decisions
        assert [d.action for d in ours] == [d.action for d in theirs]
        if name != "MobileNetV3Small":  # most of its layers have other names in Keras 3
            assert list(map(described, ours)) == list(map(described, theirs))


def described(decision):
    """All of a decision; Keras 3 has "_" where tf_keras has "/" in names."""
    texts = (decision.name, *decision.into, decision.reason)
    return decision.action, [text.replace("/", "_") for text in texts]
