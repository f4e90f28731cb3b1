#!/usr/bin/env python3
"""This package beside other tools: BatchNormalization left, error and latency, in one run.

    python benchmarks/peers.py [FLAGS]

Each model is written as SavedModel and given to each tool:

    original        TensorFlow as it is, with what Grappler does when it is loaded
    ours_MODE       mbn_rewrite.rewrite_saved_model in each of --modes
    optimize        optimize_for_inference, TensorFlow's tool, on the frozen graph
    kecam           keras_cv_attention_models' convert_to_fused_conv_bn_model, on the model of
                    tf_keras
    onnx            tf2onnx, then ONNX Runtime with all of its optimisations
    openvino        OpenVINO's converter and its runtime, in float32
    ours_onnx, ours_openvino
                    our output, mode fold, through either of the last two

Tools whose packages are not installed are skipped (pip install .[peers]). The columns:

    in file         BatchNormalization left in what the tool wrote: fused operations, and those
                    written as arithmetic, computed beforehand or not; bn_count.py says exactly
                    what counts. Per-channel scalings that the original has beside its
                    BatchNormalization (EfficientNet scales its input) are taken off.
    BN left         the same in what runs: of TensorFlow the graphs that its runtime reports of
                    the call, after Grappler and oneDNN's rewriting; of ONNX Runtime its optimised
                    model; of OpenVINO its runtime model. BatchNormalization that runs in another
                    form is in the note: as 1x1 depthwise convolutions, or within a convolution
                    that does it on its way out.
    error           largest difference from the original's outputs, relative to the output's
                    largest magnitude. A tool above the tolerance is WRONG and is not timed.
    ms              of one call: median, and quartiles in brackets
    times as fast   as the original, by the medians
    note            why there is no figure; where another tool is faster than all rows of ours,
                    or than those in TensorFlow ("within scatter" where the quartiles overlap);
                    where it leaves fewer operations that do BatchNormalization than any of ours

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

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

# The repository's own package comes first, so that the tool runs without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from absl import app, flags

import mbn_rewrite as mbn
from benchmarks import charts, peer_tools, results
from benchmarks.bn_count import Left, one_channel
from benchmarks.peer_tools import Declined, Tool, Work
from benchmarks.timing import interleaved
from mbn_rewrite.cli.quiet import import_tensorflow
from mbn_rewrite.device import cpu_name
from mbn_rewrite.errors import RewriteError
from mbn_rewrite.frontends.sample_inputs import is_open, of_batch
from mbn_rewrite.measurement import quartiles
from mbn_rewrite.options import MODES, TRAINING_MODES
from mbn_rewrite.tables import table
from tools import real_models

NETWORKS = (
    *("MobileNetV2", "ResNet50", "EfficientNetB0", "InceptionV3", "DenseNet121", "ResNet50V2"),
    "Xception",
)
# Taken, too, but not by default.
MORE_NETWORKS = ("MobileNet", "MobileNetV3Small", "EfficientNetV2B0", "NASNetMobile")
KERAS = ("tf_keras", "keras_3")
TRAINED = (*real_models.MODELS, *real_models.SAVED_MODELS)
SERVING_MODES = tuple(mode for mode in MODES if mode not in TRAINING_MODES)
PACKAGES = (
    *("tensorflow", "tf_keras", "keras", "numpy", "tf2onnx", "onnx", "onnxruntime", "openvino"),
    "keras-cv-attention-models",
)
_PATIENCE = 1800  # seconds that a step may take

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

# ---------------------------------------------------------------- steps, each in its process


def make(name: str, keras_name: str, directory: str) -> dict[str, Any]:
    """Writes the original, inputs for it and the outputs that it gives for them."""
    _start_tensorflow()
    import numpy as np
    import tensorflow as tf

    work = Work(Path(directory))
    inputs = _write_original(name, keras_name, work)
    owner = tf.saved_model.load(str(work.original))  # it holds the variables
    serve = peer_tools.signature_of(owner)
    specs = serve.structured_input_signature[1]
    if inputs is None:
        known = real_models.SAVED_MODELS.get(name)
        low, high = (known.low, known.high) if known else (0.0, 1.0)
        rng = np.random.default_rng(0)
        inputs = {key: peer_tools.made_up(spec, 2, rng, low, high) for key, spec in specs.items()}
    elif not isinstance(inputs, dict):
        inputs = {key: np.asarray(inputs) for key in specs}
    outputs = serve(**{key: tf.constant(array) for key, array in inputs.items()})
    np.savez(work.inputs, **inputs)
    sizes = {key: FLAGS.batch if is_open(spec.shape) else None for key, spec in specs.items()}
    np.savez(work.timed, **{key: of_batch(inputs[key], size) for key, size in sizes.items()})
    np.savez(work.outputs, **{key: outputs[key].numpy() for key in sorted(outputs)})
    nothing = work.directory / "nothing"
    plan = mbn.rewrite_saved_model(work.original, nothing, "fold", dry_run=True).plan
    return {
        "norms": len(plan.decisions),
        "fewest": plan.left,
        "one_channel": one_channel(peer_tools.nodes_of(serve)),
    }


def _write_original(name: str, keras_name: str, work: Work) -> Any:
    """Writes a model; gives inputs that suit it, if any are known."""
    import numpy as np
    import tf_keras

    from benchmarks.models import networks

    if name in (*NETWORKS, *MORE_NETWORKS):
        model = networks.build(name, 0, FLAGS.image_size)
        rng = np.random.default_rng(0)
        networks.set_statistics(model, networks.typical_statistics, rng)
        # Noise is far from what the statistics were made for, and is amplified beyond measure.
        images = networks.random_images(model, rng)
        if keras_name == "keras_3":
            import keras

            other = networks.build(name, 0, FLAGS.image_size, keras)
            other.set_weights(model.get_weights())
            other.export(work.original, verbose=False)
        else:
            _write_tf_keras(model, work)
        return images
    if name in real_models.MODELS:
        model = networks.real_model(name)
        _write_tf_keras(model, work)
        return networks.real_inputs(name, model, 0)["real"]
    source = real_models.fetch(name) if name in real_models.SAVED_MODELS else Path(name)
    if source.is_dir():
        shutil.copytree(source, work.original)
    elif keras_name == "keras_3":
        import keras

        keras.models.load_model(source, compile=False).export(work.original, verbose=False)
    else:
        _write_tf_keras(tf_keras.models.load_model(source, compile=False), work)
    return None


def _write_tf_keras(model: Any, work: Work) -> None:
    model.save(work.original, save_format="tf")
    model.save(work.keras_file, save_format="h5")


def convert(key: str, directory: str) -> dict[str, Any]:
    """What a tool makes of the original: what it leaves, and whether its answers are right."""
    _start_tensorflow()
    return examined(_tool(key), Work(Path(directory)), FLAGS.threads)


def examined(tool: Tool, work: Work, threads: int) -> dict[str, Any]:
    """Has a tool convert the original, and compares what it gives with the original's outputs."""
    import numpy as np

    from mbn_rewrite.comparison import compare_outputs, tolerance_for

    inputs, expected = (dict(np.load(path)) for path in (work.inputs, work.outputs))
    path = tool.convert(work)
    model = tool.runtime(path, inputs, list(expected), threads)
    tolerance = tolerance_for({array.dtype.name for array in expected.values()})
    comparison = compare_outputs(list(expected.values()), model(), tolerance)
    return {
        "status": "ok" if comparison.ok else "WRONG",
        "reason": comparison.note,
        "path": str(path),
        "in_file": vars(model.in_file),
        "at_run": vars(model.at_run),
        "error": comparison.to_dict()["max_rel_error"],
        "tolerance": tolerance,
    }


