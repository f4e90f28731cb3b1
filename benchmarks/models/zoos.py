"""Networks of other packages, small and with random weights: how each is built.

Every builder imports its package itself, so that those that are not installed cost nothing. The
networks are those that have BatchNormalization; sizes are the smallest that their packages allow
or that still have every kind of block. Classifiers give logits: probabilities of random networks
are all ones and zeros, whatever became of the network.
"""

from __future__ import annotations

import importlib
import os
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
        return getattr(models, name)(
            input_shape=(SIZE, SIZE, 3),
            weights=None,
            include_preprocessing=False,
            classifier_activation=None,
            **arguments,
        )

    return build


def _kecam(family: str, name: str, size: int = SIZE, **arguments: Any) -> Callable[[], Any]:
    def build() -> Any:
        models = importlib.import_module(f"keras_cv_attention_models.{family}")
        if family not in _DETECTORS:
            arguments["classifier_activation"] = None
        return getattr(models, name)(input_shape=(size, size, 3), pretrained=None, **arguments)

    return build


def _segmentation(name: str, backbone: str, size: int = SIZE) -> Callable[[], Any]:
    def build() -> Any:
        os.environ.setdefault("SM_FRAMEWORK", "tf.keras")  # it asks when it is imported
        models = importlib.import_module("segmentation_models")
        return getattr(models, name)(
            backbone,
            encoder_weights=None,
            input_shape=(size, size, 3),
            activation="linear",
        )

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
_CSP_NET: dict[str, Any] = {
    "stem_filters": 8,
    "stem_kernel_size": 3,
    "stem_strides": 1,
    "stackwise_depth": [1, 2],
    "stackwise_strides": [1, 2],
    "stackwise_num_filters": [16, 32],
}
_MOBILE_NET: dict[str, Any] = {"input_num_filters": 16, "last_layer_filter": 64}
_HGNET_V2: dict[str, Any] = {
    "depths": [1, 1, 2, 1],
    "hidden_act": "relu",
    "use_learnable_affine_block": True,
    "apply_downsample": [False, True, True, True],
    "use_lightweight_conv_block": [False, False, True, True],
}
_ENCODER = _keras_hub("ResNetBackbone", **_RESNET, block_type="basic_block")


def _d_fine() -> Any:
    encoder = _keras_hub(
        "HGNetV2Backbone",
        **_HGNET_V2,
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 16],
        stem_channels=[3, 8, 8],
        stackwise_stage_filters=[
            [8, 8, 8, 1, 3, 3],
            [8, 8, 16, 1, 3, 3],
            [16, 8, 16, 2, 3, 5],
            [16, 8, 16, 1, 3, 5],
        ],
        out_features=["stage3", "stage4"],
    )
    return _keras_hub(
        "DFineBackbone",
        backbone=encoder(),
        decoder_in_channels=[16, 16],
        encoder_hidden_dim=16,
        num_denoising=0,
        num_labels=4,
        hidden_dim=16,
        learn_initial_query=False,
        num_queries=6,
        anchor_image_size=(SIZE, SIZE),
        feat_strides=[16, 32],
        num_feature_levels=2,
        encoder_in_channels=[16, 16],
        encode_proj_layers=[1],
        num_attention_heads=2,
        encoder_ffn_dim=16,
        num_encoder_layers=1,
        hidden_expansion=0.5,
        depth_multiplier=0.5,
        eval_idx=-1,
        num_decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        decoder_n_points=[2, 2],
        lqe_hidden_dim=8,
        num_lqe_layers=2,
        out_features=["stage3", "stage4"],
        seed=0,
    )()


