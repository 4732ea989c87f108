"""Tiny backbones whose input is one image."""

from tests.backbones import row
from tests.backbones.row import Row
from tests.backbones.row import of_class

_SMALL = (8, 8, 3)
_LARGE = (32, 32, 3)
_TRANSFORMER = {
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 8,
}
_TOWER = {
    **_TRANSFORMER,
    "patch_size": 4,
    "intermediate_dim": 12,
    "image_shape": _SMALL,
}
_PYRAMID = {
    "layerwise_depths": [1, 1],
    "num_layers": 2,
    "layerwise_num_heads": [1, 2],
    "layerwise_sr_ratios": [2, 1],
    "max_drop_path_rate": 0.0,
    "layerwise_patch_sizes": [3, 3],
    "layerwise_strides": [2, 2],
    "hidden_dims": [4, 8],
    "image_shape": (16, 16, 3),
}
_HGNET = {
    "depths": [1, 1],
    "embedding_size": 4,
    "hidden_sizes": [8, 8],
    "stem_channels": [3, 4, 4],
    "hidden_act": "relu",
    "use_learnable_affine_block": True,
    "stackwise_stage_filters": [(4, 4, 8, 1, 2, 3), (8, 4, 8, 1, 2, 3)],
    "apply_downsample": [False, True],
    "use_lightweight_conv_block": [False, True],
}
#: One stage with one block of each kind: fused, universal and attention.
MOBILE = {
    "stackwise_block_types": [["er", "uir"], ["mqa"]],
    "stackwise_num_blocks": [2, 1],
    "stackwise_num_filters": [[8, 8], [8]],
    "stackwise_strides": [[2, 1], [1]],
    "stackwise_act_layers": [["relu", "relu"], ["relu"]],
    "stackwise_exp_ratios": [[2.0, 2.0], [1.0]],
    "stackwise_se_ratios": [[0.0, 0.0], [0.0]],
    "stackwise_dw_kernel_sizes": [[0, 3], [3]],
    "stackwise_dw_start_kernel_sizes": [[0, 0], [0]],
    "stackwise_dw_end_kernel_sizes": [[0, 0], [0]],
    "stackwise_exp_kernel_sizes": [[3, 0], [0]],
    "stackwise_pw_kernel_sizes": [[1, 0], [0]],
    "stackwise_num_heads": [[0, 0], [2]],
    "stackwise_key_dims": [[0, 0], [4]],
    "stackwise_value_dims": [[0, 0], [4]],
    "stackwise_kv_strides": [[0, 0], [1]],
    "stackwise_use_cpe": [[False, False], [False]],
    "use_msfa": False,
    "stem_size": 8,
    "image_shape": (16, 16, 3),
}


def resnet(block_type="bottleneck_block", stages=1, image_shape=_LARGE):
    import keras_hub

    # It demands that the first stage has 64 filters, and so has a basic block
    # without a projection the layer before it.
    return keras_hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64, 8, 8, 8][:stages],
        stackwise_num_blocks=[1] * stages,
        stackwise_num_strides=[1, 2, 2, 2][:stages],
        block_type=block_type,
        image_shape=image_shape,
    )


def efficientnet(strides, block_types, image_shape=_LARGE):
    """One block a stage, of stage `i` with stride `strides[i]`."""
    import keras_hub

    stages = len(strides)
    return keras_hub.models.EfficientNetBackbone(
        stackwise_width_coefficients=[1.0] * stages,
        stackwise_depth_coefficients=[1.0] * stages,
        stackwise_kernel_sizes=[3] * stages,
        stackwise_num_repeats=[1] * stages,
        stackwise_input_filters=[8] * stages,
        stackwise_output_filters=[8] * stages,
        stackwise_expansion_ratios=[1] + [2] * (stages - 1),
        stackwise_squeeze_and_excite_ratios=[0.0] + [0.25] * (stages - 1),
        stackwise_strides=strides,
        stackwise_block_types=block_types,
        dropout=0.0,
        input_shape=image_shape,
    )


def pyramid():
    """An encoder that has features of five sizes."""
    return efficientnet([1, 2, 2, 2, 2], ["fused"] * 4 + ["unfused"])


