"""TensorFlow without what it says about the machine while it starts."""

from __future__ import annotations

import os
import sys


def import_tensorflow(quiet_log: bool = True, threads: int = 0) -> None:
    """Imports TensorFlow and tf_keras.

    TensorFlow's native code writes to the file descriptor of standard error before any
    setting of its log is read, so that is turned away for as long as the import lasts.

    Args:
        quiet_log: whether to log errors only from then on.
        threads: how many threads of the CPU an operation may use; 0 for one a core.
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
    if threads:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
    if quiet_log:
        from absl import logging

        logging.set_verbosity(logging.ERROR)
        tf.get_logger().setLevel("ERROR")
