"""The front end for Keras 3, on any backend. `entry` lists what the others use of it."""
