"""TensorFlow without what it says about the machine while it starts."""

from __future__ import annotations

import os
import sys


def import_tensorflow(quiet_log: bool = True) -> None:
    """Imports TensorFlow and tf_keras.

    TensorFlow's native code writes to the file descriptor of standard error before any
    setting of its log is read, so that is turned away for as long as the import lasts.

    Args:
        quiet_log: whether to log errors only from then on.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
        try:
            import tensorflow as tf

            tf.config.list_physical_devices()  # looks for GPUs, and says what it misses
            import tf_keras  # noqa: F401
        finally:
            os.dup2(saved, 2)
            os.close(saved)
    if quiet_log:
        from absl import logging

        logging.set_verbosity(logging.ERROR)
        tf.get_logger().setLevel("ERROR")
