"""Sampled batch normalisation on torch; see `training.backends`."""
