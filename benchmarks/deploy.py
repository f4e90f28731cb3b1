#!/usr/bin/env python3
"""Models as they were and rewritten in the runtimes that they are deployed to, in int8, too.

    python benchmarks/deploy.py [FLAGS]

Each model is written as SavedModel, rewritten, and converted to each form:

    litert, litert_float16    LiteRT, in float32, and with weights of float16
    litert_int8               LiteRT in int8, with ranges of activations from calibration images,
                              and a scale for each channel of a kernel; inputs and outputs stay
                              float32
    litert_int8_per_tensor    the same with one scale for all channels of a kernel
    onnx                      ONNX Runtime, by way of tf2onnx
    openvino                  OpenVINO, in float32

Variants are "original", "fold" (mbn_rewrite.rewrite_saved_model), "equalize" (the same with the
scales between layers chosen for int8), and on request "products" (folded, with ReLUs in products,
which LiteRT's int8 kernels take; see deployment/relus.py). fer and ina_* are trained; networks have
random weights and the BatchNormalization statistics of the calibration images; MobileNetV2-like has
channels of very different scales, as trained MobileNets have. Forms whose packages are not
installed are skipped (pip install '.[deploy]').

Columns:
    BN left       BatchNormalizations in what runs, as operations of their own or as arithmetic
    MUL, ADD      operators of the .tflite file that multiply by, or add, a constant per channel
    nodes         operations in what runs that depend on the inputs
    kB            size of the file
    error         root mean square of the difference from the original's outputs in TensorFlow, in
                  float32, relative to how far outputs differ from image to image; that of the
                  median image
    x original    that error, relative to the original's in the same form: below 1 is better
    top-1         on how many of the test images the largest output is the same
    ms            median of the calls with one image, all variants of a form in turn
    faster        times as fast as the original in the same form, with its 95% interval

Images are those of --images, any folder with picture files in it, or made up of random patches.

Examples:
    python benchmarks/deploy.py
    python benchmarks/deploy.py --models=fer,WideResNet-16-4 --images=cifar10 --json=d.json
    python benchmarks/deploy.py --forms=litert_int8,litert_int8_per_tensor --seconds=0 --chart=d.png
    python benchmarks/deploy.py --models=my/saved_model --images=my/pictures

Exit codes:
    0    all rows of ours in float32 are right, whatever became of the others
    1    one of ours is wrong or failed where the original did not; or a flag is wrong
    130  interrupted; --json has what was measured until then
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

# The repository's own package comes first, so that the program runs without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from absl import app, flags

from mbn_rewrite.cli.quiet import import_tensorflow

import_tensorflow()

import tensorflow as tf
import tf_keras

import mbn_rewrite as mbn
from benchmarks.common import results
from benchmarks.common.console import progress
from benchmarks.common.failures import noted
from benchmarks.common.flags import check_known, check_no_arguments, check_outputs
from benchmarks.deployment import forms, images, models
from benchmarks.deployment.tables import draw, model_table, summary
from benchmarks.peer_tools.work import Work
from mbn_rewrite.device import cpu_name
from mbn_rewrite.measurement import ratio
from mbn_rewrite.tuning.timing import time_calls

FLAGS = flags.FLAGS
flags.DEFINE_list(
    "models", list(models.MODELS), f"Of {', '.join(models.MODELS)}; or paths of SavedModels."
)
flags.DEFINE_list("variants", ["original", "fold", "equalize"], f"Of {', '.join(forms.VARIANTS)}.")
flags.DEFINE_list("forms", list(forms.FORMS), f"Of {', '.join(forms.FORMS)}.")
flags.DEFINE_string("images", None, "A folder of images; by default they are made up.")
flags.DEFINE_integer("calibrating", 128, "Images to calibrate with.", lower_bound=1)
flags.DEFINE_integer("testing", 256, "Images to test with, which are others.", lower_bound=2)
flags.DEFINE_float("seconds", 5.0, "How long to time each form; 0 not to.", lower_bound=0.0)
flags.DEFINE_integer("threads", len(os.sched_getaffinity(0)), "Of each runtime.", lower_bound=1)
flags.DEFINE_string("json", None, "Write the results to this file, model by model.")
flags.DEFINE_string("chart", None, "Draw errors in int8 to this PNG file.")


def measured(name: str) -> dict[str, Any]:
    """The rows of a model: by form and variant."""
    progress(f"{name} ...")
    made: dict[str, Any] = {"model": name, "forms": {}}
    notes: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as directory, noted(notes, "model"):
        work = Work(Path(directory))
        models.write(name, work, FLAGS.images, FLAGS.calibrating, FLAGS.testing)
        for form in FLAGS.forms:
            progress(f"  {form}")
            rows: dict[str, dict[str, Any]] = {}
            for variant in FLAGS.variants:
                with noted(rows, variant):
                    rows[variant] = forms.examined(form, variant, work, FLAGS.threads)
            _compare(rows)
            if FLAGS.seconds:
                _time(form, rows, work)
            for row in rows.values():
                row.pop("path", None)  # it is gone with the directory
            made["forms"][form] = rows
    tf_keras.backend.clear_session()
    return made | notes.get("model", {})


def _compare(rows: dict[str, dict[str, Any]]) -> None:
    base = rows["original"].get("error")
    for row in rows.values():
        if base and "error" in row:
            row["x original"] = row["error"] / base


def _time(form: str, rows: dict[str, dict[str, Any]], work: Work) -> None:
    """Times what is right, in turn."""
    calls = {}
    for variant, row in rows.items():
        if "path" in row and not row["WRONG"]:
            with noted(rows, variant):
                calls[variant] = forms.ready(form, variant, row["path"], work, FLAGS.threads)
    seconds = time_calls(calls, FLAGS.seconds)
    for variant, times in seconds.items():
        rows[variant]["ms"] = 1e3 * statistics.median(times)
        if variant != "original" and "original" in seconds:
            rows[variant]["faster"] = asdict(ratio(seconds["original"], times))


def failed(model: dict[str, Any]) -> bool:
    """Whether one of ours is wrong, or fails where the original does not."""
    if "note" in model:
        return True
    return any(
        row.get("WRONG") or ("note" in row and "note" not in rows["original"])
        for rows in model["forms"].values()
        for variant, row in rows.items()
        if variant != "original"
    )


def _check(arguments: list[str]) -> None:
    """Raises ValueError for what is not known, before anything long starts."""
    check_no_arguments(arguments)
    named = [name for name in FLAGS.models if not Path(name).is_dir()]
    check_known("model", named, models.MODELS)
    check_known("variant", FLAGS.variants, list(forms.VARIANTS))
    check_known("form", FLAGS.forms, forms.FORMS)
    FLAGS.variants = list(dict.fromkeys(["original", *FLAGS.variants]))  # others are compared to it
    if FLAGS.images:
        images.check(FLAGS.images, FLAGS.calibrating + FLAGS.testing)
    check_outputs(FLAGS.json, FLAGS.chart)


def _leave_out_what_is_missing() -> None:
    missing = {form: forms.tool(form, "original").missing for form in FLAGS.forms}
    for form, packages in missing.items():
        if packages:
            names = ", ".join(packages)
            progress(f"{form}: {names} not installed, skipped; pip install '.[deploy]'")
    FLAGS.forms = [form for form in FLAGS.forms if not missing[form]]


def main(argv: list[str]) -> int:
    try:
        _check(argv[1:])
    except ValueError as error:
        progress(f"error: {error}")
        return 1
    _leave_out_what_is_missing()
    warnings.filterwarnings("ignore", module="tensorflow.lite")  # the converter's own use of it
    tf.config.set_visible_devices([], "GPU")  # which the other runtimes do not use
    about = {
        "device": cpu_name(),
        "versions": {"mbn_rewrite": mbn.__version__, "tensorflow": tf.__version__},
        "images": Path(FLAGS.images).name if FLAGS.images else "made up",
        "settings": {k: FLAGS[k].value for k in ("calibrating", "testing", "seconds", "threads")},
    }
    done: list[dict[str, Any]] = []
    interrupted = False
    try:
        for name in FLAGS.models:
            done.append(measured(name))
            print(model_table(done[-1]) + "\n", flush=True)
            results.keep(FLAGS.json, about | {"models": done})
    except KeyboardInterrupt:
        interrupted = True
        progress("interrupted: what is finished follows")
    print(summary(done))
    if FLAGS.chart:
        draw(done, FLAGS.chart)
    return 130 if interrupted else int(any(map(failed, done)))


if __name__ == "__main__":
    app.run(main)
