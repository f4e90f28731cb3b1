#!/usr/bin/env python3
"""This package beside other tools: BatchNormalization left, error and latency, in one run.

    python benchmarks/peers.py [FLAGS]

Each model is written as SavedModel and given to each tool:

    original        TensorFlow as it is, with what Grappler does when it is loaded
    ours_MODE       mbn_rewrite.rewrite_saved_model in each of --modes
    optimize        optimize_for_inference, TensorFlow's tool, on the frozen graph
    kecam           keras_cv_attention_models' convert_to_fused_conv_bn_model, on the model of
                    tf_keras
    batchnorm_folding
                    tensorflow-batchnorm-folding's fold_batchnormalization_layers, on the model
                    of tf_keras
    onnx            tf2onnx, then ONNX Runtime with all of its optimisations
    openvino        OpenVINO's converter and its runtime, in float32
    litert          LiteRT's converter and its runtime, with XNNPACK, in float32
    ours_onnx, ours_openvino, ours_litert
                    our output, mode fold, through each of the last three

Tools whose packages are not installed are skipped (pip install .[peers]). The columns:

    in file         BatchNormalization left in what the tool wrote: fused operations, and those
                    written as arithmetic, computed beforehand or not; bn_count.py says exactly
                    what counts. Per-channel scalings that the original has beside its
                    BatchNormalization (EfficientNet scales its input) are taken off.
    BN left         the same in what runs: of TensorFlow the graphs that its runtime reports of
                    the call, after Grappler and oneDNN's rewriting; of ONNX Runtime its optimised
                    model; of OpenVINO its runtime model; of LiteRT its file. BatchNormalization
                    that runs in another form is in the note: as 1x1 depthwise convolutions, or
                    within a convolution that does it on its way out.
    nodes           operations in what runs that depend on the inputs, whatever they do: those
                    that run in every call
    error           largest difference from the original's outputs, relative to the output's
                    largest magnitude. A tool above the tolerance is WRONG and is not timed.
    ms              of one call: median, and quartiles in brackets
    times as fast   as the original, by the medians
    note            why there is no figure; where another tool is faster than all rows of ours,
                    or than those in TensorFlow ("within scatter" where the quartiles overlap);
                    where it leaves fewer operations that do BatchNormalization than any of ours;
                    where ours has more nodes than the original in the same runtime

"Fewest possible" is what our planner leaves, mode fold: all that it can move exactly.

All run on the CPU. Conversions run in a process each. All that gave right answers are timed in
turn in one process, with --threads threads each, each turn after a short rest and an untimed call,
on the first examples of what they were compared on: images that suit the network's statistics,
values in the range that a trained model reads, or from 0 to 1.

Examples:
    python benchmarks/peers.py
    python benchmarks/peers.py --models=MobileNetV2,fer --keras=tf_keras --json=p.json --chart=p.png
    python benchmarks/peers.py --models=my/saved_model,my/model.keras --tools=ours_fold,onnx

Exit codes:
    0    all rows of ours are right, whatever became of the others
    1    one of ours is wrong or failed, or a model is unknown or could not be written
    130  interrupted; --json has what was measured until then
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

# The repository's own package comes first, so that the tool runs without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from absl import app, flags

import mbn_rewrite as mbn
from benchmarks.common import results
from benchmarks.common.console import progress
from benchmarks.common.flags import check_outputs
from benchmarks.peer_tools import tools as peer_tools
from benchmarks.peer_tools.bn_count import Left
from benchmarks.peer_tools.steps import (
    MORE_NETWORKS,
    NETWORKS,
    StepFailed,
    convert,
    latency,
    make,
    run_step,
    step,
)
from benchmarks.peer_tools.tables import (
    draw,
    heading,
    model_table,
    nodes_table,
    summary_table,
    title_of,
)
from benchmarks.peer_tools.tools import Tool
from mbn_rewrite.device import cpu_name
from mbn_rewrite.errors import RewriteError
from mbn_rewrite.measurement import quartiles
from mbn_rewrite.options import MODES, TRAINING_MODES
from tools import real_models

KERAS = ("tf_keras", "keras_3")
TRAINED = (*real_models.MODELS, *real_models.SAVED_MODELS)
SERVING_MODES = tuple(mode for mode in MODES if mode not in TRAINING_MODES)
PACKAGES = (
    *("tensorflow", "tf_keras", "keras", "numpy", "tf2onnx", "onnx", "onnxruntime", "openvino"),
    *("ai-edge-litert", "keras-cv-attention-models", "tensorflow-batchnorm-folding"),
)

FLAGS = flags.FLAGS
flags.DEFINE_list(
    "models",
    [*NETWORKS, *TRAINED],
    f"Of {', '.join((*NETWORKS, *MORE_NETWORKS, *TRAINED))}; or paths of SavedModels and files "
    "of Keras.",
)
flags.DEFINE_list("keras", list(KERAS), f"Which Keras writes the networks, of {', '.join(KERAS)}.")
flags.DEFINE_list("modes", ["fold", "depthwise"], f"Ours, of {', '.join(SERVING_MODES)}.")
flags.DEFINE_list("tools", None, "Keys of tools to run beside the original. By default all.")
flags.DEFINE_integer("batch", 1, "Examples in a timed call.", lower_bound=1)
flags.DEFINE_integer("repeats", 30, "Timed calls of each.", lower_bound=1)
flags.DEFINE_integer(
    "threads", len(os.sched_getaffinity(0)), "Of each runtime; by default one per core.", 1
)
flags.DEFINE_integer("image_size", None, "Of the networks; by default each network's own.", 32)
flags.DEFINE_string("json", None, "Write the results to this file, as JSON, row by row.")
flags.DEFINE_string("chart", None, "Draw times as fast to this file (.png).")
flags.DEFINE_string("step", None, "Used by the program itself.")
# ------------------------------------------------------------------------------- the program


class Results:
    """All that was measured, on disk as soon as it is known."""

    def __init__(self, path: str | None, tools: Sequence[Tool], skipped: Sequence[str]) -> None:
        self._path = Path(path) if path else None
        self.data: dict[str, Any] = {
            "device": device(),
            "versions": versions(),
            "settings": {
                name: FLAGS[name].value for name in ("batch", "repeats", "threads", "modes")
            },
            "tools": {tool.key: tool.name for tool in tools},
            "skipped": list(skipped),
            "models": [],
        }
        self.write()

    def write(self) -> None:
        """Writes the file whole or not at all."""
        results.keep(self._path, self.data)


def device() -> dict[str, Any]:
    """The machine, in words."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n")
    except OSError:
        lines = []
    facts = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    wide = [f for f in ("avx512f", "avx512_vnni", "avx512_bf16") if f in facts.get("flags", "")]
    return {
        "processor": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "features": wide,
        "oneDNN in TensorFlow": os.environ.get("TF_ENABLE_ONEDNN_OPTS", "as it decides"),
    }


