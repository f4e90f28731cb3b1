"""Damages model files at random: flipped bits, cut files, hostile configurations.

`attempt` says what comes of rewriting one. Whatever is in a file, that is a SavedModel or a
RewriteError, and after an error nothing is left. It runs in a process of its own (`Attempts`),
since TensorFlow and HDF5 may crash or not end on damaged files; the tool does so too.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

_NASTY = (
    *(None, True, -1, 0, 2**63, 1e308, "", "/etc/passwd", "..", [], {}, [[]], "relu", "__lambda__"),
    {"class_name": "function", "config": "getpid", "module": "os", "registered_name": "function"},
    {"class_name": "TFOpLambda", "config": {"function": "io.gfile.makedirs", "name": "x"}},
    {"class_name": "__lambda__", "config": {"value": ["4wA=", None, None]}},
    {"class_name": 3, "config": 4},
    {"class_name": "Dense", "config": {"units": 10**12}},
)


def originals(directory: Path) -> list[Path]:
    """Small models of each format in a directory."""
    import keras
    import tf_keras

    from tests.support.saved_models import KINDS

    for name, package in {"tf_keras": tf_keras, "keras": keras}.items():
        layers = package.layers
        x = layers.Input((8, 8, 3))
        y = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(4, 3)(x)))
        model = package.Model(x, layers.Dense(2, "softmax")(layers.GlobalMaxPooling2D()(y)))
        for kind in ("keras", "h5"):
            model.save(directory / f"{name}.{kind}")
    for kind in ("module", "vocabulary", "tf1_vocabulary"):
        KINDS[kind].build(directory / kind)
    return sorted(directory.iterdir())


def damaged(source: Path, directory: Path, seed: int) -> Path:
    """A copy of a model in an empty directory, damaged."""
    rng = np.random.default_rng(seed)
    target = directory / source.name
    if source.is_dir():
        shutil.copytree(source, target)
        files = sorted(path for path in target.rglob("*") if path.is_file())
        _damage_bytes(rng, files[rng.integers(len(files))])
    else:
        shutil.copy(source, target)
        (_damage_config if rng.random() < 0.6 else _damage_bytes)(rng, target)
    return target


def _damage_bytes(rng: np.random.Generator, file: Path) -> None:
    content = bytearray(file.read_bytes())
    start = int(rng.integers(len(content) + 1))
    way = rng.integers(4)
    if way == 0:
        del content[start:]
    elif way == 1:
        content[start : start + 64] = rng.bytes(64)
    elif way == 2:
        del content[start : start + int(rng.integers(1, 64))]
    else:
        for place in rng.integers(len(content), size=int(rng.integers(1, 20))) if content else ():
            content[place] ^= 1 << int(rng.integers(8))
    file.write_bytes(bytes(content))


def _damage_config(rng: np.random.Generator, file: Path) -> None:
    if file.suffix == ".h5":
        import h5py

        with h5py.File(file, "r+") as opened:
            config = json.loads(opened.attrs["model_config"])
            opened.attrs["model_config"] = json.dumps(_edited(rng, config))
        return
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["config.json"] = json.dumps(_edited(rng, json.loads(members["config.json"]))).encode()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def _edited(rng: np.random.Generator, config: Any) -> Any:
    """A configuration with a value somewhere in it replaced or gone."""
    holders = [config]
    for holder in holders:
        inner = holder.values() if isinstance(holder, dict) else holder
        holders += [value for value in inner if isinstance(value, (dict, list)) and value]
    holder = holders[rng.integers(len(holders))]
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    key = keys[rng.integers(len(keys))]
    if rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = _NASTY[rng.integers(len(_NASTY))]
    return config


def attempt(source: Path) -> str:
    """What comes of rewriting a model: "written", or the message of a RewriteError.

    Raises:
        AssertionError: something is left after an error, or the message is none.
        Exception: any other than a RewriteError.
    """
    import mbn_rewrite as mbn

    out = source.parent / "out"
    try:
        mbn.rewrite_saved_model(source, out, "fold")
    except mbn.RewriteError as error:
        said = str(error)
    else:
        return "written"
    left = sorted(path.name for path in source.parent.iterdir())
    assert left == [source.name], f"left behind: {left}"
    assert said.strip(), "an error without a message"
    return said


def _serve(pipe: Any) -> None:
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")
    while True:
        source = pipe.recv()
        try:
            pipe.send(("", attempt(source)))
        except BaseException as error:
            pipe.send((type(error).__name__, str(error)))


class Attempts:
    """A process that attempts to rewrite models, begun anew where it crashes or hangs.

    Args:
        seconds: how long an attempt may take.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._process: Any = None
        self._place = tempfile.TemporaryDirectory()
        (Path(self._place.name) / "originals").mkdir()
        self._originals = originals(Path(self._place.name) / "originals")

    def check(self, seed: int) -> None:
        """Damages one of the models and attempts to rewrite it.

        Raises:
            AssertionError: something else came of it than a SavedModel or a RewriteError.
        """
        original = self._originals[seed % len(self._originals)]
        with tempfile.TemporaryDirectory(dir=self._place.name) as directory:
            kind, said = self._attempt(damaged(original, Path(directory), seed))
        if kind in ("hung", "crashed"):
            print(f"{kind}: seed {seed} ({original.name}), {said}", flush=True)
        else:
            assert not kind, f"{kind}: {said}"

    def _attempt(self, source: Path) -> tuple[str, str]:
        """What kind of failure came of a model, or "", and what was said."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        self._pipe.send(source)
        try:
            if self._pipe.poll(self._seconds):
                return self._pipe.recv()
            self._end()
            return "hung", f"for {self._seconds:g} seconds"
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            self._end()
            return "crashed", f"with exit code {code}"

    def _end(self) -> None:
        self._process.kill()
        self._process.join()
        self._process = None
