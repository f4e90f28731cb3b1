"""The front end for tf_keras (Keras 2). `entry` lists what the others use of it."""
