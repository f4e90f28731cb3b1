"""The front end for tf_keras (Keras 2): reads models into graphs, applies plans to copies."""

from mbn_rewrite.tf_keras_frontend.reader import Reading, read
from mbn_rewrite.tf_keras_frontend.writer import write

__all__ = ["Reading", "read", "write"]
