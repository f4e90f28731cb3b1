#!/usr/bin/env python3
"""Rewrites the BatchNormalization of a model on disk.

    python tools/rewrite_savedmodel.py [FLAGS] IN OUT

IN is any SavedModel (of TensorFlow 1 or 2, Keras 2 or 3, frozen or not), or a .h5, .hdf5 or
.keras file of tf_keras or Keras 3. OUT is the directory of the SavedModel to write, with the
signatures, methods, assets and tables of IN. IN is never changed; OUT appears only when the
written model was loaded again and every signature gave the outputs of the original.

Examples:
    python tools/rewrite_savedmodel.py saved_model served
    python tools/rewrite_savedmodel.py --dry_run saved_model
    python tools/rewrite_savedmodel.py --batch_size=8 --jit_compile saved_model served
    python tools/rewrite_savedmodel.py --mode=depthwise model.keras served
    python tools/rewrite_savedmodel.py --report=report.json --overwrite model.h5 served
    python tools/rewrite_savedmodel.py --verify_inputs=real_inputs.npz saved_model served
    python tools/rewrite_savedmodel.py --signatures=serving_default --tags=serve in out

Exit codes:
    0    done
    1    the input cannot be read or rewritten, the output cannot be written, or a flag is
         wrong: one line says why
    3    the rewritten model did not give the original's outputs: the numbers are printed,
         nothing is written
    130  interrupted (Ctrl-C): nothing is written
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

# The repository's own package comes first, so that the tool runs without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags

from mbn_rewrite.api import MODES
from mbn_rewrite.errors import RewriteError, cause_of
from mbn_rewrite.exporter import Report, VerificationError, check_paths, rewrite_saved_model
from mbn_rewrite.measuring import DEFAULT_BUDGET, DTYPES
from mbn_rewrite.planner import TRAINING_MODES
from tools.quiet import import_tensorflow

FLAGS = flags.FLAGS
_SERVING = {mode: what for mode, what in MODES.items() if mode not in TRAINING_MODES}
flags.DEFINE_enum(
    "mode", "auto", list(_SERVING), "; ".join(f"{mode}: {what}" for mode, what in _SERVING.items())
)
flags.DEFINE_integer(
    "batch_size", None, "Mode auto: measure calls of so many examples. 1 by default.", lower_bound=1
)
flags.DEFINE_bool("jit_compile", None, "Mode auto: measure the model compiled by XLA.")
flags.DEFINE_enum(
    "dtype",
    None,
    list(DTYPES),
    "Mode auto: measure with TensorFlow's automatic mixed precision (float16 on GPUs, bfloat16 on "
    "CPUs). By default the model computes in the dtypes that it says.",
)
flags.DEFINE_float(
    "budget",
    None,
    f"Mode auto: the most seconds to take for measuring, about. {DEFAULT_BUDGET:g} by default.",
    lower_bound=0.0,
)
flags.DEFINE_bool("dry_run", False, "Print what would be done; OUT is not needed.")
flags.DEFINE_bool("overwrite", False, "Replace OUT if it is a SavedModel.")
flags.DEFINE_string("report", None, "Write decisions and verification to this file, as JSON.")
flags.DEFINE_string(
    "verify_inputs",
    None,
    "Verify with these inputs: an .npz file with an array for each input, by its name, or by "
    "SIGNATURE/NAME where signatures differ. By default inputs are random.",
)
flags.DEFINE_float(
    "tolerance",
    None,
    "The largest error to accept, relative to the largest output. By default what rounding "
    "in the model's dtype explains.",
    lower_bound=0.0,
)
flags.DEFINE_list(
    "signatures",
    None,
    "Carry over these signatures of a SavedModel only. By default all, and the methods that the "
    "loaded object has.",
)
flags.DEFINE_list(
    "tags", None, 'The tags of the graph in a SavedModel that has several. By default "serve".'
)
flags.DEFINE_bool(
    "trusted",
    False,
    "Do all that IN says: run code that a Keras file holds (Lambda layers), and operations that "
    "write or read files or run Python. A model is a program; by default only what is known to "
    "compute is run, and what is not run is not verified.",
)
flags.DEFINE_list(
    "import_modules", [], "Python modules that define the custom layers or operations of IN."
)
flags.DEFINE_bool("quiet", False, "Print errors only.")

EXIT_ERROR, EXIT_DIFFERENT, EXIT_INTERRUPTED = 1, 3, 130


def main(argv: list[str]) -> int:
    try:
        return _run(argv[1:])
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return EXIT_INTERRUPTED
    except VerificationError as error:
        print(f"error: {error}", file=sys.stderr)
        print(error.report, file=sys.stderr)
        _write_report(error.report)
        return EXIT_DIFFERENT
    except RewriteError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR


def _run(paths: list[str]) -> int:
    wanted = "IN" if FLAGS.dry_run else "IN and OUT"
    if len(paths) not in ((1, 2) if FLAGS.dry_run else (2,)):
        raise RewriteError(f"give {wanted} (got {len(paths)} paths); --help has examples")
    source, destination = Path(paths[0]), None if FLAGS.dry_run else Path(paths[1])
    # What is wrong with the paths is said at once: TensorFlow takes seconds to load.
    check_paths(source, destination, FLAGS.overwrite, FLAGS.trusted)
    _check_report(source, destination)
    inputs = _load_inputs(FLAGS.verify_inputs)
    import_tensorflow(quiet_log=not FLAGS["verbosity"].present)
    _import(FLAGS.import_modules)
    report = rewrite_saved_model(
        source,
        destination or "",
        FLAGS.mode,
        FLAGS.overwrite,
        tags=FLAGS.tags,
        signatures=FLAGS.signatures,
        trusted=FLAGS.trusted,
        dry_run=FLAGS.dry_run,
        inputs=inputs,
        tolerance=FLAGS.tolerance,
        batch_size=FLAGS.batch_size,
        jit_compile=FLAGS.jit_compile,
        dtype=FLAGS.dtype,
        budget=FLAGS.budget,
        progress=None if FLAGS.quiet else lambda line: print(f"{line} ...", file=sys.stderr),
    )
    if not FLAGS.quiet:
        print(report)
        print(f"wrote {report.destination}" if report.destination else "dry run: wrote nothing")
    return 0 if _write_report(report) else EXIT_ERROR


def _check_report(source: Path, destination: Path | None) -> None:
    """Raises RewriteError where the report would overwrite a model, or cannot be written."""
    if FLAGS.report is None:
        return
    report = Path(FLAGS.report)
    try:
        place = report.resolve()
        for model in filter(None, (source, destination)):
            if model.resolve() in (place, *place.parents):
                raise RewriteError(f"the report {report} would lie in {model}. Give another path")
        if not FLAGS.report or (place.exists() and not place.is_file()):
            raise RewriteError(f"the report {FLAGS.report!r} is no file. Give another path")
        if not place.parent.is_dir():
            raise RewriteError(f"there is no directory for the report {report}")
    except (OSError, RuntimeError) as error:
        raise RewriteError(f"the report cannot be written: {cause_of(error)}") from error


def _write_report(report: Report) -> bool:
    """Writes the report whole or not at all; says so where it cannot."""
    if not FLAGS.report:
        return True
    place = Path(FLAGS.report).resolve()
    part = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        part.write_text(report.to_json() + "\n")
        part.replace(place)
    except OSError as error:
        part.unlink(missing_ok=True)
        what = f"{report.destination} was written" if report.destination else "done"
        print(f"error: {what}, but the report cannot be: {cause_of(error)}", file=sys.stderr)
        return False
    return True


def _load_inputs(path: str | None) -> dict[str, Any] | None:
    if path is None:
        return None
    import numpy as np

    try:
        with open(path, "rb") as file, np.load(file) as arrays:
            return dict(arrays)
    except Exception as error:  # zip files, pickles and headers fail in many ways
        raise RewriteError(
            f"--verify_inputs: {path} is no .npz file of plain arrays: {cause_of(error)}"
        ) from error


def _import(modules: list[str]) -> None:
    if modules:
        sys.path.append(os.getcwd())
    for module in modules:
        try:
            importlib.import_module(module)
        except (Exception, SystemExit) as error:
            raise RewriteError(f"--import_modules: {module}: {cause_of(error)}") from error


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return FLAGS(argv)
    except flags.Error as error:
        print(f"error: {error}; --help lists the flags", file=sys.stderr)
        sys.exit(EXIT_ERROR)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