def latency(directory: str, *tools_and_paths: str) -> dict[str, Any]:
    """Times models in turn; milliseconds of each, by the keys of their tools."""
    _start_tensorflow()
    import numpy as np

    work = Work(Path(directory))
    outputs = list(np.load(work.outputs))
    inputs = dict(np.load(work.timed))
    calls, failed = {}, {}
    for key, _, path in (pair.partition("=") for pair in tools_and_paths):
        try:
            call = _tool(key).runtime(Path(path), inputs, outputs, FLAGS.threads)
            call()
            calls[key] = call
        except Exception as error:
            failed[key] = f"{type(error).__name__}: {_first_line(error)}"
    # Runtimes in one process hinder each other: two of ONNX Runtime's, with the same graph, were
    # apart by a factor of 4 without the rest and the untimed call.
    times = interleaved(calls, FLAGS.repeats, warmup=5, untimed=1, pause=0.005)
    return {
        "milliseconds": {key: [1e3 * s for s in seconds] for key, seconds in times.items()},
        "not timed": failed,
    }


def _start_tensorflow() -> None:
    import_tensorflow()
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # which the other runtimes do not use
    tf.config.threading.set_intra_op_parallelism_threads(FLAGS.threads)
    tf.config.threading.set_inter_op_parallelism_threads(FLAGS.threads)


