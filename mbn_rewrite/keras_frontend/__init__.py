"""The front end for models of Keras 3."""
