"""Recipes of training, one for each question of the study Modified Batch Normalization.

Sources:
    the study   Modified Batch Normalization (2019-2020), its set-up as far as it was recorded
    DAWNBench   David Page's ResNet entry for CIFAR-10, "How to Train Your ResNet" (2018), on which
                the study's ResNet9 was modelled; used where the study's record is silent
    tricks      He et al. of Amazon Web Services, "Bag of Tricks for Image Classification with
                Convolutional Neural Networks" (2019, arXiv:1812.01187), and the commands published
                with GluonCV's ImageNet models
    scripts     aws-samples/deep-learning-models on GitHub, models/resnet/tensorflow (2018-2019)
    ours        chosen here, where no source says anything

A batch is that of one device. The learning rate is for `batch` on one device and grows in
proportion with the images of a step (Goyal et al., 2017), be it by more devices or by --batch. A
warm-up, or the rise of a cycle, keeps its share of the epochs when --epochs makes training shorter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

KERAS = {"tf_keras": "tf_keras", "keras_3": "keras"}  # packages by the names on command lines
DTYPES = ("float32", "mixed_float16", "mixed_bfloat16")  # policies of Keras
RUNS = 30  # of each variant in the study
VARIANTS = ("original", "strided2", "strided4", "strided8", "mbn1", "mbn2", "mbn4", "mbn8")


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters.

    Attributes:
        name: as on the command line.
        network: "ResNet9" or "ResNet50".
        dataset: its name in tensorflow-datasets.
        test_split: of that data set, for accuracy.
        images: what it is called in reports.
        size: height and width of the network's input, in pixels.
        decoded: whether all images are held in memory, decoded, at `size`.
        mean, std: of each colour channel, taken off and divided by, in steps of 256.
        batch: images of a step on one device.
        epochs: passes over the training images.
        learning_rate: its peak.
        schedule: the way down from the peak to 0, after a linear way up: linear ("one_cycle"), by a
            cosine ("cosine") or by (1 - done)^2 ("squared").
        warmup: epochs until the peak.
        momentum: of SGD, in Nesterov's form.
        l2: the loss has `l2` times the sum of squares of all kernels, and of nothing else.
        label_smoothing: the share of a label that goes to all classes alike.
        mixup: alpha of the Beta distribution that pairs of images are mixed by; 0 for none.
        augmentation: "shifted" (padded by reflection, cropped, flipped, with a hole cut out) or
            "resized_crop" (a random part of 8% to 100% of the area with a ratio of sides of 3/4 to
            4/3, resized to `size`, and flipped).
        padding, hole: of "shifted": pixels on each side; side of the hole in pixels.
        kept_at_test: of the shorter side, how much the central crop takes that is tested.
        zero_gamma: whether the last gamma of each residual block starts at 0.
        norm_momentum, norm_epsilon: of BatchNormalization.
    """

    name: str
    network: str
    dataset: str
    test_split: str
    images: str
    size: int
    decoded: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    batch: int
    epochs: int
    learning_rate: float
    schedule: str
    warmup: float
    momentum: float
    l2: float
    label_smoothing: float
    mixup: float
    augmentation: str
    padding: int
    hole: int
    kept_at_test: float
    zero_gamma: bool
    norm_momentum: float
    norm_epsilon: float


RESNET9_CIFAR10 = Recipe(
    name="resnet9_cifar10",
    network="ResNet9",
    dataset="cifar10",
    test_split="test",
    images="CIFAR-10",
    size=32,
    decoded=True,
    mean=(125.31, 122.95, 113.87),  # DAWNBench, as the next
    std=(62.99, 62.09, 66.70),
    batch=512,  # the study, as all below but for those marked
    epochs=24,
    learning_rate=0.4,
    schedule="one_cycle",
    warmup=5,  # DAWNBench
    momentum=0.9,
    l2=1e-4,
    label_smoothing=0.0,  # not named by the study
    mixup=0.0,  # likewise
    augmentation="shifted",
    padding=4,  # DAWNBench
    hole=8,  # DAWNBench
    kept_at_test=1.0,
    zero_gamma=False,
    norm_momentum=0.9,
    norm_epsilon=1e-5,
)

