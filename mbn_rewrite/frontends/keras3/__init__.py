"""The front end for Keras 3, on any backend. `entry` lists what the others use of it."""

# First of all: when its import ends, all layers for it are registered, see `registration`.
import keras  # noqa: F401
