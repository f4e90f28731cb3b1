"""What the front ends for tf_keras and for Keras 3 have in common."""
