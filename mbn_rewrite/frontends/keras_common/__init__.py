"""Models made of layers, as far as the front ends for tf_keras and Keras 3 have them in common.

Everything here works on the layers of either Keras. Differences between the two are behind
`adapter.KerasAdapter`, of which each front end has one.
"""
