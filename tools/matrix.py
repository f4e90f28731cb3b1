#!/usr/bin/env python3
"""Runs the fast part of the suite with the oldest and the newest supported TensorFlow.

    python tools/matrix.py                          # all combinations
    python tools/matrix.py --only=oldest-3.10 tests/unit/test_planner.py

Each combination has an environment of its own in build/matrix, made once, and brought up to date
when what setup.cfg asks for changes. A Python that this machine does not have is left out, and the
table says so. The exit code is 1 if tests of a combination failed, or none could be run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path

from absl import app, flags

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mbn_rewrite.tables import table

PLACE = ROOT / "build" / "matrix"
PACKAGES = ("tensorflow", "tf_keras", "keras", "numpy")


@dataclass(frozen=True)
class Combination:
    """A Python, and what is installed in it.

    Attributes:
        age: "oldest" or "newest", of what the package supports.
        python: its version, as in "3.10".
        requirements: of pip, beside what setup.cfg asks for.
    """

    age: str
    python: str
    requirements: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.age}-{self.python}"


# The oldest are those that setup.cfg names.
OLDEST = ("tensorflow==2.16.*", "tf-keras==2.16.*", "keras==3.8.*")
# Their TensorFlow keeps ml_dtypes older than what later versions of onnx use without asking for it.
BESIDE_OLDEST = ("onnx<1.19",)
NEWEST = ("tensorflow", "tf-keras", "keras")
COMBINATIONS = (
    Combination("oldest", "3.10", (*OLDEST, *BESIDE_OLDEST)),
    Combination("newest", "3.10", NEWEST),
    Combination("newest", "3.13", NEWEST),
)

FLAGS = flags.FLAGS
flags.DEFINE_multi_enum(
    "only", None, [one.name for one in COMBINATIONS], "Which combinations; by default all."
)
flags.DEFINE_integer("jobs", 2, "Test processes at a time.", lower_bound=1)


@dataclass(frozen=True)
class Outcome:
    """Outcome of a combination.

    Attributes:
        said: in a few words.
        failed: whether something did not work.
        versions: of PACKAGES, where they are installed.
    """

    said: str
    failed: bool = False
    versions: tuple[str, ...] = ("-",) * len(PACKAGES)


NO_PYTHON = Outcome("left out: this machine has no such Python")


def main(argv: list[str]) -> int:
    names = FLAGS.only or [one.name for one in COMBINATIONS]
    rows, outcomes = [], []
    for one in COMBINATIONS:
        if one.name in names:
            print(f"{one.name} ...", flush=True)
            outcomes.append(outcome_of(one, argv[1:]))
            rows.append([one.name, *outcomes[-1].versions, outcomes[-1].said])
    print(table(["", *PACKAGES, "tests"], rows))
    return int(any(out.failed for out in outcomes) or all(out is NO_PYTHON for out in outcomes))


def outcome_of(one: Combination, tests: list[str]) -> Outcome:
    """Makes the environment of a combination, and runs tests in it."""
    python = next(pythons(one.python), None)
    if python is None:
        return NO_PYTHON
    environment = PLACE / one.name
    if not installed(one, python, environment):
        print(f"see {logged(environment, 'install')}")
        return Outcome("cannot be installed", failed=True)
    python = environment / "bin" / "python"
    versions = tuple(version_of(package, python) for package in PACKAGES)
    command = [python, "-m", "pytest", "-n", str(FLAGS.jobs), "-p", "no:cacheprovider"]
    command += ["-m", "not slow and not network", *tests]
    code, last = run(command, logged(environment, "tests"))
    if code:
        print(f"see {logged(environment, 'tests')}")
    return Outcome(last, code != 0, versions)


def pythons(version: str) -> Iterator[Path]:
    """The Pythons of a version that this machine has, of the system, of pyenv and of uv."""
    found = [shutil.which(f"python{version}")]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found += sorted(pyenv.glob(f"versions/{version}.*/bin/python"), reverse=True)
    if uv := shutil.which("uv"):
        done = subprocess.run([uv, "python", "find", version], capture_output=True, text=True)
        found += done.stdout.split()
    for path in filter(None, found):
        # Of pyenv's own commands some only say that they are not switched on.
        code = f"import sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != {version!r})"
        if subprocess.run([path, "-c", code], capture_output=True).returncode == 0:
            yield Path(path)


def installed(one: Combination, python: Path, environment: Path) -> bool:
    """Whether there is an environment with all that a combination needs, after making it."""
    wanted = "\n".join([*one.requirements, *asked_for()])
    ready = environment / "ready"
    if ready.exists() and ready.read_text() == wanted:
        return True
    PLACE.mkdir(parents=True, exist_ok=True)
    pip = [environment / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check"]
    for command in (
        [python, "-m", "venv", environment],
        [*pip, "--upgrade", *one.requirements, "-e", f"{ROOT}[test]"],
    ):
        if run(command, logged(environment, "install"))[0]:
            return False
    ready.write_text(wanted)
    return True


def asked_for() -> list[str]:
    """Requirements of setup.cfg, to run the package and to test it."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return [setup["options"]["install_requires"], setup["options.extras_require"]["test"]]


def version_of(package: str, python: Path) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or "-"


def logged(environment: Path, what: str) -> Path:
    """The file that holds what was printed."""
    return environment.with_name(f"{environment.name}.{what}.log")


def run(command: list[object], log: Path) -> tuple[int, str]:
    """Runs a program in the checkout; gives its exit code, and the last line that it printed."""
    with open(log, "w") as file:
        done = subprocess.run(
            list(map(str, command)), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
        )
    lines = log.read_text(errors="replace").split("\n")
    last = next((line.strip("= ") for line in reversed(lines) if line.strip()), "")
    return done.returncode, last


if __name__ == "__main__":
    app.run(main)
