"""Signatures that nobody can make up inputs for, or that cannot be compared: told, and let by."""

import json

import numpy as np
import pytest
import tensorflow as tf

import mbn_rewrite as mbn
from mbn_rewrite.named_arrays import as_arrays
from tests.support.saved_models import IMAGE, Network, image_spec

pytestmark = pytest.mark.slow

SIDE, CHANNELS = IMAGE[0], IMAGE[2]


def decoded(data, decode=tf.io.decode_jpeg):
    picture = tf.image.resize(decode(data, channels=CHANNELS), [SIDE, SIDE])
    picture.set_shape(IMAGE)
    return picture / 255


def each(function):
    return lambda texts: tf.map_fn(function, texts, fn_output_signature=tf.TensorSpec(IMAGE))


def parsed(texts):
    features = {
        "numbers": tf.io.FixedLenFeature([SIDE * SIDE * CHANNELS], tf.float32),
        "label": tf.io.FixedLenFeature([], tf.int64, 0),
        "words": tf.io.VarLenFeature(tf.string),
    }
    example = tf.io.parse_example(texts, features)
    return tf.reshape(example["numbers"], [-1, *IMAGE])


def parsed_picture(texts):
    features = {"image": tf.io.FixedLenFeature([], tf.string)}
    return each(decoded)(tf.io.parse_example(texts, features)["image"])


def parsed_one(texts):
    features = {"numbers": tf.io.FixedLenFeature(IMAGE, tf.float32)}
    return each(lambda text: tf.io.parse_single_example(text, features)["numbers"])(texts)


def number(texts):
    return tf.ones([1, *IMAGE]) * tf.strings.to_number(texts)[:, None, None, None]


def by_a_grammar(texts):
    parts = tf.strings.split(texts, ":").to_tensor()
    with tf.control_dependencies([tf.debugging.assert_equal(parts[:, 0], "size")]):
        return number(parts[:, 1])


TEXTS = {
    "file": each(decoded),
    "base64": each(lambda text: decoded(tf.io.decode_base64(text))),
    "base64_of_png": each(lambda text: decoded(tf.io.decode_base64(text), tf.io.decode_png)),
    "examples": parsed,
    "examples_of_files": parsed_picture,
    "single_examples": parsed_one,
    "numbers": number,
}


def save(directory, **signatures):
    """A network whose signatures make images of what they take, as (function, spec)."""
    network = Network()
    functions = {
        name: tf.function(
            lambda x, make=make: {"scores": network.scores(make(x))},
            input_signature=[tf.TensorSpec(spec.shape, spec.dtype, "x")],
        )
        for name, (make, spec) in signatures.items()
    }
    tf.saved_model.save(network, str(directory), signatures=functions)
    return directory


TEXT = tf.TensorSpec([None], tf.string)
IMAGES = image_spec()


@pytest.fixture(scope="module")
def with_texts(tmp_path_factory):
    """What became of a model that takes texts of every kind."""
    place = tmp_path_factory.mktemp("texts")
    save(place / "in", **{name: (make, TEXT) for name, make in TEXTS.items()})
    return mbn.rewrite_saved_model(place / "in", place / "out", "fold")


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_that_can_be_made_up(with_texts, kind):
    assert with_texts.comparisons[kind].ok
    assert with_texts.plan.left == 0


@pytest.fixture(scope="module")
def with_a_grammar(tmp_path_factory):
    """One signature that takes images, and one that takes "size:" and a number."""
    place = tmp_path_factory.mktemp("grammar") / "in"
    return save(place, images=(lambda x: x, IMAGES), sizes=(by_a_grammar, TEXT))


def test_what_cannot_be_made_up_is_asked_for(with_a_grammar, tmp_path):
    with pytest.raises(mbn.RewriteError) as caught:
        mbn.rewrite_saved_model(with_a_grammar, tmp_path / "out", "fold")
    said = str(caught.value)
    assert "'sizes/x' (string, shape (None,))" in said
    assert "numpy.savez('inputs.npz', **{'sizes/x': ...})" in said
    assert "--inputs=inputs.npz" in said
    assert "--unverified=sizes" in said
    assert said.count("--inputs") == 1
    assert "\n" not in said
    assert not (tmp_path / "out").exists()


def test_samples_are_taken(with_a_grammar, tmp_path):
    inputs = {"sizes": {"x": ["size:1", b"size:2"]}}
    report = mbn.rewrite_saved_model(with_a_grammar, tmp_path / "out", "fold", inputs=inputs)
    assert sorted(report.comparisons) == ["images", "sizes"]
    assert report.ok


