"""Training steps, and single layers in training, as `train_step.py` and `layer.py` measure them.

steps.py            a step, as people write it
rows.py             what is known of a variant; the settings of all
candidates.py       variants, built
checks.py           their losses and operations
measuring.py        their memory and time
operations.py       what ran, as data
profile_tables.py   how long each took
layer_variants.py   single layers: variants, and functions that run them
layer_checks.py     their outputs and operations
layer_tables.py     their times
backends.py         what each backend of Keras has to offer to all that; its rooms:
tensorflow/ jax/ torch/
keras_devices.py    devices of the latter two
hlo.py              modules that XLA has compiled
"""
