"""Models of tf_keras and Keras 3, and their files."""