def _tool(key: str) -> Tool:
    return next(tool for tool in peer_tools.tools(FLAGS.modes, FLAGS.batch) if tool.key == key)


STEPS: dict[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function for function in (make, convert, latency)
}


class StepFailed(Exception):  # noqa: N818 - it is told to the reader of the table
    """A step did not end well; the message is one line, `log` is all that it wrote."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


def step(
    function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Runs a step in a process of its own.

    Raises:
        StepFailed: it failed, was killed, or takes too long.
    """
    passed = ["modes", "batch", "repeats", "threads"] + ["image_size"] * bool(FLAGS.image_size)
    values = {name: FLAGS[name].value for name in passed}
    command = [
        *(sys.executable, __file__, f"--step={function.__name__}"),
        *(f"--{k}={','.join(v) if isinstance(v, list) else v}" for k, v in values.items()),
        *map(str, arguments),
    ]
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=_PATIENCE,
            env={**os.environ, **(environment or {})},
        )
    except subprocess.TimeoutExpired as error:
        raise StepFailed(f"it took longer than {_PATIENCE} s") from error
    if result.returncode < 0:
        how = signal.Signals(-result.returncode).name
        raise StepFailed(f"its process was ended by {how}", result.stderr)
    answer = json.loads(result.stdout.strip().split("\n")[-1]) if not result.returncode else {}
    if answer.get("status") == "declined" and function is not convert:
        raise StepFailed(answer["reason"])
    if "failed" in answer or result.returncode:
        reason = answer.get("failed") or peer_tools.last_line(result.stderr)
        raise StepFailed(reason, result.stderr)
    return dict(answer)


def run_step(name: str, arguments: Sequence[str]) -> None:
    """Does a step in this process, and prints its answer as last line."""
    try:
        answer = STEPS[name](*arguments)
    except Declined as error:
        answer = {"status": "declined", "reason": str(error)}
    except Exception as error:
        traceback.print_exc()
        answer = {"failed": f"{type(error).__name__}: {_first_line(error)}"}
    print(f"\n{json.dumps(answer)}")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    return lines[0][:300] if lines else "no reason given"


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
        if self._path is None:
            return
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
    print(f"  {tool.name}", file=sys.stderr, flush=True)
    try:
        return step(convert, tool.key, directory, environment=tool.environment)
    except StepFailed as error:
        return {"status": "failed", "reason": str(error), "log": error.log[-4000:]}


def _add_latencies(model: dict[str, Any], directory: str) -> None:
    """Times what is right; where all in one process cannot be, each row says so."""
    rows = [row for row in model["rows"] if row["status"] == "ok"]
    print("  timing", file=sys.stderr, flush=True)
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


# -------------------------------------------------------------------------------- for people


