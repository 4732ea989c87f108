"""Small models, one for each class of site and each family of models.

Every builder returns a new model, which has the same weights on every backend,
and inputs for it. Weights come from NumPy, because Keras's initializers draw
different numbers on different backends.
"""

import os
import pathlib
import zlib

import keras
import numpy as np
import pytest
from keras import layers

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def set_weights(model, seed=0):
    """Fills a model with numbers that depend only on seed and order."""
    for i, weight in enumerate(model.weights):
        if "int" in str(weight.dtype):
            continue
        generator = np.random.default_rng([seed, i])
        fan_in = int(np.prod(weight.shape[:-1])) or 1
        values = generator.normal(size=weight.shape) / np.sqrt(fan_in)
        if "variance" in weight.path or "gamma" in weight.path:
            values = 1 + 0.1 * np.abs(values)
        weight.assign(values.astype("float32"))
    return model


def normal(*shape, seed=0):
    generator = np.random.default_rng([seed, *shape])
    return generator.normal(size=shape).astype("float32")


def integers(*shape, high, seed=0):
    generator = np.random.default_rng([seed, high, *shape])
    return generator.integers(0, high, shape).astype("int32")


def numpy(tensor):
    return np.array(keras.ops.convert_to_numpy(tensor))


def _around(layer, x, before=(), after=()):
    """A functional model of one layer between fixed neighbours."""
    inputs = keras.Input(x.shape[1:], dtype=x.dtype)
    y = inputs
    for one in [*before, layer, *after]:
        y = one(y)
    return set_weights(keras.Model(inputs, y)), x


def dense():
    return *_around(
        layers.Dense(6, activation="tanh", name="site"), normal(8, 10)
    ), ["site"]


def dense_no_bias():
    return *_around(
        layers.Dense(6, use_bias=False, name="site"), normal(8, 3, 10)
    ), ["site"]


def _einsum(equation, output_shape, bias_axes, x, **kwargs):
    layer = layers.EinsumDense(
        equation,
        output_shape,
        bias_axes=bias_axes,
        activation="gelu",
        name="site",
        **kwargs,
    )
    return *_around(layer, x), ["site"]


def einsum_query():
    return _einsum("abc,cde->abde", (None, 2, 4), "de", normal(8, 3, 6))


def einsum_output():
    return _einsum("abcd,cde->abe", (None, 6), "e", normal(8, 3, 2, 4))


def einsum_gemma():
    # The contracted axis is the middle one.
    return _einsum("btd,ndh->btnh", (None, 2, 4), None, normal(8, 3, 6))


def einsum_xlnet():
    return _einsum("ibnd,hnd->ibh", (None, 6), None, normal(8, 3, 2, 4))


def einsum_ellipsis():
    return _einsum("...x,xy->...y", 5, "y", normal(8, 2, 3, 6))


def einsum_shared():
    # Each group has its own matrix, so this is not one matrix product.
    return _einsum("bnc,ncd->bnd", (3, 4), "nd", normal(8, 3, 6))


def einsum_summed():
    # The second axis of the input is summed over.
    return _einsum("abc,cd->ad", (6,), "d", normal(8, 3, 6))


def _quantized(mode, builder):
    def build():
        model, x, targets = builder()
        model.quantize(mode)
        return model, x, targets

    return build


dense_int8 = _quantized("int8", dense)
dense_int4 = _quantized("int4", dense)
einsum_int8 = _quantized("int8", einsum_query)
einsum_int4 = _quantized("int4", einsum_output)


def embedding():
    return *_around(
        layers.Embedding(11, 6, name="site"),
        integers(8, 5, high=11),
        after=[layers.Dense(4, activation="tanh")],
    ), ["site"]


embedding_int8 = _quantized("int8", embedding)


def _tied(tie_weights):
    x = integers(8, 5, high=11)
    site = layers.ReversibleEmbedding(
        11, 6, tie_weights=tie_weights, logit_soft_cap=3.0, name="site"
    )
    inputs = keras.Input((5,), dtype="int32")
    hidden = layers.Dense(6, activation="tanh")(site(inputs))
    return set_weights(keras.Model(inputs, site(hidden, reverse=True))), x


def reversible_embedding():
    return *_tied(True), ["site"]


def reversible_embedding_untied():
    return *_tied(False), ["site"]


reversible_embedding_int8 = _quantized("int8", reversible_embedding)
reversible_embedding_int4 = _quantized("int4", reversible_embedding)