# Amazon's: the means and deviations of "tricks".
_IMAGENET_MEAN = (123.68, 116.779, 103.939)
_IMAGENET_STD = (58.393, 57.12, 57.375)

RESNET50_IMAGENETTE = Recipe(
    name="resnet50_imagenette",
    network="ResNet50",
    dataset="imagenette/320px-v2",
    test_split="validation",
    images="Imagenette-320",
    size=224,  # the study
    decoded=False,
    mean=_IMAGENET_MEAN,
    std=_IMAGENET_STD,
    batch=32,  # the study
    epochs=10,  # the study
    learning_rate=0.0125,  # ours: 0.1 for 256 images, in proportion
    schedule="one_cycle",  # ours: as ResNet9
    warmup=2,  # ours: the share that ResNet9 has
    momentum=0.9,  # ours, as all below: as ResNet9 or as ResNet50 on ImageNet
    l2=1e-4,
    label_smoothing=0.0,
    mixup=0.0,
    augmentation="resized_crop",
    padding=0,
    hole=0,
    kept_at_test=0.875,
    zero_gamma=False,
    norm_momentum=0.9,
    norm_epsilon=1e-5,
)

RESNET50_IMAGENET = Recipe(
    name="resnet50_imagenet",
    network="ResNet50",
    dataset="imagenet2012",
    test_split="validation",
    images="ImageNet",
    size=224,
    decoded=False,
    mean=_IMAGENET_MEAN,
    std=_IMAGENET_STD,
    batch=256,  # tricks, as all that is not marked
    epochs=200,  # with mixup; "tricks" has 120 without it
    learning_rate=0.1,
    schedule="cosine",
    warmup=5,
    momentum=0.9,
    l2=5e-5,  # a weight decay of 1e-4 on kernels alone ("no bias decay")
    label_smoothing=0.1,
    mixup=0.2,
    augmentation="resized_crop",  # without the changes of colour that the paper's baseline has
    padding=0,
    hole=0,
    kept_at_test=0.875,  # 224 of 256 pixels
    zero_gamma=True,
    norm_momentum=0.9,  # GluonCV's models
    norm_epsilon=1e-5,  # likewise
)

RESNET50_IMAGENET_SCRIPTS = Recipe(
    name="resnet50_imagenet_scripts",
    network="ResNet50",
    dataset="imagenet2012",
    test_split="validation",
    images="ImageNet",
    size=224,
    decoded=False,
    mean=(121.0, 115.0, 100.0),  # scripts, as all below
    std=(70.0, 68.0, 71.0),
    batch=256,
    epochs=90,
    learning_rate=0.1,
    schedule="squared",
    warmup=10,
    momentum=0.9,
    l2=5e-5,  # a weight decay of 1e-4, as that of tf.contrib.layers.l2_regularizer
    label_smoothing=0.0,
    mixup=0.0,
    augmentation="resized_crop",
    padding=0,
    hole=0,
    kept_at_test=0.8,
    zero_gamma=True,
    norm_momentum=0.9,
    norm_epsilon=1e-4,
)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        RESNET9_CIFAR10,
        RESNET50_IMAGENETTE,
        RESNET50_IMAGENET,
        RESNET50_IMAGENET_SCRIPTS,
    )
}


def learning_rate(recipe: Recipe, done: float, images: int) -> float:
    """The learning rate in the middle of training.

    Args:
        recipe: what is trained.
        done: how much of all steps is done, 0 to 1.
        images: of a step, on all devices together.
    """
    peak = recipe.learning_rate * images / recipe.batch
    rise = recipe.warmup / recipe.epochs
    if done < rise:
        return peak * done / rise
    fallen = (done - rise) / (1 - rise)
    if recipe.schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * fallen))
    return peak * (1 - fallen) ** (2 if recipe.schedule == "squared" else 1)