def test_a_signature_is_carried_over_unverified(with_a_grammar, tmp_path):
    report = mbn.rewrite_saved_model(with_a_grammar, tmp_path / "out", "fold", unverified=["sizes"])
    assert list(report.comparisons) == ["images"]
    assert report.unverified == {"sizes": "as it was asked for"}
    assert json.loads(report.to_json())["verification"]["unverified"] == report.unverified
    assert "not verified: sizes" in str(report)
    owner = tf.saved_model.load(str(tmp_path / "out"))
    assert owner.signatures["sizes"](x=tf.constant(["size:1"]))["scores"].shape == (1, 2)


def test_unknown_names_are_an_error(with_a_grammar, tmp_path):
    with pytest.raises(mbn.RewriteError, match=r"unverified names serve.*images, sizes"):
        mbn.rewrite_saved_model(
            with_a_grammar, tmp_path / "out", "fold", unverified=["serve"], dry_run=True
        )


# -------------------------------------------------------------- what says nothing when compared


def by_the_clock(x):
    """Adds a number by channel that is another one within a microsecond, so that none repeats."""
    fast = 1e6 * np.sqrt(np.arange(2.0, 2.0 + x.shape[-1]))
    return x + tf.cast(tf.sin(fast * tf.timestamp()), x.dtype)


STRANGE = {
    "NaN": ("NaN", lambda x: x * np.nan),
    "numbers": ("other outputs each time", by_the_clock),
    "classes": ("other outputs each time", lambda x: tf.round(1000 * by_the_clock(x))),
}


@pytest.mark.parametrize("case", STRANGE)
def test_what_cannot_be_compared_has_a_way_through(tmp_path, case):
    said, function = STRANGE[case]
    save(tmp_path / "in", serve=(function, IMAGES), images=(lambda x: x, IMAGES))
    with pytest.raises(mbn.RewriteError, match=rf"{said}.*--unverified=serve") as caught:
        mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", "fold")
    assert not isinstance(caught.value, mbn.VerificationError)
    assert not (tmp_path / "out").exists()
    report = mbn.rewrite_saved_model(
        tmp_path / "in", tmp_path / "out", "fold", unverified=["serve"]
    )
    assert "serve" in report.unverified
    assert report.comparisons["images"].ok


def test_what_takes_few_numbers_is_verified(tmp_path):
    few = {"root": tf.sqrt, "log": tf.math.log, "below_1": lambda x: tf.sqrt(1 - x)}
    save(tmp_path / "in", **{name: (function, IMAGES) for name, function in few.items()})
    report = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", "fold")
    assert {name: c.ok for name, c in report.comparisons.items()} == dict.fromkeys(few, True)


def test_masks_are_found_in_graphs(tmp_path):
    """Where steps are masked by comparison with a number, some of a made-up batch are."""
    network = Network()

    @tf.function(input_signature=[tf.TensorSpec([None, 8, *IMAGE], tf.float32, "x")])
    def serve(x):
        mask = tf.cast(tf.reduce_any(tf.not_equal(x, -2.0), [2, 3, 4]), tf.float32)
        scores = tf.reshape(network.scores(tf.reshape(x, [-1, *IMAGE])), [-1, 8, 2])
        return {"mask": mask, "scores": scores * mask[:, :, None]}

    tf.saved_model.save(network, str(tmp_path / "in"), signatures=serve)
    from mbn_rewrite.frontends.saved_model.source import SavedModelDirectory

    found = SavedModelDirectory(tmp_path / "in", None, None).reference_io(None)["serving_default"]
    steps = found.outputs["mask"].sum(1)
    assert steps[0] == 8
    assert steps[-1] == 0
    assert len(set(steps)) == 4


def test_what_only_xla_can_run_is_said(tmp_path):
    network = Network()

    @tf.function(input_signature=[tf.TensorSpec([None, CHANNELS, SIDE, SIDE], tf.float32, "x")])
    def serve(x):
        pooled = tf.nn.max_pool2d(x, 2, 1, "SAME", data_format="NCHW")
        return {"scores": network.scores(tf.transpose(pooled, [0, 2, 3, 1]))}

    tf.saved_model.save(network, str(tmp_path / "in"), signatures=serve)
    report = mbn.rewrite_saved_model(tmp_path / "in", tmp_path / "out", "fold")
    assert report.by_xla == ("serving_default",)
    assert "serving_default was run by XLA" in str(report)
    assert json.loads(report.to_json())["verification"]["by_xla"] == ["serving_default"]


# ---------------------------------------------------------------------------- given inputs


def test_bytes_keep_the_zeros_at_their_end():
    arrays = as_arrays({"x": [b"a\0", b"bc"], "s": {"y": [[1, 2]], "z": "text"}})
    assert arrays["x"].tolist() == [b"a\0", b"bc"]
    assert arrays["s/y"].shape == (1, 2)
    assert arrays["s/z"].dtype == object


def test_ragged_lists_are_no_inputs():
    with pytest.raises(mbn.RewriteError, match="input 'x' is no array"):
        as_arrays({"x": [[1.0], [2.0, 3.0]]})