def conv1d_causal():
    layer = layers.Conv1D(
        6, 3, padding="causal", dilation_rate=2, activation="relu", name="site"
    )
    return *_around(layer, normal(8, 9, 4)), ["site"]


def conv2d_strided():
    layer = layers.Conv2D(6, (3, 2), strides=2, padding="same", name="site")
    return *_around(layer, normal(8, 7, 6, 4)), ["site"]


def conv2d_grouped():
    layer = layers.Conv2D(6, 3, groups=2, padding="same", name="site")
    return *_around(layer, normal(8, 5, 5, 4)), ["site"]


def conv2d_dilated():
    layer = layers.Conv2D(6, 2, dilation_rate=2, use_bias=False, name="site")
    return *_around(layer, normal(8, 6, 6, 4)), ["site"]


def conv3d():
    layer = layers.Conv3D(5, 2, activation="tanh", name="site")
    return *_around(layer, normal(4, 4, 4, 3, 4)), ["site"]


def conv_depthwise_1d():
    layer = layers.DepthwiseConv1D(
        5, depth_multiplier=2, strides=2, activation="tanh", name="site"
    )
    return *_around(layer, normal(8, 9, 4)), ["site"]


def conv_depthwise_2d():
    layer = layers.DepthwiseConv2D(3, padding="same", name="site")
    return *_around(layer, normal(8, 5, 6, 8)), ["site"]


def conv_transpose_1d():
    layer = layers.Conv1DTranspose(
        6, 3, strides=2, activation="relu", name="site"
    )
    return *_around(layer, normal(8, 5, 7)), ["site"]


def conv_transpose_2d():
    layer = layers.Conv2DTranspose(
        3,
        (3, 2),
        strides=2,
        padding="same",
        output_padding=1,
        use_bias=False,
        name="site",
    )
    return *_around(layer, normal(8, 4, 3, 7)), ["site"]


def conv_transpose_3d():
    layer = layers.Conv3DTranspose(3, 2, activation="tanh", name="site")
    return *_around(layer, normal(4, 3, 3, 2, 7)), ["site"]


def conv_separable():
    layer = layers.SeparableConv2D(
        8, 3, depth_multiplier=2, padding="same", activation="relu", name="site"
    )
    return *_around(layer, normal(8, 5, 6, 4)), ["site"]


def lstm():
    return *_around(layers.LSTM(8, name="site"), normal(8, 4, 8)), ["site"]


def gru():
    layer = layers.GRU(8, use_bias=False, return_sequences=True, name="site")
    return *_around(layer, normal(8, 4, 8)), ["site"]


def position_embedding():
    import keras_hub

    inputs = keras.Input((5, 6))
    site = keras_hub.layers.PositionEmbedding(9, name="site")
    y = layers.Dense(4, activation="tanh")(inputs + site(inputs))
    return set_weights(keras.Model(inputs, y)), normal(8, 5, 6), ["site"]


@keras.saving.register_keras_serializable(package="tests")
class Experts(layers.Layer):
    """Two stacked kernels, as in KerasHub's mixtures, and a bias."""

    def __init__(self, num_experts=3, hidden_dim=8, **kwargs):
        super().__init__(**kwargs)
        self.num_experts = num_experts
        self.hidden_dim = hidden_dim

    def build(self, shape):
        def add(name, *shape):
            return self.add_weight(shape=(self.num_experts, *shape), name=name)

        self._expert_up = add("expert_up", shape[-1], self.hidden_dim)
        self.down = add("down", self.hidden_dim, shape[-1])
        self.down_bias = add("down_bias", shape[-1])
        self.built = True

    def call(self, x):
        up = keras.ops.einsum("th,ehm->etm", x, self._expert_up)
        up = keras.activations.silu(up)
        down = keras.ops.cast(self.down, up.dtype)
        y = keras.ops.einsum("eti,eio->eto", up, down)
        return y + self.down_bias[:, None, :]

    def get_config(self):
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "hidden_dim": self.hidden_dim,
        }


@keras.saving.register_keras_serializable(package="tests")
class Mean(layers.Layer):
    """The mean of what the experts give."""

    def call(self, x):
        return keras.ops.mean(x, axis=0)


def experts():
    site = Experts(name="site")
    after = [Mean(), layers.Dense(4, activation="tanh")]
    return *_around(site, normal(8, 6), after=after), ["site"]