def basnet():
    import keras_hub

    encoder = resnet("basic_block", 4, (None, None, 3))
    return keras_hub.models.BASNetBackbone(
        encoder, num_classes=1, image_shape=_LARGE
    )


def deeplab():
    import keras_hub

    return keras_hub.models.DeepLabV3Backbone(
        pyramid(),
        spatial_pyramid_pooling_key="P5",
        low_level_feature_key="P2",
        upsampling_size=8,
        dilation_rates=[1, 2],
        projection_filters=4,
        image_shape=_LARGE,
    )


def retinanet():
    import keras_hub

    return keras_hub.models.RetinaNetBackbone(
        pyramid(), 3, 6, use_p5=False, image_shape=_LARGE
    )


def segformer():
    import keras_hub

    arguments = {
        **_PYRAMID,
        "layerwise_depths": [1] * 4,
        "num_layers": 4,
        "layerwise_num_heads": [1, 1, 2, 2],
        "layerwise_sr_ratios": [2, 2, 1, 1],
        "layerwise_patch_sizes": [3] * 4,
        "layerwise_strides": [2] * 4,
        # A layer of each stage is named after its size.
        "hidden_dims": [4, 6, 8, 10],
        "image_shape": _LARGE,
    }
    encoder = keras_hub.models.MiTBackbone(**arguments)
    return keras_hub.models.SegFormerBackbone(
        image_encoder=encoder, projection_filters=4
    )


def hgnet(**arguments):
    import keras_hub

    return keras_hub.models.HGNetV2Backbone(**{**_HGNET, **arguments})


def dfine():
    import keras_hub

    features = ["stage1", "stage2"]
    return keras_hub.models.DFineBackbone(
        backbone=hgnet(image_shape=_LARGE, out_features=features),
        decoder_in_channels=[8, 8],
        encoder_hidden_dim=8,
        num_labels=3,
        num_denoising=0,
        learn_initial_query=False,
        num_queries=4,
        anchor_image_size=(32, 32),
        feat_strides=[4, 8],
        num_feature_levels=2,
        hidden_dim=8,
        encoder_in_channels=[8, 8],
        encode_proj_layers=[1],
        num_attention_heads=2,
        encoder_ffn_dim=12,
        num_encoder_layers=1,
        hidden_expansion=0.5,
        depth_multiplier=0.34,
        eval_idx=-1,
        num_decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=12,
        decoder_n_points=[2, 2],
        lqe_hidden_dim=4,
        num_lqe_layers=2,
        out_features=features,
        image_shape=_LARGE,
        seed=0,
    )


def dinov2(image_shape=_SMALL):
    import keras_hub

    return keras_hub.models.DINOV2Backbone(
        **{**_TOWER, "image_shape": image_shape, "use_mask_token": False},
        position_embedding_shape=_SMALL,
        num_register_tokens=2,
    )


def depth_anything():
    import keras_hub

    return keras_hub.models.DepthAnythingBackbone(
        dinov2((16, 16, 3)),
        reassemble_factors=[2, 1],
        neck_hidden_dims=[4, 4],
        fusion_hidden_dim=4,
        head_hidden_dim=4,
        head_in_index=-1,
        feature_keys=["stage1", "stage2"],
    )


def parseq():
    import keras_hub

    encoder = keras_hub.models.ViTBackbone(
        image_shape=_SMALL,
        patch_size=(4, 4),
        mlp_dim=12,
        use_class_token=False,
        **_TRANSFORMER,
    )
    return keras_hub.models.PARSeqBackbone(
        encoder,
        vocabulary_size=row.VOCABULARY,
        max_label_length=5,
        decoder_hidden_dim=8,
        num_decoder_layers=1,
        num_decoder_heads=2,
        decoder_mlp_dim=12,
        dropout_rate=0.0,
        attention_dropout=0.0,
    )


_FIRST_FUSION = (
    "layers/depth_anything_neck/fusion_stage/"
    "depth_anything_feature_fusion_layer/residual_layer1"
)

