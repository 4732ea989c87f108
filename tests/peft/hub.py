"""Small models of KerasHub, without checkpoints."""

import keras

from tests import zoo


def _models():
    import keras_hub

    return keras_hub.models


_DECODER = dict(
    vocabulary_size=61,
    num_layers=2,
    hidden_dim=24,
    num_query_heads=2,
    num_key_value_heads=1,
    intermediate_dim=40,
)
_ENCODER = dict(
    vocabulary_size=61,
    num_layers=2,
    num_heads=2,
    hidden_dim=24,
    intermediate_dim=40,
    max_sequence_length=32,
)


def llama():
    return zoo.set_weights(_models().Llama3Backbone(**_DECODER))


def llama_1():
    return _models().LlamaBackbone(**_DECODER)


def gemma2():
    return _models().GemmaBackbone(
        **{**_DECODER, "intermediate_dim": 80},
        head_dim=12,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        final_logit_soft_cap=30.0,
        attention_logit_soft_cap=50.0,
        sliding_window_size=16,
        use_sliding_window_attention=True,
    )


def mixtral():
    return _models().MixtralBackbone(**_DECODER, num_experts=3)


def gpt_oss():
    return _models().GptOssBackbone(**_DECODER, num_experts=3, head_dim=12)


def gpt2():
    return zoo.set_weights(
        _models().GPT2Backbone(**{**_ENCODER, "intermediate_dim": 96})
    )


def bert(**options):
    return zoo.set_weights(_models().BertBackbone(**{**_ENCODER, **options}))


def roberta():
    return _models().RobertaBackbone(**_ENCODER)


def bert_classifier(backbone=None):
    return _models().BertTextClassifier(
        backbone=backbone or bert(), num_classes=3, preprocessor=None
    )


def swin():
    return zoo.set_weights(
        _models().SwinTransformerBackbone(
            image_shape=(16, 16, 3),
            patch_size=2,
            embed_dim=12,
            depths=(1, 1),
            num_heads=(1, 2),
            window_size=4,
        )
    )


def vit_classifier(num_classes=3):
    backbone = _models().ViTBackbone(
        image_shape=(16, 16, 3),
        patch_size=8,
        num_layers=1,
        num_heads=2,
        hidden_dim=24,
        mlp_dim=40,
    )
    return zoo.set_weights(
        _models().ViTImageClassifier(
            backbone=backbone, num_classes=num_classes, preprocessor=None
        )
    )


def t5gemma():
    return _models().T5GemmaBackbone(
        vocabulary_size=61,
        encoder_hidden_dim=24,
        encoder_intermediate_dim=40,
        encoder_num_layers=1,
        encoder_num_attention_heads=2,
        encoder_num_key_value_heads=1,
        encoder_head_dim=12,
        encoder_layer_types=["full_attention"],
        decoder_hidden_dim=24,
        decoder_intermediate_dim=40,
        decoder_num_layers=1,
        decoder_num_attention_heads=2,
        decoder_num_key_value_heads=1,
        decoder_head_dim=12,
        decoder_layer_types=["full_attention"],
        dropout_rate=0.0,
        rms_norm_eps=1e-6,
        query_pre_attn_scalar=12,
        attention_bias=False,
        hidden_activation="gelu_approximate",
        cross_attention_hidden_size=24,
    )


def no_converter():
    return _models().BloomBackbone(**{k: v for k, v in _ENCODER.items()})


def plain():
    inputs = keras.Input((3,))
    return keras.Model(inputs, keras.layers.Dense(2)(inputs))
