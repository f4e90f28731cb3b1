"""Networks of other packages, small and with random weights: how each is built.

Every builder imports its package itself, so that those that are not installed cost nothing. The
networks are those that have BatchNormalization; sizes are the smallest that their packages allow
or that still have every kind of block.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

SIZE = 64  # rows and columns of the images, unless a network needs more


def _keras_hub(name: str, **arguments: Any) -> Callable[[], Any]:
    def build() -> Any:
        models = importlib.import_module("keras_hub.models")
        return getattr(models, name)(**arguments, image_shape=(SIZE, SIZE, 3))

    return build


def _over(name: str, encoder: Callable[[], Any], **arguments: Any) -> Callable[[], Any]:
    """A network of keras-hub that has another as its image encoder."""

    def build() -> Any:
        models = importlib.import_module("keras_hub.models")
        return getattr(models, name)(image_encoder=encoder(), **arguments)

    return build


def _kimm(name: str, **arguments: Any) -> Callable[[], Any]:
    def build() -> Any:
        models = importlib.import_module("kimm.models")
        kind = getattr(models, name)
        return kind(
            input_shape=(SIZE, SIZE, 3), weights=None, include_preprocessing=False, **arguments
        )

    return build


def _kecam(family: str, name: str, size: int = SIZE, **arguments: Any) -> Callable[[], Any]:
    def build() -> Any:
        models = importlib.import_module(f"keras_cv_attention_models.{family}")
        return getattr(models, name)(input_shape=(size, size, 3), pretrained=None, **arguments)

    return build


def _segmentation(name: str, backbone: str) -> Callable[[], Any]:
    def build() -> Any:
        models = importlib.import_module("segmentation_models")
        models.set_framework("tf.keras")
        return getattr(models, name)(backbone, encoder_weights=None, input_shape=(SIZE, SIZE, 3))

    return build


_RESNET: dict[str, Any] = {
    "input_conv_filters": [64],
    "input_conv_kernel_sizes": [7],
    "stackwise_num_filters": [64, 64, 64],
    "stackwise_num_blocks": [2, 2, 2],
    "stackwise_num_strides": [1, 2, 2],
}
_EFFICIENT_NET: dict[str, Any] = {
    "stackwise_width_coefficients": [1.0] * 2,
    "stackwise_depth_coefficients": [1.0] * 2,
    "stackwise_kernel_sizes": [3, 3],
    "stackwise_num_repeats": [1, 2],
    "stackwise_input_filters": [32, 16],
    "stackwise_output_filters": [16, 24],
    "stackwise_expansion_ratios": [1, 6],
    "stackwise_strides": [1, 2],
    "dropout": 0.2,
}
_ENCODER = _keras_hub("ResNetBackbone", **_RESNET, block_type="basic_block")

KERAS_HUB = {
    "ResNet": _ENCODER,
    "ResNetV2": _keras_hub(
        "ResNetBackbone", **_RESNET, block_type="bottleneck_block", use_pre_activation=True
    ),
    "ResNetVD": _keras_hub(
        "ResNetBackbone",
        **_RESNET | {"input_conv_filters": [32, 32, 64], "input_conv_kernel_sizes": [3, 3, 3]},
        block_type="bottleneck_block_vd",
    ),
    "MobileNetV3": _keras_hub(
        "MobileNetBackbone",
        stackwise_expansion=[[40, 56], [64, 144, 144]],
        stackwise_num_blocks=[2, 3],
        stackwise_num_filters=[[16, 16], [24, 24, 24]],
        stackwise_kernel_size=[[3, 3], [5, 5, 5]],
        stackwise_num_strides=[[2, 1], [2, 1, 1]],
        stackwise_se_ratio=[[None, None], [0.25, 0.25, 0.25]],
        stackwise_activation=[["relu", "relu"], ["hard_swish"] * 3],
        stackwise_padding=[[1, 1], [2, 2, 2]],
        depthwise_stride=2,
        depthwise_residual=False,
        output_num_filters=64,
        input_activation="hard_swish",
        output_activation="hard_swish",
        input_num_filters=16,
        depthwise_filters=8,
        squeeze_and_excite=0.5,
        last_layer_filter=64,
    ),
    "EfficientNet": _keras_hub(
        "EfficientNetBackbone",
        **_EFFICIENT_NET,
        stackwise_squeeze_and_excite_ratios=[0.25, 0.25],
        stackwise_block_types=["v1", "v1"],
    ),
    "EfficientNetV2": _keras_hub(
        "EfficientNetBackbone",
        **_EFFICIENT_NET,
        stackwise_squeeze_and_excite_ratios=[0, 0],
        stackwise_block_types=["fused", "unfused"],
    ),
    "CSPDarkNet": _keras_hub(
        "CSPNetBackbone",
        stem_filters=8,
        stem_kernel_size=3,
        stem_strides=1,
        stackwise_depth=[1, 1],
        stackwise_strides=[2, 2],
        stackwise_num_filters=[16, 16],
        block_type="dark_block",
        stage_type="csp",
    ),
    "DenseNet": _keras_hub("DenseNetBackbone", stackwise_num_repeats=[2, 2]),
    "Xception": _keras_hub(
        "XceptionBackbone",
        stackwise_conv_filters=[[16, 16], [32, 32, 32], [32, 32]],
        stackwise_pooling=[False, True, False],
    ),
    "HGNetV2": _keras_hub(
        "HGNetV2Backbone",
        depths=[1, 1, 2, 1],
        embedding_size=16,
        hidden_sizes=[16, 32, 32, 32],
        stem_channels=[3, 8, 16],
        hidden_act="relu",
        use_learnable_affine_block=True,
        stackwise_stage_filters=[
            [16, 8, 16, 1, 3, 3],
            [16, 8, 32, 1, 3, 3],
            [32, 8, 32, 2, 3, 5],
            [32, 16, 32, 1, 3, 5],
        ],
        apply_downsample=[False, True, True, True],
        use_lightweight_conv_block=[False, False, True, True],
    ),
    "DeepLabV3": _over(
        "DeepLabV3Backbone",
        _ENCODER,
        low_level_feature_key="P2",
        spatial_pyramid_pooling_key="P3",
        dilation_rates=[2, 4],
        upsampling_size=2,
    ),
    "SegFormer": _over(
        "SegFormerBackbone",
        _keras_hub(
            "MiTBackbone",
            layerwise_depths=[1, 1],
            num_layers=2,
            layerwise_num_heads=[1, 2],
            layerwise_sr_ratios=[4, 2],
            max_drop_path_rate=0.1,
            layerwise_patch_sizes=[7, 3],
            layerwise_strides=[4, 2],
            hidden_dims=[16, 32],
        ),
        projection_filters=32,
    ),
    "RetinaNet": _over("RetinaNetBackbone", _ENCODER, min_level=3, max_level=4, use_p5=False),
}
KIMM = {
    name: _kimm(name)
    for name in (
        "RepVGGA0",
        "MobileOneS0",
        "GhostNetW050",
        "GhostNetV2W100",
        "MobileNetV2W050",
        "RegNetX002",
        "Xception",
    )
}
KECAM = {
    name: _kecam(family, name, *size)
    for family, name, *size in (
        ("cspnext", "CSPNeXtTiny"),
        ("efficientnet", "EfficientNetV2B0"),
        ("efficientformer", "EfficientFormerV2S0"),
        ("efficientvit", "EfficientViT_B0"),
        ("fasternet", "FasterNetT0"),
        ("fastvit", "FastViT_T8"),
        ("ghostnet", "GhostNet_050"),
        ("levit", "LeViT128S", 224),
        ("mobilenetv3_family", "MobileNetV3Small050"),
        ("mobilevit", "MobileViT_XXS"),
        ("repvit", "RepViT_M09"),
        ("resnet_family", "RegNetY040"),
        ("moganet", "MogaNetXtiny"),
        ("vanillanet", "VanillaNet5"),
        ("yolov8", "YOLOV8_N", 128),
        ("yolox", "YOLOXNano", 128),
        ("edgenext", "EdgeNeXt_XX_Small"),
    )
}
SEGMENTATION = {
    f"{name}_{backbone}": _segmentation(name, backbone)
    for name, backbone in (("Unet", "resnet18"), ("FPN", "mobilenetv2"), ("Linknet", "resnet18"))
}

ZOOS: dict[str, dict[str, Callable[[], Any]]] = {
    "keras_hub": KERAS_HUB,
    "kimm": KIMM,
    "keras_cv_attention_models": KECAM,
    "segmentation_models": SEGMENTATION,
}
