"""Programs of benchmarks/, run as people run them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Runs a program in a process that cannot import TensorFlow.
WITHOUT_TENSORFLOW = """
import runpy, sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec

def hides(cls, name, path=None, target=None):
    hidden = name.partition(".")[0] in ("tensorflow", "tf_keras")
    return None if hidden else find(name, path, target)

PathFinder.find_spec = classmethod(hides)
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_program(name, *arguments):
    """Runs a program to its end; returns its exit code and what it printed on either stream."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.returncode, result.stdout, result.stderr


def run_without_tensorflow(backend, program, *flags):
    """Runs a program on a backend of Keras, where there is no TensorFlow."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TENSORFLOW, str(ROOT / "benchmarks" / program), *flags],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "KERAS_BACKEND": backend},
    )
