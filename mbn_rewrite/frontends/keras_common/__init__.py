"""What the front ends for tf_keras and Keras 3 share: models made of layers.

Everything here works on layers of either Keras. What differs is asked of a `adapter.KerasAdapter`,
of which each front end has one.
"""
