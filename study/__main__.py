"""Modified BatchNormalization in training, against the original: run the study, report on it.

    python -m study run --recipe=RECIPE --results=DIRECTORY [FLAGS]
    python -m study report --results=DIRECTORY [FLAGS]

The question is that of the study Modified Batch Normalization (2019-2020): does statistics of a
sample (strided), or these and a depthwise 1x1 convolution in place of scale and shift (mbn), change
the accuracy or the time of training? A recipe is the study's, or AWS's for ImageNet; all
hyper-parameters and their sources are in study/recipes.py:

    resnet9_cifar10             ResNet9 on CIFAR-10, 24 epochs
    resnet50_imagenette         ResNet50 on Imagenette-320, 10 epochs
    resnet50_imagenet           ResNet50 on ImageNet, 200 epochs ("Bag of Tricks", with mixup)
    resnet50_imagenet_scripts   the same by the scripts in aws-samples, 90 epochs

Runs with the same seed start from the same weights and see the same images in the same order with
the same augmentations, whatever the variant. Each records the operations of BatchNormalization
that a step of it executed; a variant that ran just what the original runs is an error. A run is
kept when it is finished. Interrupt the program as you like: the same command goes on with the first
run that is missing. Started again beside the first, it takes runs that the first has not begun: on
a CPU with two cores, `taskset --cpu-list 0 python -m study run ...` and the same with 1 are faster
than one that has both. The runs of a seed are trained on one device (one core of a CPU is another
than two); on another machine the same command goes on with the seeds that are not begun.

Images come from tensorflow-datasets (pip install tensorflow-datasets), or from a folder with
--data_dir: DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg, or DIR/CLASS/*.jpg.

`report` writes a page, report.md, and its charts into the directory: means, paired differences with
confidence intervals, tests of difference and of equivalence, what the number of runs can show, what
ran, and what was not run.

Examples:
    python -m study run --recipe=resnet9_cifar10 --results=results
    python -m study run --recipe=resnet9_cifar10 --results=small --runs=10 --width=0.25
        --examples=10000 --epochs=8 --batch=128 --data_dir=cifar10
        --variants=original,strided2,strided4,mbn1
    python -m study run --recipe=resnet50_imagenet --results=imagenet
        --dtype=mixed_float16 --keras=keras_3 --data_dir=/data/imagenet
    python -m study report --results=small --margin=1

Exit codes:
    0    done
    1    an error, in one message; every finished run is kept
    130  interrupted; likewise
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["KERAS_BACKEND"] = "tensorflow"

from absl import app, flags

from benchmarks.common.console import progress
from study.errors import StudyError, exit_code
from study.recipes import DTYPES, KERAS, RECIPES, RUNS, VARIANTS

FLAGS = flags.FLAGS
flags.DEFINE_string("results", None, "Directory of the results.")
flags.DEFINE_enum("recipe", None, list(RECIPES), "What to train.")
flags.DEFINE_list(
    "variants",
    list(VARIANTS),
    "original, and strided or mbn with a stride behind it; more may be added to finished ones.",
)
flags.DEFINE_integer("runs", RUNS, "Runs of each variant; seeds 0, 1, ...", lower_bound=1)
flags.DEFINE_integer("epochs", None, "Instead of the recipe's.", lower_bound=1)
flags.DEFINE_integer("batch", None, "Images on one device, instead of the recipe's.", lower_bound=1)
flags.DEFINE_float("width", 1.0, "Channels, times those of the network.", lower_bound=1 / 64)
flags.DEFINE_integer("examples", None, "Training images; by default all.", lower_bound=1)
flags.DEFINE_integer("test_examples", None, "Test images; by default all.", lower_bound=1)
flags.DEFINE_enum("keras", "tf_keras", list(KERAS), "Which Keras trains.")
flags.DEFINE_enum("dtype", "float32", DTYPES, "Policy of Keras.")
flags.DEFINE_integer(
    "devices", None, "GPUs to train on, by default all; without a GPU, parts of the CPU.", 1
)
flags.DEFINE_string("data_dir", None, "A folder with images, instead of tensorflow-datasets.")
flags.DEFINE_string("data_name", None, "What the images are called in the report.")
flags.DEFINE_float("margin", 0.5, "report: accuracy that does not matter, in points.", 0.0)
flags.DEFINE_float("time_margin", 5.0, "report: time that does not matter, in percent.", 0.0)


def run() -> None:
    """Makes the runs that are missing."""
    from mbn_rewrite.cli.quiet import import_tensorflow

    import_tensorflow()
    from study import data, running
    from study.claims import locked
    from study.results import Results
    from study.standing import Standing, order
    from study.training import Setting

    if not FLAGS.recipe:
        raise StudyError(f"--recipe is missing; there are {', '.join(RECIPES)}")
    recipe = RECIPES[FLAGS.recipe]
    variants = running.checked_variants(FLAGS.variants)
    strategy, replicas = _devices(FLAGS.devices)
    setting = Setting(
        recipe=recipe,
        keras=FLAGS.keras,
        dtype=FLAGS.dtype,
        width=FLAGS.width,
        epochs=FLAGS.epochs or recipe.epochs,
        batch=FLAGS.batch or recipe.batch,
        replicas=replicas,
    )
    directory = Path(FLAGS.results)
    directory.mkdir(parents=True, exist_ok=True)
    progress("reading images")
    with locked(
        directory / ".images.lock", lambda: progress("another process reads them: waiting")
    ):
        images = data.load(
            recipe,
            FLAGS.data_dir,
            FLAGS.examples,
            FLAGS.test_examples,
            directory / "images.json",
            progress,
        )
    name = FLAGS.data_name or f"{recipe.images} ({images.source})"
    results = Results(directory, running.configuration(setting, images, name))
    with results.joined():
        made = running.run_missing(setting, images, results, variants, FLAGS.runs, strategy)
    runs = tuple(order(variants, FLAGS.runs))
    standing = Standing(runs, running.device(), results.finished(), results.training())
    progress(f"{standing}; this process made {made}: python -m study report")


def _devices(wanted: int | None) -> tuple[Any, int]:
    """A strategy, where there are several devices; and how many are in use."""
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if gpus and wanted and wanted > len(gpus):
        raise StudyError(f"--devices={wanted}, and TensorFlow sees {len(gpus)} GPUs")
    count = wanted or len(gpus) or 1
    if gpus:
        tf.config.set_visible_devices(gpus[:count], "GPU")
    elif count > 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        parts = [tf.config.LogicalDeviceConfiguration()] * count
        tf.config.set_logical_device_configuration(cpu, parts)
    kind = "GPU" if gpus else "CPU"
    names = [f"{kind}:{i}" for i in range(count)]
    strategy = tf.distribute.MirroredStrategy(names) if count > 1 else None
    return strategy, count


def report() -> None:
    """Writes the page and its charts."""
    try:
        from study import report as page
    except ImportError as error:
        raise StudyError(
            f"a report needs {error.name}: pip install '.[study]' brings it"
        ) from error
    from study.results import Results

    results = Results.open(Path(FLAGS.results))
    path = page.write(results, FLAGS.margin, FLAGS.time_margin)
    print(path.read_text())
    progress(f"written: {path}")


COMMANDS = {f.__name__: f for f in (run, report)}


def main(argv: list[str]) -> int:
    if len(argv) != 2 or argv[1] not in COMMANDS:
        names = " or ".join(COMMANDS)
        progress(f"error: one command is needed, {names}; got {argv[1:]}. --help has examples")
        return 1
    if not FLAGS.results:
        progress("error: --results is missing: the directory of the results")
        return 1
    return exit_code(COMMANDS[argv[1]], Path(FLAGS.results))


if __name__ == "__main__":
    app.run(main)
