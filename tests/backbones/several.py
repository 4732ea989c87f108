"""Tiny backbones of several parts, with several inputs."""

import numpy as np

from tests.backbones import images
from tests.backbones import row
from tests.backbones.row import Row
from tests.backbones.row import of_class

_SMALL = (8, 8, 3)
_LAYERS = {
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 12,
}
_DECODER = {
    "vocabulary_size": row.VOCABULARY,
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 12,
    "head_dim": 4,
}


def _normal(*shape):
    generator = np.random.default_rng(list(shape))
    return generator.normal(size=shape).astype("float32")


def _towers(family, projection=True):
    def build():
        import keras_hub

        models = keras_hub.models
        vision = getattr(models, f"{family}VisionEncoder")(
            patch_size=4, image_shape=_SMALL, **_LAYERS
        )
        text = getattr(models, f"{family}TextEncoder")(
            vocabulary_size=row.VOCABULARY,
            embedding_dim=8,
            max_sequence_length=row.LENGTH,
            **_LAYERS,
        )
        backbone = getattr(models, f"{family}Backbone")
        projected = {"projection_dim": 8} if projection else {}
        return backbone(vision_encoder=vision, text_encoder=text, **projected)

    return build


def blip2():
    import keras_hub
    from keras_hub.src.models.blip2 import blip2_custom_opt
    from keras_hub.src.models.blip2 import blip2_qformer

    vision = keras_hub.models.BLIP2VisionEncoder(
        image_size=8,
        patch_size=4,
        use_patch_bias=True,
        use_class_token=True,
        use_mha_bias=True,
        use_mlp_bias=True,
        dropout_rate=0.0,
        layer_norm_epsilon=1e-6,
        initializer_range=0.02,
        **_LAYERS,
    )
    qformer = blip2_qformer.BLIP2QFormer(
        num_query_tokens=3,
        vision_dim=8,
        cross_attention_frequency=2,
        dropout=0.0,
        layer_norm_epsilon=1e-6,
        **_LAYERS,
    )
    language_model = blip2_custom_opt.BLIP2CustomOPT(
        vocabulary_size=row.VOCABULARY,
        num_query_tokens=3,
        dropout=0.0,
        max_sequence_length=16,
        qformer_hidden_dim=8,
        **_LAYERS,
    )
    return keras_hub.models.BLIP2Backbone(vision, qformer, language_model)


def flux():
    import keras_hub

    return keras_hub.models.FluxBackbone(
        input_channels=4,
        hidden_size=16,
        mlp_ratio=2.0,
        num_heads=2,
        depth=1,
        depth_single_blocks=1,
        axes_dim=[2, 2, 4],
        theta=10_000,
        use_bias=True,
        guidance_embed=True,
        image_shape=(4, 4),
        text_shape=(3, 8),
        image_ids_shape=(4, 3),
        text_ids_shape=(3, 3),
        y_shape=(8,),
    )


def gemma3():
    import keras_hub

    vision = keras_hub.models.Gemma3VisionEncoder(
        image_size=8, patch_size=4, output_dim=8, pool_size=2, **_LAYERS
    )
    return keras_hub.models.Gemma3Backbone(
        image_size=8,
        use_sliding_window_attention=True,
        sliding_window_size=4,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        vision_encoder=vision,
        **_DECODER,
    )


def gemma3n():
    import keras_hub

    vision = {
        **images.MOBILE,
        "stackwise_num_filters": [[8, 8], [8]],
        "num_features": 8,
    }
    vision_encoder = keras_hub.models.MobileNetV5Backbone(**vision)
    return keras_hub.models.Gemma3nBackbone(
        text_vocab_size=row.VOCABULARY,
        text_hidden_size=8,
        num_hidden_layers=2,
        pad_token_id=0,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        intermediate_size=[12, 12],
        hidden_activation="gelu_approximate",
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=4,
        rope_theta=10_000.0,
        max_position_embeddings=16,
        vocab_size_per_layer_input=row.VOCABULARY,
        hidden_size_per_layer_input=4,
        altup_num_inputs=2,
        laurel_rank=2,
        vision_encoder_config=vision_encoder.get_config(),
        vision_hidden_size=8,
        vision_vocab_size=4,
        vision_vocab_offset=row.VOCABULARY,
        vision_soft_tokens_per_image=4,
        image_token_id=row.VOCABULARY - 1,
    )


def gemma4():
    import keras_hub

    vision = keras_hub.models.Gemma4VisionEncoder(
        image_size=8,
        patch_size=4,
        head_dim=4,
        output_dim=8,
        pool_size=2,
        position_embedding_size=4,
        **_LAYERS,
    )
    return keras_hub.models.Gemma4Backbone(
        image_size=8,
        sliding_window_size=4,
        layer_types=["sliding_attention", "full_attention"],
        vision_encoder=vision,
        enable_moe_block=True,
        num_experts=3,
        num_experts_per_token=2,
        expert_intermediate_dim=6,
        **_DECODER,
    )


