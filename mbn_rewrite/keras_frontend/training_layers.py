"""Old path of `mbn_rewrite.frontends.keras3.training_layers`."""

from mbn_rewrite.frontends.keras3.training_layers import (
    ModifiedBatchNormalization,
    StridedBatchNormalization,
)

__all__ = ["ModifiedBatchNormalization", "StridedBatchNormalization"]