def _basnet() -> Any:
    models = importlib.import_module("keras_hub.models")
    encoder = models.ResNetBackbone(
        **_RESNET
        | {
            "stackwise_num_filters": [64] * 4,
            "stackwise_num_blocks": [2] * 4,
            "stackwise_num_strides": [1, 2, 2, 2],
        },
        block_type="basic_block",
    )
    return _keras_hub("BASNetBackbone", image_encoder=encoder, num_classes=1)()


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
    "MobileNetV1": _keras_hub(
        "MobileNetBackbone",
        **_MOBILE_NET,
        stackwise_expansion=[[16], [24]],
        stackwise_num_blocks=[1, 1],
        stackwise_num_filters=[[16], [24]],
        stackwise_kernel_size=[[3], [3]],
        stackwise_num_strides=[[2], [1]],
        stackwise_se_ratio=[[None], [None]],
        stackwise_activation=[["relu6"], ["relu6"]],
        stackwise_padding=[[1], [1]],
        depthwise_stride=1,
        depthwise_residual=True,
        depthwise_filters=16,
        output_num_filters=None,
        input_activation="relu6",
        output_activation="relu6",
    ),
    "MobileNetV3": _keras_hub(
        "MobileNetBackbone",
        **_MOBILE_NET,
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
        depthwise_filters=8,
        output_num_filters=64,
        input_activation="hard_swish",
        output_activation="hard_swish",
        squeeze_and_excite=0.5,
    ),
    # Its blocks of types "ir" and "mha" cannot be built: keras-hub's own code fails.
    "MobileNetV5": _keras_hub(
        "MobileNetV5Backbone",
        stackwise_block_types=[["er"], ["uir", "uir"], ["uir", "mqa"]],
        stackwise_num_blocks=[1, 2, 2],
        stackwise_num_filters=[[16], [24, 24], [32, 32]],
        stackwise_strides=[[2], [2, 1], [2, 1]],
        stackwise_act_layers=[["relu"], ["relu"] * 2, ["relu"] * 2],
        stackwise_exp_ratios=[[4.0], [4.0] * 2, [4.0, 0]],
        stackwise_se_ratios=[[0], [0] * 2, [0] * 2],
        stackwise_dw_kernel_sizes=[[0], [5, 5], [3, 0]],
        stackwise_dw_start_kernel_sizes=[[0], [3, 0], [0, 0]],
        stackwise_dw_end_kernel_sizes=[[0], [0, 3], [0, 0]],
        stackwise_exp_kernel_sizes=[[3], [0, 0], [0, 0]],
        stackwise_pw_kernel_sizes=[[1], [0, 0], [0, 0]],
        stackwise_num_heads=[[0], [0, 0], [0, 2]],
        stackwise_key_dims=[[0], [0, 0], [0, 8]],
        stackwise_value_dims=[[0], [0, 0], [0, 8]],
        stackwise_kv_strides=[[0], [0, 0], [0, 1]],
        stackwise_use_cpe=[[False], [False] * 2, [False, True]],
        norm_layer="batch_norm",
        num_features=32,
        msfa_output_resolution=4,
        stem_bias=False,
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
    "EfficientNetLite": _keras_hub(
        "EfficientNetBackbone",
        **_EFFICIENT_NET,
        stackwise_squeeze_and_excite_ratios=[0, 0],
        stackwise_block_types=["v1", "v1"],
        activation="relu6",
    ),
    "CSPDarkNet": _keras_hub(
        "CSPNetBackbone",
        **_CSP_NET,
        block_type="dark_block",
        stage_type="csp",
        block_ratio=[0.5],
        bottle_ratio=[0.5],
    ),
    "CSPResNeXt": _keras_hub(
        "CSPNetBackbone",
        **_CSP_NET,
        block_type="bottleneck_block",
        stage_type="csp",
        groups=2,
        block_ratio=[0.5],
        bottle_ratio=[0.5],
    ),
    "CSPEdgeNet": _keras_hub(
        "CSPNetBackbone",
        **_CSP_NET,
        block_type="edge_block",
        stage_type="cs3",
        block_ratio=[0.5],
        bottle_ratio=[0.5],
    ),
    "DarkNet": _keras_hub("CSPNetBackbone", **_CSP_NET, block_type="dark_block", stage_type="dark"),
    "DenseNet": _keras_hub("DenseNetBackbone", stackwise_num_repeats=[2, 2]),
    "Xception": _keras_hub(
        "XceptionBackbone",
        stackwise_conv_filters=[[16, 16], [32, 32, 32], [32, 32]],
        stackwise_pooling=[False, True, False],
    ),
    "HGNetV2": _keras_hub(
        "HGNetV2Backbone",
        **_HGNET_V2,
        embedding_size=16,
        hidden_sizes=[16, 32, 32, 32],
        stem_channels=[3, 8, 16],
        stackwise_stage_filters=[
            [16, 8, 16, 1, 3, 3],
            [16, 8, 32, 1, 3, 3],
            [32, 8, 32, 2, 3, 5],
            [32, 16, 32, 1, 3, 5],
        ],
    ),
    "DFine": _d_fine,
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
    "RetinaNet": _over(
        "RetinaNetBackbone",
        _ENCODER,
        min_level=3,
        max_level=4,
        use_p5=False,
        use_fpn_batch_norm=True,
    ),
    "BASNet": _basnet,
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
_DETECTORS = ("efficientdet", "yolov8", "yolox")  # which have no classifier
KECAM = {
    name: _kecam(family, name, *size)
    for family, name, *size in (
        ("botnet", "BotNet50", 128),
        ("cmt", "CMTTiny", 160),
        ("coatnet", "CoAtNet0"),
        ("cotnet", "CotNet50"),
        ("cspnext", "CSPNeXtTiny"),
        ("efficientdet", "EfficientDetD0", 128),
        ("efficientnet", "EfficientNetV2B0"),
        ("efficientformer", "EfficientFormerV2S0"),
        ("efficientvit", "EfficientViT_B0"),
        ("fasternet", "FasterNetT0"),
        ("fastvit", "FastViT_T8"),
        ("ghostnet", "GhostNet_050"),
        ("inceptionnext", "InceptionNeXtTiny"),
        ("levit", "LeViT128S", 224),
        ("mobilenetv3_family", "MobileNetV3Small050"),
        ("mobilenetv3_family", "LCNet050"),
        ("mobilevit", "MobileViT_XXS"),
        ("moganet", "MogaNetXtiny"),
        ("repvit", "RepViT_M09"),
        ("resnest", "ResNest50"),
        ("resnet_family", "RegNetY040"),
        ("resnet_family", "ResNet50D"),
        ("tinyvit", "TinyViT_5M", 224),
        ("vanillanet", "VanillaNet5"),
        ("yolov8", "YOLOV8_N", 128),
        ("yolov8", "YOLO_NAS_S", 128),
        ("yolox", "YOLOXNano", 128),
    )
}
SEGMENTATION = {
    f"{name}_{backbone}": _segmentation(name, backbone, *size)
    for name, backbone, *size in (
        ("Unet", "resnet18"),
        ("FPN", "mobilenetv2"),
        ("Linknet", "resnet18"),
        ("PSPNet", "resnet18", 48),
        ("Unet", "efficientnetb0"),
    )
}

ZOOS: dict[str, dict[str, Callable[[], Any]]] = {
    "keras_hub": KERAS_HUB,
    "kimm": KIMM,
    "keras_cv_attention_models": KECAM,
    "segmentation_models": SEGMENTATION,
}
