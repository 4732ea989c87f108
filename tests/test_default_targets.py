"""What `targets=None` means in families of KerasHub with names of their own."""

import re

import keras
import numpy as np
import pytest
from keras import layers

import keras_randadapt as kra
from keras_randadapt.sites import addresses
from keras_randadapt.sites import kerashub
from tests import zoo

pytestmark = pytest.mark.one_backend("torch")

LORA = kra.LoRA(2)


def mit():
    import keras_hub

    return keras_hub.models.MiTBackbone(
        layerwise_depths=[1, 1],
        image_shape=(16, 16, 3),
        hidden_dims=[4, 8],
        num_layers=2,
        layerwise_num_heads=[1, 2],
        layerwise_sr_ratios=[2, 1],
        max_drop_path_rate=0.0,
        layerwise_patch_sizes=[7, 3],
        layerwise_strides=[4, 2],
    )


def flux():
    import keras_hub

    return keras_hub.models.FluxBackbone(
        input_channels=8,
        hidden_size=16,
        mlp_ratio=2.0,
        num_heads=2,
        depth=1,
        depth_single_blocks=2,
        axes_dim=[2, 2, 4],
        theta=10_000,
        use_bias=True,
        guidance_embed=True,
        image_shape=(4, 8),
        text_shape=(4, 8),
        image_ids_shape=(4, 3),
        text_ids_shape=(4, 3),
        y_shape=(8,),
    )


def rwkv7():
    import keras_hub

    return keras_hub.models.RWKV7Backbone(
        hidden_size=16,
        head_size=8,
        num_layers=2,
        vocabulary_size=20,
        intermediate_dim=12,
        gate_lora=4,
        mv_lora=4,
        aaa_lora=4,
        decay_lora=4,
    )


def stable_diffusion_3():
    import keras_hub
    from keras_hub.src.models.vae import vae_backbone

    def clip(name):
        return keras_hub.models.CLIPTextEncoder(
            vocabulary_size=20,
            embedding_dim=8,
            hidden_dim=8,
            num_layers=2,
            num_heads=2,
            intermediate_dim=8,
            intermediate_activation="quick_gelu",
            intermediate_output_index=-2,
            max_sequence_length=6,
            name=name,
        )

    return keras_hub.models.StableDiffusion3Backbone(
        mmdit_patch_size=2,
        mmdit_hidden_dim=8,
        mmdit_num_layers=2,
        mmdit_num_heads=2,
        mmdit_position_size=4,
        mmdit_qk_norm=None,
        mmdit_dual_attention_indices=(0,),
        vae=vae_backbone.VAEBackbone(
            [32, 32], [1, 1], [32, 32], [1, 1], image_shape=(16, 16, 3)
        ),
        clip_l=clip("clip_l"),
        clip_g=clip("clip_g"),
        image_shape=(16, 16, 3),
    )


def _ends(model, template, count=2):
    layers_there = addresses.layers_by_address(model)
    kra.inject(model, template)
    places = [layers_there.places[address] for address in kra.sites(model)]
    return sorted("/".join(place.split("/")[-count:]) for place in places)


@pytest.mark.parametrize(
    "family, found",
    [
        (mit, ["attn/q", "attn/q", "attn/v", "attn/v"]),
        (
            flux,
            [
                "image_attn/qkv",
                *["single_stream_block/linear1"],
                *["single_stream_block_1/linear1"],
                "text_attn/qkv",
            ],
        ),
        (rwkv7, ["att/receptance"] * 2 + ["att/value"] * 2),
    ],
    ids=["mit", "flux", "rwkv7"],
)
def test_queries_and_values(family, found):
    assert _ends(family(), LORA) == found


def test_keys_and_values_and_feed_forward_outputs():
    assert _ends(mit(), kra.IA3()) == ["attn/k"] * 2 + ["attn/v"] * 2
    assert _ends(rwkv7(), kra.IA3()) == (
        ["att/key"] * 2 + ["att/value"] * 2 + ["ffn/value"] * 2
    )