def notes(row: dict[str, Any], rows: Sequence[dict[str, Any]], one_channel: int = 0) -> list[str]:
    """What a reader should not miss about a row.

    Args:
        row: of one tool.
        rows: all of the same model.
        one_channel: how many BatchNormalizations of it are not counted in every form.
    """
    found = [row["reason"]] if row.get("reason") else []
    if "at_run" not in row:
        return found
    left = Left(**row["at_run"])
    found += [f"{left.depthwise} as 1x1 depthwise"] if left.depthwise else []
    found += [f"{left.within} within other operations"] if left.within else []
    found += [f"{left.unseen} calls not looked into"] if left.unseen else []
    if row["ours"] or row["tool"] == "original" or row["status"] != "ok":
        return found
    ours = [other for other in rows if other["ours"] and other["status"] == "ok"]
    found += _faster(row, [other for other in ours if other.get("milliseconds")])
    fewest = min((Left(**other["at_run"]).operations for other in ours), default=0)
    if left.operations + one_channel < fewest:
        found.append("FEWER LEFT than ours")
    return found


def _faster(row: dict[str, Any], ours: Sequence[dict[str, Any]]) -> list[str]:
    """Whether a row is faster than ours, and than which of them."""
    if "milliseconds" not in row or not ours:
        return []
    groups = {
        "ours": ours,
        "ours in TensorFlow": [o for o in ours if o["tool"] not in ("ours_onnx", "ours_openvino")],
    }
    for name, group in groups.items():
        if not group:
            continue
        best = min((o["milliseconds"] for o in group), key=lambda ms: ms["median"])
        if row["milliseconds"]["median"] < best["median"]:
            apart = row["milliseconds"]["upper"] < best["lower"]
            return [f"FASTER than {name}" + ("" if apart else ", within scatter")]
    return []


def as_cells(row: dict[str, Any], model: dict[str, Any], name: str) -> list[str]:
    """A row of a model's table as text."""
    ms, error = row.get("milliseconds"), row.get("error")
    counts = [str(Left(**row[key]).total) if key in row else "-" for key in ("in_file", "at_run")]
    timed = f"{ms['median']:.2f} ({ms['lower']:.2f}-{ms['upper']:.2f})" if ms else "-"
    return [
        name,
        *counts,
        "-" if error is None else f"{float(error):.0e}" if float(error) else "0",
        timed if row["status"] == "ok" else row["status"],
        f"{row['times_as_fast']:.2f}" if row.get("times_as_fast") else "-",
        "; ".join(notes(row, model["rows"], model.get("one_channel", 0))),
    ]


def title_of(model: dict[str, Any]) -> str:
    """A model's name, and who wrote it."""
    return f"{Path(model['model']).name}, {model['keras']}"


def model_table(model: dict[str, Any], names: Mapping[str, str]) -> str:
    """The table of one model."""
    title = f"{title_of(model)}: {model['norms']} BatchNormalization, fewest possible "
    title += str(model["fewest"])
    if model.get("others"):
        title += f" ({model['others']} other per-channel scalings are not counted)"
    if model.get("one_channel"):
        title += f" ({model['one_channel']} of one channel, counted only as fused operation)"
    columns = ["tool", "in file", "BN left", "error", "ms", "times as fast", "note"]
    cells = (as_cells(row, model, names[row["tool"]]) for row in model["rows"])
    return table(columns, cells, title, width=140)


def summary_table(models: Sequence[dict[str, Any]], names: Mapping[str, str]) -> str:
    """All models: times as fast, with what is left in brackets."""

    def cell(model: dict[str, Any], key: str) -> str:
        row = next((r for r in model["rows"] if r["tool"] == key), None)
        if row is None or row["status"] != "ok":
            return row["status"] if row else "-"
        left = Left(**row["at_run"])
        forms = [str(left.total)]
        forms += [f"{left.depthwise}d"] if left.depthwise else []
        forms += [f"{left.within}w"] if left.within else []
        speed = f"{row['times_as_fast']:.2f}" if row.get("times_as_fast") else "-"
        return f"{speed} ({' + '.join(forms)})"

    rows = [
        [title_of(model), str(model["fewest"]), *(cell(model, key) for key in names)]
        for model in models
    ]
    title = (
        "times as fast as the original (BN left; d: as 1x1 depthwise, w: within other operations)"
    )
    return table(["model", "fewest", *names], rows, title, width=180)


