"""The front end for SavedModels, at the level of TensorFlow functions."""
