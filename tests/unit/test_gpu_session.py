"""`tools/gpu_session.py`: what it runs, in what order, and within what time."""

import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tools import gpu_session

ROOT = Path(__file__).parents[2]
# A program that keeps a row, and what it does then.
KEEPS = "import os, sys, time; open(sys.argv[-1].split('=')[1], 'w').write('[1]'); "
QUICK = KEEPS + "print(os.environ['KERAS_BACKEND'], *sys.argv[1:-1])"
# Prints what it has when it is interrupted.
ENDLESS = f"""{KEEPS}
try:
    time.sleep(600)
except KeyboardInterrupt:
    print("finished rows")
"""
# Starts a process, says which, and does not listen.
DEAF = f"""{KEEPS}
import signal, subprocess
signal.signal(signal.SIGINT, signal.SIG_IGN)
print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
time.sleep(600)
"""


def lines(path):
    return path.read_text().splitlines()


def test_results_of_each_program_are_kept_as_it_ends(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    programs = {"first": ["-c", QUICK], "second": ["-c", "raise SystemExit(3)"]}
    became = gpu_session.run("jax", 1, Path(tmp_path.name), programs, ["--device=CPU"])
    assert became["first"].startswith("done in ")
    assert became["second"] == "ended with code 3: see second.log"
    assert json.loads((tmp_path / "first.json").read_text()) == [1]
    assert lines(tmp_path / "first.txt")[-1] == "jax --device=CPU"


def test_a_program_has_its_share_and_those_after_it_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_session, "GRACE", 0.5)
    programs = {"endless": ["-c", ENDLESS], "later": ["-c", QUICK]}
    became = gpu_session.run("torch", 4 / 60, tmp_path, programs)
    assert became["endless"].startswith("out of time")
    assert became["later"].startswith("done")
    assert json.loads((tmp_path / "endless.json").read_text()) == [1]
    assert lines(tmp_path / "endless.txt")[-1] == "finished rows"


def test_a_program_that_does_not_end_is_killed_with_what_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_session, "GRACE", 0.5)
    became = gpu_session.run("torch", 2 / 60, tmp_path, {"deaf": ["-c", DEAF]})
    assert became["deaf"].startswith("out of time")
    child = int(lines(tmp_path / "deaf.txt")[-1])
    deadline = time.monotonic() + 20  # a process that was killed takes a while to end
    while _runs(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:  # it is gone
        return False


def test_only_packages_that_are_missing_are_unpacked(tmp_path):
    for package in ("numpy", "no_such_package"):
        with zipfile.ZipFile(tmp_path / f"{package}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{package}/__init__.py", "")
            wheel.writestr(f"{package}-1.0.dist-info/METADATA", "")
    gpu_session.unpack_wheels(tmp_path, tmp_path / "site", "jax")
    assert (tmp_path / "site/no_such_package/__init__.py").exists()
    assert not (tmp_path / "site/numpy").exists()


@pytest.mark.parametrize(("backend", "unpacked"), [("jax", False), ("tensorflow", True)])
def test_tf_keras_is_for_tensorflow_alone(backend, unpacked, tmp_path, monkeypatch):
    def absent(package):
        raise gpu_session.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(gpu_session.metadata, "version", absent)
    with zipfile.ZipFile(tmp_path / "tf_keras-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tf_keras/__init__.py", "")
    gpu_session.unpack_wheels(tmp_path, tmp_path / "site", backend)
    assert (tmp_path / "site/tf_keras").exists() == unpacked


@pytest.mark.parametrize("backend", gpu_session.PROGRAMS)
def test_programs_take_their_flags(backend):
    """By the definitions of flags in the program itself, which needs a backend to run."""
    for command in gpu_session.PROGRAMS[backend].values():
        program = (ROOT / command[0]).read_text()
        names = [flag.removeprefix("--").partition("=")[0] for flag in command[1:]]
        for name in names:
            assert f'"{name.removeprefix("no")}"' in program, name


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--backend=numpy"], "invalid choice: 'numpy'"),
        (["--backend=jax", "--minutes=0"], "--minutes: 0 is no time"),
        (["--backend=jax", "--only=step"], "--only: unknown ['step']; known are layer_float32"),
    ],
)
def test_flags_that_are_wrong_are_said_without_any_package(flags, said):
    command = [sys.executable, "-S", str(ROOT / "tools/gpu_session.py"), "run", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert said in ended.stderr.splitlines()[-1]