def test_outputs_of_time_and_channel_mixing():
    found = _ends(rwkv7(), kra.Bottleneck(2))
    assert found == ["att/output_layer"] * 2 + ["ffn/value"] * 2


def test_the_transformer_of_a_diffusion_model():
    """Its text encoders have queries and values too, and stay as they are."""
    model = stable_diffusion_3()
    found = addresses.layers_by_address(model)
    assert any("clip_text_encoder" in a and "query" in a for a in found)
    kra.inject(model, LORA)
    sites = list(kra.sites(model))
    assert sites and all("/mm_di_t/" in address for address in sites)
    ends = {address.rpartition("/")[2] for address in sites}
    assert ends == {"attention_qkv", "attention_qkv2"}
    kra.eject(model)
    kra.inject(model, kra.IA3())
    assert all("/mm_di_t/" in address for address in kra.sites(model))


def test_adapted_mit_computes():
    """What is new to the default learns and merges as elsewhere."""
    model = zoo.set_weights(mit())
    x = zoo.normal(2, 16, 16, 3)
    base = zoo.outputs(model, x)
    kra.inject(model, LORA)
    np.testing.assert_array_equal(zoo.outputs(model, x), base)
    zoo.randomize(model)
    out = zoo.outputs(model, x)
    assert np.abs(out - base).max() > 1e-3
    kra.merge(model)
    np.testing.assert_allclose(
        zoo.outputs(model, x), out, atol=1e-5 * np.abs(out).max()
    )


def test_names_of_one_letter_count_only_together():
    class Block(layers.Layer):
        def __init__(self):
            super().__init__()
            self.q = layers.Dense(4)
            self.v = layers.Dense(4)

        def build(self, shape):
            self.q.build(shape)
            self.v.build(shape)

        def call(self, x):
            return self.q(x) + self.v(x)

    model = keras.Sequential([keras.Input((4,)), Block()])
    with pytest.raises(ValueError, match="no query or value"):
        kra.inject(model, LORA)
    assert (
        kerashub.query_and_value_projections(addresses.layers_by_address(model))
        == set()
    )


def test_the_error_of_a_convolutional_network_says_what_to_pass():
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(4, 3)(inputs)
    x = layers.DepthwiseConv2D(3, padding="same")(x)
    model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x)))
    with pytest.raises(ValueError, match="convolutions can be") as error:
        kra.inject(model, LORA)
    told = re.search("`targets=(lambda.*?)`", str(error.value)).group(1)
    kra.inject(model, LORA, eval(told, {"keras": keras}))
    classes = [type(layer).__name__ for layer in kra.sites(model).values()]
    assert classes == ["Conv2D", "DepthwiseConv2D"]


def test_a_variable_that_the_layer_around_reads():
    """SAM3 reads the variable of `cls_embed`, so no adapter is seen there."""
    from keras_hub.src.models.sam3 import sam3_geometry_encoder

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.encoder = sam3_geometry_encoder.SAM3GeometryEncoder(
                num_layers=1,
                hidden_dim=8,
                intermediate_dim=8,
                num_heads=2,
                roi_size=3,
            )

        def build(self, shape):
            self.encoder.build(
                (1, 2, 5), (1, 2), (1, 2), (1, 4, 4, 8), (1, 4, 4, 8)
            )

    model = Model()
    model.build(())
    for targets in ("cls_embed", lambda layer: layer.name.endswith("_embed")):
        with pytest.raises(ValueError, match="reads the variable of .*cls_emb"):
            kra.inject(model, LORA, targets)
        assert not kra.sites(model)
    kra.inject(
        model,
        LORA,
        lambda layer: layer.name.endswith("_embed"),
        exclude="cls_embed",
    )
    assert [x.name for x in kra.sites(model).values()] == ["label_embed"]