def sam():
    import keras_hub

    encoder = keras_hub.models.ViTDetBackbone(
        hidden_size=8,
        num_layers=2,
        num_heads=2,
        intermediate_dim=12,
        global_attention_layer_indices=[1],
        patch_size=4,
        num_output_channels=8,
        window_size=2,
        image_shape=(16, 16, 3),
    )
    prompts = keras_hub.layers.SAMPromptEncoder(
        hidden_size=8,
        image_embedding_size=(4, 4),
        input_image_size=(16, 16),
        # A quarter of them is normalized, and one channel alone would be 0.
        mask_in_channels=8,
    )
    masks = keras_hub.layers.SAMMaskDecoder(
        hidden_size=8,
        num_layers=1,
        intermediate_dim=12,
        num_heads=2,
        embedding_dim=8,
        num_multimask_outputs=2,
        iou_head_depth=2,
        iou_head_hidden_dim=8,
    )
    return keras_hub.models.SAMBackbone(encoder, prompts, masks)


def sam3():
    import keras_hub

    layers = keras_hub.layers
    image_shape = (16, 16, 3)
    vision = layers.SAM3VisionEncoder(
        image_shape=image_shape,
        patch_size=4,
        fpn_hidden_dim=8,
        fpn_scale_factors=[2.0, 1.0, 0.5],
        pretrain_image_shape=_SMALL,
        window_size=2,
        global_attn_indexes=[1],
        **_LAYERS,
    )
    text = layers.SAM3TextEncoder(
        vocabulary_size=row.VOCABULARY,
        embedding_dim=8,
        max_sequence_length=row.LENGTH,
        **_LAYERS,
    )
    few = {**_LAYERS, "num_layers": 1}
    return keras_hub.models.SAM3PromptableConceptBackbone(
        vision_encoder=vision,
        text_encoder=text,
        geometry_encoder=layers.SAM3GeometryEncoder(roi_size=2, **few),
        detr_encoder=layers.SAM3DetrEncoder(**few),
        detr_decoder=layers.SAM3DetrDecoder(
            image_shape=image_shape, patch_size=4, num_queries=3, **few
        ),
        mask_decoder=layers.SAM3MaskDecoder(
            num_upsampling_stages=1, hidden_dim=8, num_heads=2
        ),
    )


def stable_diffusion_3():
    import keras_hub
    from keras_hub.src.models.vae import vae_backbone

    def text(name):
        return keras_hub.models.CLIPTextEncoder(
            vocabulary_size=row.VOCABULARY,
            embedding_dim=8,
            max_sequence_length=row.LENGTH,
            intermediate_output_index=0,
            name=name,
            **_LAYERS,
        )

    # A group of its normalizations has two channels, at the fewest.
    autoencoder = vae_backbone.VAEBackbone(
        encoder_num_filters=[32, 32, 32, 32],
        encoder_num_blocks=[1, 1, 1, 1],
        decoder_num_filters=[32, 32, 32, 32],
        decoder_num_blocks=[1, 1, 1, 1],
        sample_channels=8,
        sampler_method="mode",
    )
    return keras_hub.models.StableDiffusion3Backbone(
        mmdit_patch_size=1,
        mmdit_hidden_dim=16,
        mmdit_num_layers=2,
        mmdit_num_heads=2,
        mmdit_position_size=4,
        mmdit_qk_norm=None,
        mmdit_dual_attention_indices=None,
        vae=autoencoder,
        clip_l=text("clip_l"),
        clip_g=text("clip_g"),
        latent_channels=4,
        image_shape=(16, 16, 3),
    )


_INDICES = np.tile(np.arange(1, 5, dtype="int32"), (row.BATCH, 1))
_IN_IMAGE = np.tile(np.array([0, 1, 1, 1, 1, 0], dtype="int32"), (row.BATCH, 1))

