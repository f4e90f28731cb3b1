"""What the benchmarks of training do on TensorFlow, with either Keras.

room.py         functions of tensors and training steps as tf.functions; see `backends`
profiles.py     what ran, by TensorFlow's profiler
attribution.py  for which BatchNormalization it ran, by the graph
"""
