"""The modes in which a model is rewritten."""

from __future__ import annotations

from typing import Literal

Mode = Literal["auto", "fold", "depthwise", "strided", "mbn"]
MODES: dict[Mode, str] = {
    "auto": "fold, and do with what is left whatever measures fastest on this machine",
    "fold": "every BatchNormalization is absorbed by its neighbours where that is exact",
    "depthwise": "every BatchNormalization becomes a depthwise 1x1 convolution",
    "strided": "for training: BatchNormalization with statistics of a sample",
    "mbn": "for training: statistics of a sample, and a trainable depthwise 1x1 convolution",
}
TRAINING_MODES = ("strided", "mbn")