def experts_outputs(model, x, up, down):
    """What NumPy computes with stacked kernels, one expert after another.

    Args:
        model: A model like that of `experts`.
        x: Array `(tokens, input_dim)`.
        up: Array `(experts, input_dim, hidden_dim)`.
        down: Array `(experts, hidden_dim, input_dim)`.
    """
    site = next(y for y in model.layers if isinstance(y, Experts))
    out = model.layers[-1]
    found = []
    for e, bias in enumerate(numpy(site.down_bias)):
        hidden = x.astype("float64") @ up[e]
        hidden = hidden / (1 + np.exp(-hidden))
        found.append(hidden @ down[e] + bias)
    y = np.mean(found, axis=0) @ numpy(out.kernel) + numpy(out.bias)
    return np.tanh(y) if out.activation is keras.activations.tanh else y


def sequential():
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, activation="relu"),
            keras.Sequential([layers.Dense(7, activation="relu")]),
            layers.BatchNormalization(),
            layers.Dense(5),
        ]
    )
    return set_weights(model), normal(8, 6), "all-linear"


def functional():
    """Attention, and one layer that is called twice."""
    inputs = keras.Input((5, 8))
    attention = layers.MultiHeadAttention(2, 4, dropout=0.1)
    shared = layers.Dense(8, activation="relu", name="shared")
    x = shared(layers.LayerNormalization()(inputs))
    x = shared(attention(x, x))
    model = keras.Model(inputs, layers.Dense(3)(x))
    return set_weights(model), normal(8, 5, 8), "all-linear"


def classifier():
    """A head behind layers that `targets=None` finds, as in a BERT.

    Unlike a BERT, it is not traced for seconds in every compilation.
    """
    inputs = keras.Input((6,))
    x = layers.Dense(8, activation="tanh", name="query")(inputs)
    x = layers.Dense(8, activation="tanh", name="value")(x)
    model = keras.Model(inputs, layers.Dense(3, name="logits")(x))
    return set_weights(model), normal(4, 6), None


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras.Model):
    """A model with layers in attributes and lists, and its own weight."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.blocks = [layers.Dense(6, activation="relu") for _ in range(2)]
        self.head = layers.Dense(3)

    def build(self, input_shape):
        for block in self.blocks:
            block.build(input_shape)
        self.head.build(input_shape)
        self.offset = self.add_weight(shape=(3,), name="offset")

    def call(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x) + self.offset


def subclassed():
    model = Subclassed()
    model.build((None, 6))
    return set_weights(model), normal(8, 6), "all-linear"


def _tokens(**others):
    ids = integers(4, 6, high=20)
    return {
        "token_ids": ids,
        "padding_mask": np.ones_like(ids),
        **{name: np.full_like(ids, value) for name, value in others.items()},
    }


def bert(hidden_dim=8):
    import keras_hub

    model = keras_hub.models.BertBackbone(
        vocabulary_size=20,
        num_layers=2,
        num_heads=2,
        hidden_dim=hidden_dim,
        intermediate_dim=12,
        dropout=0.0,
        max_sequence_length=6,
    )
    return set_weights(model), _tokens(segment_ids=0), None


def bert_classifier(hidden_dim=8):
    import keras_hub

    backbone, x, _ = bert(hidden_dim)
    model = keras_hub.models.BertTextClassifier(
        backbone=backbone, num_classes=3, preprocessor=None, dropout=0.0
    )
    return set_weights(model), x, None


def pretrained_classifier():
    """A classifier whose head is trained, so that no adapter needs to."""
    model, x, targets = bert_classifier()
    model.get_layer("logits").trainable = False
    return model, x, targets


def gpt2():
    import keras_hub

    model = keras_hub.models.GPT2Backbone(
        vocabulary_size=20,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=12,
        max_sequence_length=6,
    )
    return set_weights(model), _tokens(), None


def llama():
    import keras_hub

    model = keras_hub.models.LlamaBackbone(
        vocabulary_size=20,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=8,
        intermediate_dim=12,
    )
    return set_weights(model), _tokens(), None


def vit():
    import keras_hub

    model = keras_hub.models.ViTBackbone(
        image_shape=(8, 8, 3),
        patch_size=(4, 4),
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=12,
    )
    return set_weights(model), normal(4, 8, 8, 3), None


def deberta():
    import keras_hub

    model = keras_hub.models.DebertaV3Backbone(
        vocabulary_size=20,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=12,
        max_sequence_length=6,
        bucket_size=4,
    )
    return set_weights(model), _tokens(), None


def clip():
    import keras_hub

    vision = keras_hub.models.CLIPVisionEncoder(
        patch_size=4,
        hidden_dim=8,
        num_layers=2,
        num_heads=2,
        intermediate_dim=12,
        intermediate_activation="quick_gelu",
        image_shape=(8, 8, 3),
    )
    text = keras_hub.models.CLIPTextEncoder(
        vocabulary_size=20,
        embedding_dim=8,
        hidden_dim=8,
        num_layers=2,
        num_heads=2,
        intermediate_dim=12,
        intermediate_activation="quick_gelu",
        max_sequence_length=6,
    )
    model = keras_hub.models.CLIPBackbone(
        vision_encoder=vision, text_encoder=text, projection_dim=8
    )
    ids = integers(4, 6, high=20)
    return (
        set_weights(model),
        {
            "images": normal(4, 8, 8, 3),
            "token_ids": ids,
        },
        None,
    )


SITE_CLASSES = {
    builder.__name__: builder
    for builder in (
        dense,
        dense_no_bias,
        einsum_query,
        einsum_output,
        einsum_gemma,
        einsum_xlnet,
        einsum_ellipsis,
        einsum_shared,
        einsum_summed,
        embedding,
        reversible_embedding,
        reversible_embedding_untied,
        conv1d_causal,
        conv2d_strided,
        conv2d_grouped,
        conv2d_dilated,
        conv3d,
        conv_depthwise_1d,
        conv_depthwise_2d,
        conv_transpose_1d,
        conv_transpose_2d,
        conv_transpose_3d,
        conv_separable,
        lstm,
        gru,
        position_embedding,
        experts,
    )
}
QUANTIZED = {
    "dense_int8": dense_int8,
    "dense_int4": dense_int4,
    "einsum_int8": einsum_int8,
    "einsum_int4": einsum_int4,
    "embedding_int8": embedding_int8,
    "reversible_embedding_int8": reversible_embedding_int8,
    "reversible_embedding_int4": reversible_embedding_int4,
}
MODELS = {
    builder.__name__: builder
    for builder in (
        sequential,
        functional,
        subclassed,
        bert,
        bert_classifier,
        gpt2,
        llama,
        vit,
        deberta,
        clip,
    )
}
ALL = {**SITE_CLASSES, **QUANTIZED, **MODELS}


def outputs(model, x):
    """The model's outputs in inference, as one flat float32 array."""
    y = keras.tree.flatten(model(x, training=False))
    return np.concatenate(
        [np.ravel(keras.ops.convert_to_numpy(part)) for part in y]
    ).astype("float32")