ROWS = {
    "BASNetBackbone": Row(
        basnet,
        unmoved={
            "image_encoder/layers/conv2d": "BASNet has a first layer of its own"
        },
    ),
    "CLIPVisionEncoder": of_class("CLIPVisionEncoder", **_TOWER),
    "CSPNetBackbone": of_class(
        "CSPNetBackbone",
        stem_filters=4,
        stem_kernel_size=3,
        stem_strides=2,
        stackwise_depth=[1, 1],
        stackwise_strides=[1, 2],
        stackwise_num_filters=[8, 8],
        stage_type="dark",
        block_type="dark_block",
        image_shape=_LARGE,
    ),
    "DFineBackbone": Row(dfine),
    "DINOV2Backbone": Row(dinov2),
    "DINOV3Backbone": of_class(
        "DINOV3Backbone", **_TOWER, use_mask_token=False
    ),
    "DeepLabV3Backbone": Row(deeplab),
    "DeiTBackbone": of_class("DeiTBackbone", **_TOWER),
    "DenseNetBackbone": of_class(
        "DenseNetBackbone",
        stackwise_num_repeats=[1, 1],
        growth_rate=4,
        image_shape=_LARGE,
    ),
    "DepthAnythingBackbone": Row(
        depth_anything,
        unmoved={
            f"{_FIRST_FUSION}/convolution{i}": "nothing comes before it"
            for i in (1, 2)
        },
    ),
    "EfficientNetBackbone": Row(
        lambda: efficientnet([1, 2, 1], ["fused", "unfused", "v1"])
    ),
    "HGNetV2Backbone": of_class(
        "HGNetV2Backbone", **_HGNET, image_shape=_LARGE
    ),
    "MetaCLIP2VisionEncoder": of_class("MetaCLIP2VisionEncoder", **_TOWER),
    "MiTBackbone": of_class("MiTBackbone", **_PYRAMID),
    "MobileNetBackbone": of_class(
        "MobileNetBackbone",
        stackwise_expansion=[[16], [16]],
        stackwise_num_blocks=[1, 1],
        stackwise_num_filters=[[8], [8]],
        stackwise_kernel_size=[[3], [5]],
        stackwise_num_strides=[[2], [1]],
        stackwise_se_ratio=[[None], [0.25]],
        stackwise_activation=[["relu"], ["hard_swish"]],
        stackwise_padding=[[1], [2]],
        output_num_filters=16,
        depthwise_filters=8,
        depthwise_stride=1,
        depthwise_residual=False,
        last_layer_filter=16,
        input_num_filters=8,
        image_shape=_LARGE,
    ),
    "MobileNetV5Backbone": of_class("MobileNetV5Backbone", **MOBILE),
    "PARSeqBackbone": Row(parseq),
    "ResNetBackbone": Row(resnet),
    "RetinaNetBackbone": Row(retinanet),
    "SegFormerBackbone": Row(segformer),
    "SigLIPVisionEncoder": of_class("SigLIPVisionEncoder", **_TOWER),
    "SwinTransformerBackbone": of_class(
        "SwinTransformerBackbone",
        image_shape=(16, 16, 3),
        embed_dim=8,
        depths=[2, 1],
        num_heads=[2, 2],
        window_size=2,
        patch_size=2,
        drop_path=0.0,
    ),
    "VGGBackbone": of_class(
        "VGGBackbone",
        stackwise_num_repeats=[1, 1],
        stackwise_num_filters=[4, 8],
        image_shape=(16, 16, 3),
    ),
    "ViTBackbone": of_class(
        "ViTBackbone",
        image_shape=_SMALL,
        patch_size=(4, 4),
        mlp_dim=12,
        **_TRANSFORMER,
    ),
    "ViTDetBackbone": of_class(
        "ViTDetBackbone",
        hidden_size=8,
        num_layers=2,
        num_heads=2,
        intermediate_dim=12,
        global_attention_layer_indices=[1],
        patch_size=4,
        num_output_channels=4,
        window_size=2,
        image_shape=(16, 16, 3),
    ),
    "XceptionBackbone": of_class(
        "XceptionBackbone",
        stackwise_conv_filters=[[4, 8], [8, 8]],
        stackwise_pooling=[True, False],
        image_shape=_LARGE,
    ),
}
