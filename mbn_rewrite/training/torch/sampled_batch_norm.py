"""Sampled batch normalisation on torch is not there yet; see `training.backends`."""

raise ImportError("the training layers do not run on torch yet.")