def fit(model, x, steps=3, callbacks=None, **compile_args):
    """Trains for `steps` steps of `model.fit` on fixed random targets."""
    batch = len(keras.tree.flatten(x)[0])
    arguments = {"optimizer": keras.optimizers.Adam(0.05)}
    if hasattr(model, "backbone"):
        # KerasHub's classifiers always measure accuracy.
        y = integers(batch, high=model.num_classes)
        arguments["loss"] = keras.losses.SparseCategoricalCrossentropy(
            from_logits=True
        )
    else:
        y = keras.tree.map_structure(
            lambda part: normal(*part.shape, seed=1), model(x, training=False)
        )
        arguments["loss"] = "mse"
    model.compile(**{**arguments, **compile_args})
    return model.fit(
        x,
        y,
        batch_size=batch,
        epochs=steps,
        verbose=0,
        callbacks=callbacks,
    )


def randomize(model, name="default", seed=0, scale=0.3):
    """Gives every adapter weight a random value that affects outputs."""
    state = model._randadapt
    for address, adapter in state.adapters(name).items():
        for weight in adapter.stored_weights():
            key = zlib.crc32(f"{address}/{weight.name}".encode())
            generator = np.random.default_rng([seed, key])
            weight.assign(scale * generator.normal(size=weight.shape))


def snapshot(model):
    """The path and a copy of the value of every variable, by id."""
    return {
        id(v): (v.path, np.array(keras.ops.convert_to_numpy(v)))
        for v in model.variables
    }


def backbone(family):
    """A backbone class of KerasHub.

    Only the oldest release that is supported may lack it, and the test is
    skipped there. A newer one that has moved it fails the test by name.
    """
    import keras_hub

    name = f"{family}Backbone"
    found = getattr(keras_hub.models, name, None)
    if found is None:
        oldest = f"keras-hub=={keras_hub.__version__}\n"
        root = pathlib.Path(__file__).parents[1]
        if oldest in (root / "constraints/oldest.txt").read_text():
            pytest.skip(f"The oldest KerasHub has no {name}")
        pytest.fail(f"KerasHub {keras_hub.__version__} has no {name}.")
    return found