def draw(models: Sequence[dict[str, Any]], names: Mapping[str, str], path: str) -> None:
    """A chart: for each model a group of bars, one for each tool."""
    keys = [key for key in names if key != "original"]
    height = 0.8 / len(keys)
    figure = charts.figure_of(9, 1.2 + len(models) * (0.3 + 0.18 * len(keys)))
    axes = figure.subplots()
    for i, key in enumerate(keys):
        places = [m - 0.4 + height * (i + 0.5) for m in range(len(models))]
        found = [next((r for r in m["rows"] if r["tool"] == key), {}) for m in models]
        widths = [row.get("times_as_fast") or 0 for row in found]
        axes.barh(places, widths, 0.9 * height, label=names[key], color=f"C{i}")
        for place, width, row in zip(places, widths, found, strict=True):
            text = f" {width:.2f}" if width else f" {row.get('status', '')}"
            axes.text(width, place, text, va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(models)), [title_of(model) for model in models])
    axes.invert_yaxis()
    axes.margins(x=0.08, y=0.01)
    axes.set_xlabel("times as fast as the original in TensorFlow (line at 1)")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    charts.save(figure, path)


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
    """What is wrong with the flags, in one line, or ""."""
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
        if FLAGS.json:
            results.check_writable(FLAGS.json)
        if FLAGS.chart:
            results.check_writable(FLAGS.chart)
            charts.check_available("--chart")
    except ValueError as error:
        return str(error)
    return ""


def main(argv: list[str]) -> int:
    if FLAGS.step:
        run_step(FLAGS.step, argv[1:])
        return 0
    mistake = wrong_flags(argv)
    if mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 1
    tools, skipped = available(peer_tools.tools(FLAGS.modes, FLAGS.batch), FLAGS.tools)
    for line in skipped:
        print(line, file=sys.stderr)
    kept = Results(FLAGS.json, tools, skipped)
    failed, interrupted = False, False
    try:
        failed = measure_all(cases(FLAGS.models, FLAGS.keras), tools, kept)
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted: what is finished follows", file=sys.stderr)
    done = [model for model in kept.data["models"] if "norms" in model]
    names = kept.data["tools"]
    if done:
        print(summary_table(done, names))
        print(heading(kept.data))
    if done and FLAGS.chart and set(names) - {"original"}:
        draw(done, names, FLAGS.chart)
    return 130 if interrupted else int(failed)


def measure_all(models: Sequence[dict[str, Any]], tools: Sequence[Tool], kept: Results) -> bool:
    """Measures all models, printing a table of each; whether one of ours is wrong or missing."""
    failed = False
    for model in models:
        print(f"{title_of(model)} ...", file=sys.stderr, flush=True)
        kept.data["models"].append(model)
        try:
            measure(model, tools, kept)
        except StepFailed as error:
            print(f"error: {title_of(model)}: {error}", file=sys.stderr)
            model["failed"], failed = str(error), True
            kept.write()
            continue
        print(model_table(model, kept.data["tools"]) + "\n", flush=True)
        failed |= any(row["ours"] and row["status"] != "ok" for row in model["rows"])
    return failed


def heading(data: Mapping[str, Any]) -> str:
    """Where and with what it was measured."""
    machine, settings = data["device"], data["settings"]
    features = ", ".join(machine["features"]) or "no AVX-512"
    packages = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    return (
        f"{machine['processor']} ({features}), {settings['threads']} threads of "
        f"{machine['cores']} cores, batch {settings['batch']}, {settings['repeats']} calls each\n"
        f"{packages}"
    )


if __name__ == "__main__":
    app.run(main)