def versions() -> dict[str, str]:
    """The packages that take part, of which some may be missing."""
    found = {"mbn_rewrite": mbn.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def measure(model: dict[str, Any], tools: Sequence[Tool], kept: Results) -> None:
    """Fills in one model: what was planned, a row for each tool, then their latencies."""
    with tempfile.TemporaryDirectory() as directory:
        model |= step(make, model["model"], model["keras"], directory)
        kept.write()
        others = 0
        for tool in tools:
            row = {"tool": tool.key, "ours": tool.is_ours} | _converted(tool, directory)
            if tool.key == "original" and "in_file" in row:
                more = Left(**row["in_file"]).total - model["norms"]
                model["others"] = others = max(0, more)
                model["one_channel"] = max(model["one_channel"], -more)
            for key in {"in_file", "at_run"} & row.keys():
                row[key] = vars(Left(**row[key]).without(others))
            model["rows"].append(row)
            kept.write()
        _add_latencies(model, directory)
        for row in model["rows"]:
            row.pop("path", None)  # it is gone with the directory
        kept.write()


def _converted(tool: Tool, directory: str) -> dict[str, Any]:
    progress(f"  {tool.name}")
    try:
        return step(convert, tool.key, directory, environment=tool.environment)
    except StepFailed as error:
        return {"status": "failed", "reason": str(error), "log": error.log[-4000:]}


def _add_latencies(model: dict[str, Any], directory: str) -> None:
    """Times what is right; where all in one process cannot be, each row says so."""
    rows = [row for row in model["rows"] if row["status"] == "ok"]
    progress("  timing")
    try:
        times = step(latency, directory, *(f"{row['tool']}={row['path']}" for row in rows))
    except StepFailed as error:
        for row in rows:
            row["reason"] = f"not timed: {error}"
        return
    for row in rows:
        if row["tool"] in times["not timed"]:
            row["reason"] = f"not timed: {times['not timed'][row['tool']]}"
    times = times["milliseconds"]
    base = statistics.median(times["original"]) if "original" in times else None
    for row in (row for row in rows if row["tool"] in times):
        lower, median, upper = quartiles(times[row["tool"]])
        row["milliseconds"] = {"median": median, "lower": lower, "upper": upper}
        row["times_as_fast"] = base / median if base else None


# ------------------------------------------------------------------------------------- main


def cases(names: Sequence[str], kerases: Sequence[str]) -> list[dict[str, Any]]:
    """The models to measure: networks once for each Keras."""
    return [
        {"model": name, "keras": keras_name, "rows": []}
        for name in names
        for keras_name in (kerases if name in (*NETWORKS, *MORE_NETWORKS) else [_written_by(name)])
    ]


def _written_by(name: str) -> str:
    if name in real_models.MODELS:
        return "tf_keras"
    if name in real_models.SAVED_MODELS or Path(name).is_dir():
        return "SavedModel"
    from mbn_rewrite.frontends.keras_common.files import package_of

    return "keras_3" if package_of(Path(name)) == "keras" else "tf_keras"


def available(tools: Sequence[Tool], wanted: Sequence[str] | None) -> tuple[list[Tool], list[str]]:
    """The tools to run, and a line for each that would be run if it were installed."""
    asked = [t for t in tools if not wanted or t.key in wanted or t.key == "original"]
    lines = [
        f"{tool.name}: {', '.join(tool.missing)} not installed, skipped; pip install .[peers]"
        for tool in asked
        if tool.missing
    ]
    return [tool for tool in asked if not tool.missing], lines


def wrong_flags(argv: Sequence[str]) -> str:
    """Mistake in the flags, in one line, or ""."""
    known = (*NETWORKS, *MORE_NETWORKS, *TRAINED)
    for what, values, allowed in (
        ("model", [x for x in FLAGS.models if not Path(x).exists()], known),
        ("Keras", FLAGS.keras, KERAS),
        ("mode", FLAGS.modes, SERVING_MODES),
        ("tool", FLAGS.tools or [], [t.key for t in peer_tools.tools(FLAGS.modes or ["fold"], 1)]),
    ):
        unknown = [value for value in values if value not in allowed]
        if unknown:
            return f"unknown {what} {', '.join(unknown)}; there are {', '.join(allowed)}"
    if not FLAGS.modes:
        return f"--modes names no mode; there are {', '.join(SERVING_MODES)}"
    for name in (name for name in FLAGS.models if name not in known):
        try:
            _written_by(name)
        except RewriteError as error:
            return str(error)
    if len(argv) > 1:
        return f"unknown {argv[1:]}; --help lists the flags"
    try:
        check_outputs(FLAGS.json, FLAGS.chart)
    except ValueError as error:
        return str(error)
    return ""


def main(argv: list[str]) -> int:
    if FLAGS.step:
        run_step(FLAGS.step, argv[1:])
        return 0
    mistake = wrong_flags(argv)
    if mistake:
        progress(f"error: {mistake}")
        return 1
    tools, skipped = available(peer_tools.tools(FLAGS.modes, FLAGS.batch), FLAGS.tools)
    for line in skipped:
        progress(line)
    kept = Results(FLAGS.json, tools, skipped)
    failed, interrupted = False, False
    try:
        failed = measure_all(cases(FLAGS.models, FLAGS.keras), tools, kept)
    except KeyboardInterrupt:
        interrupted = True
        progress("interrupted: what is finished follows")
    done = [model for model in kept.data["models"] if "norms" in model]
    names = kept.data["tools"]
    if done:
        print(summary_table(done, names))
        if any(key.startswith("ours_") for key in names):
            print("\n" + nodes_table(done, names) + "\n")
        print(heading(kept.data))
    if done and FLAGS.chart and set(names) - {"original"}:
        draw(done, names, FLAGS.chart)
    return 130 if interrupted else int(failed)


def measure_all(models: Sequence[dict[str, Any]], tools: Sequence[Tool], kept: Results) -> bool:
    """Measures all models, printing a table of each; whether one of ours is wrong or missing."""
    failed = False
    for model in models:
        progress(f"{title_of(model)} ...")
        kept.data["models"].append(model)
        try:
            measure(model, tools, kept)
        except StepFailed as error:
            progress(f"error: {title_of(model)}: {error}")
            model["failed"], failed = str(error), True
            kept.write()
            continue
        print(model_table(model, kept.data["tools"]) + "\n", flush=True)
        failed |= any(row["ours"] and row["status"] != "ok" for row in model["rows"])
    return failed


if __name__ == "__main__":
    app.run(main)
