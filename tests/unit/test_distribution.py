"""What is built to be installed elsewhere: what is in it, and that it runs without the checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import mbn_rewrite

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FILES = ("setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
FOLDERS = ("mbn_rewrite", "tests", "benchmarks", "study", "tools")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel, built of the sdist, and the sdist, built of a copy of the checkout."""
    place = tmp_path_factory.mktemp("distribution")
    copy, into = place / "copy", place / "dist"
    copy.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        unneeded = shutil.ignore_patterns("__pycache__", "results", "data", "golden")
        shutil.copytree(ROOT / name, copy / name, ignore=unneeded)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", into, copy]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = into.glob("*.whl"), into.glob("*.tar.gz")
    return wheel, sdist


def package_files():
    files = [p.relative_to(ROOT) for p in (ROOT / "mbn_rewrite").rglob("*") if p.is_file()]
    return {str(path) for path in files if "__pycache__" not in path.parts}


def test_the_wheel_holds_the_package_alone(built):
    with zipfile.ZipFile(built[0]) as archive:
        names = set(archive.namelist())
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        said = archive.read(entry_points).decode().split()
    assert "mbn_rewrite/py.typed" in package_files()
    assert package_files() == {name for name in names if ".dist-info/" not in name}
    assert said == ["[console_scripts]", "mbn-rewrite", "=", "mbn_rewrite.cli.main:main"]


def test_the_sdist_holds_what_builds_the_package(built):
    with tarfile.open(built[1]) as archive:
        files = [member.name.partition("/")[2] for member in archive if member.isfile()]
    assert {*package_files(), *FILES} <= set(files)
    others = {name.partition("/")[0] for name in files if name not in package_files()}
    assert others == {*FILES, "PKG-INFO", "mbn_rewrite.egg-info"}


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A folder in which the package is installed, without what it needs."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--disable-pip-version-check", "--target", folder, built[0]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["-c", "import mbn_rewrite; print(mbn_rewrite.__file__)"], "mbn_rewrite/__init__.py"),
        (["-m", "mbn_rewrite", "--version"], f"mbn-rewrite {mbn_rewrite.__version__}"),
        (["bin/mbn-rewrite", "--version"], f"mbn-rewrite {mbn_rewrite.__version__}"),
        (["bin/mbn-rewrite", "--help"], "mbn-rewrite saved_model served"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_it_runs_where_it_is_installed(command, said, installed):
    done = subprocess.run(
        [sys.executable, *command],
        cwd=installed,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert said in done.stdout


def test_the_installed_command_has_its_work_done(installed, tmp_path):
    """A file is refused by the process that works, before it loads TensorFlow."""
    (tmp_path / "model.h5").write_text("no model")
    done = subprocess.run(
        [sys.executable, installed / "bin" / "mbn-rewrite", "--dry-run", "model.h5"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "neither an HDF5 file" in done.stderr
