"""The steps of `peers.py`, each in a process of its own: one that crashes costs no other."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

import mbn_rewrite as mbn
from benchmarks.common.failures import Declined
from benchmarks.common.timing import time_rounds
from benchmarks.models.signatures import made_up, signature_of
from benchmarks.peer_tools.bn_count import one_channel
from benchmarks.peer_tools.converters import last_line
from benchmarks.peer_tools.nodes import nodes_of
from benchmarks.peer_tools.tools import Tool, tools
from benchmarks.peer_tools.work import Work
from mbn_rewrite.cli.quiet import import_tensorflow
from mbn_rewrite.frontends.sample_inputs import is_open, of_batch
from tools import real_models

FLAGS = flags.FLAGS  # those of the program
PROGRAM = Path(__file__).parents[1] / "peers.py"

NETWORKS = (
    *("MobileNetV2", "ResNet50", "EfficientNetB0", "InceptionV3", "DenseNet121", "ResNet50V2"),
    "Xception",
)
# Taken, too, but not by default.
MORE_NETWORKS = ("MobileNet", "MobileNetV3Small", "EfficientNetV2B0", "NASNetMobile")
_PATIENCE = 1800  # seconds that a step may take


def make(name: str, keras_name: str, directory: str) -> dict[str, Any]:
    """Writes the original, inputs for it and the outputs that it gives for them."""
    _start_tensorflow()
    import numpy as np
    import tensorflow as tf

    work = Work(Path(directory))
    inputs = _write_original(name, keras_name, work)
    owner = tf.saved_model.load(str(work.original))  # it holds the variables
    serve = signature_of(owner)
    specs = serve.structured_input_signature[1]
    if inputs is None:
        known = real_models.SAVED_MODELS.get(name)
        low, high = (known.low, known.high) if known else (0.0, 1.0)
        rng = np.random.default_rng(0)
        inputs = {key: made_up(spec, 2, rng, low, high) for key, spec in specs.items()}
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
        "one_channel": one_channel(nodes_of(serve)),
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
    """Has a tool convert the original; what it leaves, and whether its answers are right."""
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
        "nodes": model.nodes,
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
    times = time_rounds(
        calls, FLAGS.repeats, warmup=5, untimed=1, prepare=lambda: time.sleep(0.005)
    )
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
    return next(tool for tool in tools(FLAGS.modes, FLAGS.batch) if tool.key == key)


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
        *(sys.executable, str(PROGRAM), f"--step={function.__name__}"),
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
        reason = answer.get("failed") or last_line(result.stderr)
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
