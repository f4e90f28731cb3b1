"""Images: from a folder with a folder for each class, or from tensorflow-datasets.

Of tensorflow-datasets, the first of all are taken, whatever their classes; see `image_folder` for
what is taken of a folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf

from study.errors import StudyError
from study.image_folder import from_folder
from study.images import Data, Part
from study.recipes import Recipe

_MOST_NAMED = 20  # corrupt images in a message; the results name all


def load(
    recipe: Recipe,
    data_dir: str | None,
    examples: int | None,
    test_examples: int | None,
    known: Path | None = None,
    say: Callable[[str], None] = print,
) -> Data:
    """The images of a recipe.

    Args:
        recipe: what they are for.
        data_dir: a folder; None for tensorflow-datasets.
        examples, test_examples: how many; None for all.
        known: a file to keep what was found out about images that are not held in memory.
        say: for warnings.

    Raises:
        StudyError: there are none, or not enough.
    """
    if data_dir is None:
        return _from_tfds(recipe, examples, test_examples)
    data = from_folder(recipe, Path(data_dir), examples, test_examples, known)
    for path in data.corrupt[:_MOST_NAMED]:
        say(f"corrupt, left out: {path}")
    if data.corrupt:
        more = len(data.corrupt) - _MOST_NAMED
        say(f"{len(data.corrupt)} corrupt images left out" + (f" ({more} more)" * (more > 0)))
    return data


def _from_tfds(recipe: Recipe, examples: int | None, test_examples: int | None) -> Data:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise StudyError(
            "without --data_dir, images come from tensorflow-datasets, which is not installed: "
            "pip install tensorflow-datasets, or give --data_dir a folder of class folders"
        ) from error
    try:
        builder = tfds.builder(recipe.dataset)
        builder.download_and_prepare()
        for flag, split, count in (
            ("examples", "train", examples),
            ("test_examples", recipe.test_split, test_examples),
        ):
            there = builder.info.splits[split].num_examples
            if count is not None and count > there:
                raise StudyError(f"--{flag}={count}, and {recipe.dataset} has {there} in {split}")
        parts = [
            _tfds_part(tfds, builder, split if count is None else f"{split}[:{count}]", recipe)
            for split, count in (("train", examples), (recipe.test_split, test_examples))
        ]
    except StudyError:
        raise
    except Exception as error:  # whatever a download or a missing archive ends in
        cause = str(error).strip().split("\n")[0][:200]
        raise StudyError(
            f"tensorflow-datasets could not give {recipe.dataset}: {type(error).__name__}: {cause}."
            " --data_dir takes the images from a folder of class folders"
        ) from error
    source = f"tensorflow-datasets {builder.info.full_name}"
    digest = hashlib.sha256(f"{source} {examples} {test_examples}".encode()).hexdigest()[:16]
    classes = tuple(builder.info.features["label"].names)
    splits = builder.info.splits
    available = splits["train"].num_examples, splits[recipe.test_split].num_examples
    return Data(parts[0], parts[1], classes, source, (), available, digest)


def _tfds_part(tfds: Any, builder: Any, split: str, recipe: Recipe) -> Part:
    size = builder.info.splits[split].num_examples
    if recipe.decoded:
        both = tfds.as_numpy(builder.as_dataset(split=split, batch_size=-1, as_supervised=True))
        return Part.of_arrays(*both)
    images = builder.as_dataset(
        split=split, as_supervised=True, decoders={"image": tfds.decode.SkipDecoding()}
    )
    return Part(images.map(lambda data, label: (data, tf.cast(label, tf.int32))), None, size)
