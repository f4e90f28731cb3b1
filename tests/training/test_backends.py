"""The training layers of Keras 3 on each of its backends, each in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CHECKS = Path(__file__).with_name("backend_checks.py")
BACKENDS = ("tensorflow", "jax", "torch")


def run_checks(backend, *files, **environment):
    """Runs files of checks under a backend; returns how it ended and what it printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *map(str, files)],
        cwd=CHECKS.parents[2],
        env={**os.environ, "KERAS_BACKEND": backend, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout[-6000:] + done.stderr[-2000:]


def test_backends(tmp_path):
    """One after the other, so that each is compared with those before it."""
    missing = [name for name in BACKENDS if importlib.util.find_spec(name) is None]
    for backend in BACKENDS:
        if backend not in missing:
            more = [CHECKS.with_name(f"{backend}_checks.py")]
            code, printed = run_checks(
                backend, CHECKS, *filter(Path.exists, more), MBN_EXCHANGE=str(tmp_path)
            )
            assert code == 0, f"{backend}: {printed}"
            assert (tmp_path / f"{backend}.npz").exists()
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed; the others are right")
