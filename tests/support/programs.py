"""Programs of benchmarks/, run as people run them."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_program(name, *arguments):
    """Runs a program to its end; returns its exit code and what it printed on either stream."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.returncode, result.stdout, result.stderr
