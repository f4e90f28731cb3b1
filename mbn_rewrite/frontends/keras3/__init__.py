"""Front end for Keras 3, on any backend."""

# First of all: when its import ends, all layers for it are registered, see `registration`.
import keras  # noqa: F401
