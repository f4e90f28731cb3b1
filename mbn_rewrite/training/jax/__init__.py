"""Sampled batch normalisation on JAX; see `training.backends`."""
