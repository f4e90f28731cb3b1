"""Sampled batch normalisation on JAX is not there yet; see `training.backends`."""

raise ImportError("the training layers do not run on JAX yet.")
