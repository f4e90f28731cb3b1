"""The files of one model that is given to all tools."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Work:
    """The files of one model.

    Attributes:
        directory: where they are.
    """

    directory: Path

    @property
    def original(self) -> Path:
        """The SavedModel that all start from."""
        return self.directory / "original"

    @property
    def keras_file(self) -> Path:
        """The original as a file of tf_keras, where there is one."""
        return self.directory / "original.h5"

    @property
    def inputs(self) -> Path:
        """Arrays by the names of the signature's inputs (.npz)."""
        return self.directory / "inputs.npz"

    @property
    def timed(self) -> Path:
        """Inputs by name, of the batch that is timed."""
        return self.directory / "timed.npz"

    @property
    def calibration(self) -> Path:
        """Inputs by name that the ranges of quantised values are taken from."""
        return self.directory / "calibration.npz"

    @property
    def outputs(self) -> Path:
        """Outputs of the original for them, by name."""
        return self.directory / "outputs.npz"

    def output(self, key: str) -> Path:
        """Path for what a tool makes."""
        return self.directory / key
