"""The front end for tf_keras (Keras 2). `entry` lists what the others use of it."""

# First of all: when its import ends, all layers for it are registered, see `registration`.
import tf_keras  # noqa: F401
