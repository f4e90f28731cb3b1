"""Front end for tf_keras, that is, Keras 2."""

# First of all: when its import ends, all layers for it are registered, see `registration`.
import tf_keras  # noqa: F401
