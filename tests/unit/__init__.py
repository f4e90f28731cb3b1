"""The middle of the library, and what needs no model: hardly any of it loads TensorFlow."""
