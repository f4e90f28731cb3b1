#!/usr/bin/env python3
"""Measures on a GPU machine, within a time that is given: packs what travels there, and runs it.

    python tools/gpu_session.py pack session.tar --python=3.12     # where this repository is
    tar xf session.tar                                             # on the GPU machine
    python3 mbn_rewrite/tools/gpu_session.py run --backend=jax --minutes=28

The machine needs JAX or torch with CUDA, or TensorFlow, and no network: what else the programs
import travels as wheels, some 20 MB, of which those are used that the machine has not.
`--backend=jax` and `torch` need no TensorFlow.

Programs run in order of worth: layers alone, inference, whole training steps, in float32 and then
with bfloat16. Each has its share of the time that is left, and is interrupted at its end. Results
are in results/BACKEND beside the repository: of each program a table (.txt), what it said (.log),
and JSON, which it writes as it goes, so that finished rows are kept. The last lines say what became
of each. Flags behind `--` go to all programs: to rehearse,

    python3 mbn_rewrite/tools/gpu_session.py run --backend=jax --minutes=6 -- --repeats=2

The standard library is all that this tool needs, since nothing is installed where it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = "mbn_rewrite"
WHEELS = (
    *("keras", "absl-py", "rich", "namex", "optree", "ml_dtypes", "h5py"),
    # What these need.
    *("markdown-it-py", "mdurl", "pygments", "packaging", "typing_extensions"),
    "tf_keras",
)
# Of no use without TensorFlow, which it imports.
FOR_TENSORFLOW = "tf_keras"
PLATFORMS = tuple(f"manylinux{age}_x86_64" for age in ("_2_28", "_2_27", "_2_17", "2014"))
GRACE = 20.0  # seconds for a program that is interrupted to print what it has

_LAYER = ("benchmarks/layer.py", "--batch=64", "--strides=1,2,4,8", "--calls=10")
_NETWORKS = ("--models=ResNet50,MobileNetV2,DenseNet121,EfficientNetB0", "--batch_sizes=1,8,64")
_STEPS = (
    *("benchmarks/train_step.py", "--models=ResNet50", "--batch=64", "--calls=5", "--nomemory"),
    "--variants=original,strided1,strided2,strided4,strided8,none",
)


def _programs(latency: str) -> dict[str, list[str]]:
    """Commands in order of worth, by the names of their tables."""
    return {
        "layer_float32": [*_LAYER],
        "latency_float32": [latency, *_NETWORKS],
        "train_float32": [*_STEPS],
        "layer_bfloat16": [*_LAYER, "--dtype=bfloat16"],
        "latency_mixed_bfloat16": [latency, *_NETWORKS, "--dtype=mixed_bfloat16"],
        "train_mixed_bfloat16": [*_STEPS, "--dtype=mixed_bfloat16"],
    }


PROGRAMS: dict[str, dict[str, list[str]]] = {
    "jax": _programs("benchmarks/backend_latency.py"),
    "torch": _programs("benchmarks/backend_latency.py"),
    "tensorflow": _programs("benchmarks/latency.py"),
}


# ------------------------------------------------------------------------------------ pack


def pack(archive: Path, python: str) -> None:
    """Writes an archive of the repository's last commit, with wheels for a Python.

    Args:
        archive: a .tar file.
        python: the version there, such as "3.12"; the machine is Linux on x86-64.

    Raises:
        subprocess.CalledProcessError: git or pip fails, which have said why.
    """
    repository = _git("archive", f"--prefix={NAME}/", "HEAD")
    changed = _git("status", "--porcelain").decode().splitlines()
    if changed:
        print(f"{len(changed)} changes are not committed, and not packed", file=sys.stderr)
    with tempfile.TemporaryDirectory() as work:
        platforms = [part for name in PLATFORMS for part in ("--platform", name)]
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
                *("--only-binary=:all:", "--implementation=cp", f"--python-version={python}"),
                *(*platforms, "--dest", work, *(_pinned(name) for name in WHEELS)),
            ],
            check=True,
        )
        with tarfile.open(archive, "w") as packed:
            with tarfile.open(fileobj=io.BytesIO(repository)) as files:
                for member in files:
                    packed.addfile(member, files.extractfile(member) if member.isfile() else None)
            for wheel in sorted(Path(work).iterdir()):
                packed.add(wheel, f"{NAME}/wheels/{wheel.name}")
    commit = _git("rev-parse", "--short", "HEAD").decode().strip()
    print(f"{archive}: {archive.stat().st_size / 1e6:.0f} MB, commit {commit}")


def _git(*arguments: str) -> bytes:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout


def _pinned(package: str) -> str:
    """A package in the version that is installed here, if it is."""
    try:
        return f"{package}=={metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return package


# ------------------------------------------------------------------------------------- run


def unpack_wheels(wheels: Path, site: Path, backend: str) -> None:
    """Unpacks those wheels whose packages are not installed, and that a backend has a use for."""
    for wheel in sorted(wheels.glob("*.whl")):
        package, version, *_ = wheel.name.split("-")
        if package == FOR_TENSORFLOW and backend != "tensorflow":
            continue
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            if not any(site.glob(f"{package}-{version}.dist-info")):
                with zipfile.ZipFile(wheel) as files:
                    files.extractall(site)


def run(
    backend: str,
    minutes: float,
    results: Path,
    programs: Mapping[str, Sequence[str]],
    flags: Sequence[str] = (),
) -> dict[str, str]:
    """Runs programs until the time is up; returns what became of each.

    A program has its share of what time is left when it begins, which is the same for all that
    are still to run, so that what one does not use is for those after it.

    Args:
        backend: of Keras.
        minutes: for all of them.
        results: where tables and JSON are written.
        programs: commands, in their order, by the names of their files.
        flags: for all of them.
    """
    end = time.monotonic() + 60 * minutes
    site = ROOT / "site"
    unpack_wheels(ROOT / "wheels", site, backend)
    paths = [str(ROOT), str(site), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "KERAS_BACKEND": backend,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    results = results.resolve()  # programs run elsewhere
    results.mkdir(parents=True, exist_ok=True)
    became: dict[str, str] = {}
    for number, (name, command) in enumerate(programs.items()):
        share = (end - time.monotonic()) / (len(programs) - number)
        print(f"{name}: has {share / 60:.1f} minutes", flush=True)
        full = [sys.executable, *command, *flags, f"--json={results / name}.json"]
        became[name] = _ended(full, environment, results / name, share)
        print(f"{name}: {became[name]}", flush=True)
    return became


def _ended(command: list[str], environment: dict[str, str], path: Path, seconds: float) -> str:
    """Runs a program for so long, and says how it ended.

    Its table goes to a file .txt, and what it says meanwhile to .log. When time is up it is
    interrupted, for it to print what it has; what has not ended soon after is killed, with all
    processes that it has started.
    """
    start = time.monotonic()
    with path.with_suffix(".txt").open("w") as table, path.with_suffix(".log").open("w") as log:
        table.write(f"$ KERAS_BACKEND={environment['KERAS_BACKEND']} {shlex.join(command[1:])}\n")
        table.flush()
        program = subprocess.Popen(
            command, stdout=table, stderr=log, env=environment, cwd=ROOT, start_new_session=True
        )
        try:
            code = program.wait(max(seconds - GRACE, seconds / 2))
            said = f"done in {time.monotonic() - start:.0f} s"
            return said if code == 0 else f"ended with code {code}: see {path.name}.log"
        except subprocess.TimeoutExpired:
            program.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.wait(max(0.0, start + seconds - time.monotonic()))
            return "out of time: what was finished is kept"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
            program.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write what travels")
    packing.add_argument("archive", type=Path)
    packing.add_argument("--python", default="3.12", help="its version there")
    running = commands.add_parser("run", help="measure, on the GPU machine")
    running.add_argument("--backend", choices=list(PROGRAMS), required=True)
    running.add_argument("--minutes", type=float, default=28.0)
    running.add_argument("--results", type=Path, default=ROOT.parent / "results")
    running.add_argument("--only", help="names of programs, with commas between them")
    running.add_argument("flags", nargs="*", help="behind --: flags for the programs")
    chosen = parser.parse_args(arguments)
    if chosen.command == "pack":
        try:
            pack(chosen.archive, chosen.python)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"error: nothing is packed: {error}", file=sys.stderr)
            return 1
        return 0
    programs = PROGRAMS[chosen.backend]
    if chosen.only:
        unknown = [name for name in chosen.only.split(",") if name not in programs]
        if unknown:
            parser.error(f"--only: unknown {unknown}; known are {', '.join(programs)}")
        programs = {name: programs[name] for name in chosen.only.split(",")}
    if chosen.minutes <= 0:
        parser.error(f"--minutes: {chosen.minutes:g} is no time; a number above 0 is needed")
    became = run(
        chosen.backend, chosen.minutes, chosen.results / chosen.backend, programs, chosen.flags
    )
    for name, what in became.items():
        print(f"{name:24} {what}")
    return int(not all(what.startswith("done") for what in became.values()))


if __name__ == "__main__":
    sys.exit(main())
