"""Ends the command-line tool at random moments, and checks what it says and what it leaves."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf

from mbn_rewrite import output_dir
from tests.support.random_models import K, randomise

TOOL = Path(__file__).resolve().parents[2] / "tools" / "rewrite_savedmodel.py"
# How often each signal is sent, beside the others.
SIGNALS = (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)


class Kills:
    """A small SavedModel to rewrite, over and over.

    Most of the time goes by before the first step, so that moments are drawn step by step.
    """

    def __init__(self) -> None:
        self._work = tempfile.TemporaryDirectory()
        self._place = Path(self._work.name)
        self._temporary = self._place / "temporary"
        self._temporary.mkdir()
        self._source, self._out = self._place / "in", self._place / "out"
        import tf_keras

        x = K.Input((8, 8, 3), name="picture")
        model = tf_keras.Model(x, K.ReLU()(K.BatchNormalization()(K.Conv2D(4, 3)(x))))
        randomise(model, np.random.default_rng(0))
        model.save(self._source, save_format="tf")
        self._seconds = self._undisturbed()
        assert content_of(self._out), "the tool fails undisturbed"

    def check(self, seed: int) -> None:
        """Ends one run; AssertionError says what was not as it should be."""
        rng = random.Random(seed)
        number, overwrite = rng.choice(SIGNALS), rng.random() < 0.5
        shutil.rmtree(self._out, ignore_errors=True)
        if overwrite:
            shutil.copytree(self._source, self._out)
        before = content_of(self._out)
        process = self._started(f"--overwrite={overwrite}")
        # Before that it is the interpreter that starts, and no program of ours.
        wait_for(lambda: process.poll() is not None or heeds(process.pid, signal.SIGTERM))
        step = rng.randrange(len(self._seconds))
        seen = [process.stderr.readline() for _ in range(step)]
        moment = rng.uniform(0, 1.1 * self._seconds[step])
        time.sleep(moment)
        process.send_signal(number)
        out, rest = process.communicate()
        err = "".join([*seen, rest])
        when = f"{moment:.2f} s after line {step}"
        what = f"{number.name} {when}: exit {process.returncode}, {out!r}, {err!r}"
        last = err.rstrip().split("\n")[-1]
        print(
            f"seed {seed}: {number.name} {when}, overwrite={overwrite}: exit {process.returncode}, "
            f"{last}",
            flush=True,
        )
        self._check_said(process.returncode, number, err, before, what)
        self._check_left(number, before, what)

    def _undisturbed(self) -> list[float]:
        """How many seconds go by before each line that is printed, and before the end."""
        times = [time.monotonic()]
        process = self._started()
        while process.stderr.readline():
            times.append(time.monotonic())
        process.communicate()
        times.append(time.monotonic())
        return [after - before for before, after in itertools.pairwise(times)]

    def _started(self, *flags: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, TOOL, *flags, self._source, self._out],
            env=os.environ | {"TMPDIR": str(self._temporary)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def _check_said(self, code: int, number: int, err: str, before: str, what: str) -> None:
        """That it says one line, and that this is so."""
        others = [line for line in err.splitlines() if not line.endswith(" ...")]
        if number == signal.SIGKILL:
            assert code in (0, -signal.SIGKILL), what
            assert not others, what
            return
        assert code in (0, 128 + number), what
        assert len(others) == (code != 0), what
        after = content_of(self._out)
        if others and others[0].endswith(": nothing was written"):
            assert after == before, what
        else:
            assert after not in ("", before), what
            assert not others or others[0].endswith(f"{self._out} was written"), what

    def _check_left(self, number: int, before: str, what: str) -> None:
        """That the output is whole, and that nothing else is left, at once or by the next run."""
        wait_for(lambda: not self._processes())
        if number == signal.SIGKILL:  # a process that is gone may hold its files for a moment yet
            wait_for(lambda: not self._left_by_the_next())
        after = content_of(self._out)
        assert not self._left(), f"{self._left()}: {what}"
        assert after or not before, f"the output is gone: {what}"
        if after not in ("", before):
            loaded = tf.saved_model.load(str(self._out))
            loaded.signatures["serving_default"](picture=tf.zeros([1, 8, 8, 3]))

    def _left(self) -> set[str]:
        """What there is beside the input and the output."""
        names = {path.name for path in self._place.iterdir()} | set(os.listdir(self._temporary))
        return names - {"in", "out", "temporary"}

    def _left_by_the_next(self) -> set[str]:
        """As `_left`, after what a run begins and ends with."""
        tempfile.tempdir = str(self._temporary)
        try:
            output_dir.clean_up(self._place)
        finally:
            tempfile.tempdir = None
        return self._left()

    def _processes(self) -> list[str]:
        """The processes that are left, by what their temporary files are said to be."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if (
                    entry.name.isdigit()
                    and str(self._temporary).encode() in (entry / "environ").read_bytes()
                ):
                    found.append(entry.name)
            except OSError:
                continue
        return found


def content_of(directory: Path) -> str:
    """A checksum of all files in a directory, or "" where there is none."""
    if not directory.exists():
        return ""
    checksum = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            checksum.update(str(path.relative_to(directory)).encode() + path.read_bytes())
    return checksum.hexdigest()


def heeds(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Waits until something holds; AssertionError if it takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)
