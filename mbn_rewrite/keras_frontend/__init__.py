"""Old home of the layers of ours for Keras 3, for files that name it."""
