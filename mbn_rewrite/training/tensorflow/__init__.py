"""Sampled batch normalisation on TensorFlow; see `training.backends`."""
