"""Old home of the layers of ours for tf_keras, for files that name it."""