ROWS = {
    "BLIP2Backbone": Row(blip2),
    "CLIPBackbone": Row(_towers("CLIP")),
    "FluxBackbone": Row(flux),
    "Gemma3Backbone": Row(
        gemma3,
        {
            "images": _normal(row.BATCH, 1, 8, 8, 3),
            # One image, which is one token.
            "vision_indices": _INDICES[:, :1],
            "vision_mask": _IN_IMAGE * [0, 1, 0, 0, 0, 0],
        },
    ),
    "Gemma3nBackbone": Row(
        gemma3n,
        {
            "images": _normal(row.BATCH, 1, 16, 16, 3),
            "token_ids": np.tile(
                np.array([3, 23, 23, 23, 23, 5], dtype="int32"),
                (row.BATCH, 1),
            ),
        },
        unmoved={
            "layers/gemma3n_multimodal_embedding_processor/embed_vision/"
            "embedding": "the text has no token of an image's vocabulary",
        },
    ),
    "Gemma4Backbone": Row(
        gemma4,
        {
            "pixel_values": _normal(row.BATCH, 1, 4, 48),
            "pixel_position_ids": np.tile(
                np.array([[0, 0], [1, 0], [0, 1], [1, 1]], dtype="int32"),
                (row.BATCH, 1, 1, 1),
            ),
            "position_ids": np.tile(
                np.arange(row.LENGTH, dtype="int32"), (row.BATCH, 1)
            ),
            "vision_indices": _INDICES[:, :1],
            "vision_mask": _IN_IMAGE * [0, 1, 0, 0, 0, 0],
        },
    ),
    "MetaCLIP2Backbone": Row(
        _towers("MetaCLIP2"),
        # The end of the text, 2, is the token that the text's vector is of.
        {"token_ids": np.tile(np.array([3, 9, 5, 8, 4, 2], "int32"), (2, 1))},
    ),
    "MoonshineBackbone": of_class(
        "MoonshineBackbone",
        row={
            "inputs": {
                "encoder_input_values": _normal(row.BATCH, 1600, 1),
                "encoder_padding_mask": np.ones((row.BATCH, 1600), bool),
            }
        },
        vocabulary_size=row.VOCABULARY,
        filter_dim=8,
        encoder_num_layers=2,
        decoder_num_layers=2,
        hidden_dim=8,
        intermediate_dim=12,
        encoder_num_heads=2,
        decoder_num_heads=2,
    ),
    "PaliGemmaBackbone": of_class(
        "PaliGemmaBackbone",
        row={
            "inputs": {
                "padding_mask": np.ones((row.BATCH, row.LENGTH + 4), "int32"),
                "response_mask": np.ones((row.BATCH, row.LENGTH + 4), "int32"),
            }
        },
        image_size=8,
        vit_patch_size=4,
        vit_num_heads=2,
        vit_hidden_dim=8,
        vit_num_layers=2,
        vit_intermediate_dim=12,
        **_DECODER,
    ),
    "SAM3PromptableConceptBackbone": Row(
        sam3,
        {
            # A box is two corners in relative coordinates, and a number.
            "boxes": np.tile(
                np.array([[0.5, 0.5, 0.4, 0.6, 1.0]], "float32"),
                (row.BATCH, 1, 1),
            ),
            "box_labels": np.ones((row.BATCH, 1), "int32"),
        },
        # Its parent reads the table and does not look anything up in it.
        exclude=["cls_embed"],
        unmoved={
            f"layers/sam3_vision_encoder/vision_neck/fpn_layers/"
            f"sam3fpn_layer_2/{name}": "no part takes the coarsest features"
            for name in ("proj1", "proj2")
        },
        needs={"torch": "torchvision"},
    ),
    "SAMBackbone": Row(
        sam,
        {
            # One point inside, one outside and one that is none.
            "points": np.full((row.BATCH, 3, 2), 3.0, "float32"),
            "labels": np.tile(
                np.array([[1.0, 0.0, -1.0]], "float32"), (row.BATCH, 1)
            ),
            "boxes": np.tile(
                np.array([[[2.0, 3.0], [9.0, 11.0]]], "float32"),
                (row.BATCH, 1, 1, 1),
            ),
            "masks": _normal(row.BATCH, 1, 16, 16, 1),
        },
        unmoved={
            "layers/sam_prompt_encoder/no_mask_embed": "there is a mask",
        },
    ),
    "SigLIPBackbone": Row(_towers("SigLIP", projection=False)),
    "StableDiffusion3Backbone": Row(
        stable_diffusion_3, {"num_steps": np.full(row.BATCH, 2, "int32")}
    ),
    "VideoPrismBackbone": of_class(
        "VideoPrismBackbone",
        num_frames=2,
        patch_size=4,
        hidden_dim=8,
        intermediate_dim=12,
        num_heads=2,
        num_spatial_layers=1,
        num_temporal_layers=1,
        num_auxiliary_layers=1,
        vocabulary_size=row.VOCABULARY,
        num_text_layers=1,
        image_shape=_SMALL,
    ),
    "WhisperBackbone": of_class(
        "WhisperBackbone",
        row={"inputs": {"encoder_features": _normal(row.BATCH, 12, 4)}},
        vocabulary_size=row.VOCABULARY,
        num_mels=4,
        max_encoder_sequence_length=12,
        max_decoder_sequence_length=8,
        **_LAYERS,
    ),
}
