"""Writes small files that hold layers of this package, as tests/keras/test_old_files.py reads them.

    PYTHONPATH=CHECKOUT_OF_A_RELEASE python tests/data/write.py DIRECTORY

A release adds a directory of its own; those of former releases stay as they are.
"""

import importlib
import os
import sys
from pathlib import Path

import numpy as np

import mbn_rewrite as mbn

KERASES = {"tf_keras": "tf_keras_frontend", "keras": "keras_frontend"}


def model_of(package):
    """A model with every layer of ours that its Keras has, one in a wrapper, some in a model."""
    keras = importlib.import_module(package)
    home = f"mbn_rewrite.{KERASES[package]}"
    ours = importlib.import_module(f"{home}.layers")
    training = importlib.import_module(f"{home}.training_layers")
    layers = keras.layers
    x = y = layers.Input((6, 5, 2), name="picture")
    convolution = layers.Conv2D(3, 3, padding="same", use_bias=False, name="convolution")
    y = ours.BorderedConvolution(convolution, activation="relu", name="bordered")(y)
    y = training.StridedBatchNormalization(2, name="strided")(y)
    y = layers.TimeDistributed(ours.ScaleAndShift(name="held"), name="wrapper")(y)
    if package == "keras":
        # It is for channels first, which convolutions on a CPU know with some kernels only.
        convolution = layers.Conv1D(15, 1, use_bias=False, name="first")
        y = layers.Reshape((6, 15))(y)
        y = ours.BiasedConvolution(convolution, name="biased")(y)
        y = layers.Reshape((6, 5, 3))(y)
    inner = layers.Input(y.shape[1:])
    z = training.ModifiedBatchNormalization((2, 1), name="modified")(inner)
    z = ours.ScaleAndShift(name="scale_and_shift")(z)
    z = ours.ChannelClip(use_upper=True, name="channel_clip")(z)
    y = keras.Model(inner, z, name="inner")(y)
    y = layers.BatchNormalization(name="bn")(layers.Dense(2, name="dense")(y))
    model = keras.Model(x, y, name="model")
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in model.get_weights()])
    return model


def write(directory):
    os.chdir(directory)
    inputs = np.random.default_rng(1).standard_normal((3, 6, 5, 2)).astype(np.float32)
    outputs = {}
    for package in KERASES:
        model = model_of(package)
        for kind in ("keras", "h5"):
            model.save(f"{package}.{kind}")
        outputs[package] = np.asarray(model(inputs))
    np.savez("outputs.npz", inputs=inputs, **outputs)
    report = mbn.rewrite_saved_model("keras.keras", "written", "fold")
    Path("report.json").write_text(report.to_json() + "\n")


if __name__ == "__main__":
    write(sys.argv[1])
