"""Old path of `mbn_rewrite.frontends.tf_keras.training_layers`."""

from mbn_rewrite.frontends.tf_keras.training_layers import (
    ModifiedBatchNormalization,
    StridedBatchNormalization,
)

__all__ = ["ModifiedBatchNormalization", "StridedBatchNormalization"]
