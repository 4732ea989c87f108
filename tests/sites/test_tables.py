"""Learned tables of KerasHub, which their own layer reads."""

import keras
import keras_hub
import numpy as np
import pytest
import safetensors.numpy
from keras_hub.src.models.deberta_v3 import relative_embedding
from keras_hub.src.models.stable_diffusion_3 import mmdit

import keras_randadapt as kra
from keras_randadapt.sites import addresses
from tests import methods
from tests import zoo

pytestmark = pytest.mark.every_backend


def _around(layer, x):
    inputs = keras.Input(x.shape[1:])
    return zoo.set_weights(keras.Model(inputs, layer(inputs))), x


def _adapted(model, template=None):
    """Injects a random LoRA, and gives the adapted table in float64."""
    (layer,) = [x for x in model.layers if x.name == "site"]
    kra.inject(model, template or kra.LoRA(2, alpha=3), "site")
    zoo.randomize(model)
    (adapter,) = model._randadapt.adapters("default").values()
    a, b = methods.numpy(adapter.lora_a), methods.numpy(adapter.lora_b)
    base = methods.numpy(layer.weights[0]).astype("float64")
    return layer, base + (1.5 * a.astype("float64") @ b).reshape(base.shape)


def test_rows_from_a_place_on():
    layer = keras_hub.layers.PositionEmbedding(9, name="site")
    model, x = _around(layer, zoo.normal(2, 5, 6))
    layer, table = _adapted(model)
    wanted = np.broadcast_to(table[:5], x.shape)
    methods.close(methods.numpy(model(x)), wanted)
    for arguments, rows in (
        ({"start_index": 3}, [3, 4, 5, 6, 7]),
        ({"positions": np.array([8, 0, 2, 2, 1])}, [8, 0, 2, 2, 1]),
    ):
        y = methods.numpy(layer(x, **arguments))
        methods.close(y, np.broadcast_to(table[rows], x.shape))
    kra.merge(model)
    methods.close(methods.numpy(layer.position_embeddings), table)
    methods.close(methods.numpy(model(x)), wanted)


def test_subclass_with_a_call_of_its_own():
    """That of Stable Diffusion 3 cuts a window out of the middle."""
    layer = mmdit.AdjustablePositionEmbedding(4, 4, name="site")
    model, x = _around(layer, zoo.normal(2, 16, 6))
    layer, table = _adapted(model)
    y = methods.numpy(layer(x, height=2, width=2))
    methods.close(y[0], table[[5, 6, 9, 10]])


def test_layer_below_a_table():
    """The normalization inside is a layer of its own, before and after."""
    layer = relative_embedding.RelativeEmbedding(6, 4, name="site")
    model, x = _around(layer, zoo.normal(2, 5, 6))
    before = list(addresses.layers_by_address(model))
    assert (
        before == ["layers/site", "layers/site/layer_norm"]
        or len([a for a in before if a.endswith("/layer_norm")]) == 1
    )
    base = zoo.outputs(model, x)
    layer, table = _adapted(model)
    assert list(addresses.layers_by_address(model)) == before
    gamma = methods.numpy(layer.layer_norm.gamma)
    beta = methods.numpy(layer.layer_norm.beta)
    wanted = table - table.mean(-1, keepdims=True)
    wanted /= np.sqrt((wanted**2).mean(-1, keepdims=True) + 1e-5)
    wanted = wanted * gamma + beta
    methods.close(methods.numpy(model(x))[0], wanted)
    kra.eject(model)
    np.testing.assert_array_equal(zoo.outputs(model, x), base)
    kra.inject(model, kra.BitFit(), "rel_embeddings_layer_norm")
    zoo.randomize(model)
    assert np.abs(zoo.outputs(model, x) - base).max() > 1e-2


def test_a_table_is_named_where_it_can_not_be_adapted():
    layer = keras_hub.layers.PositionEmbedding(9, name="site")
    model, x = _around(layer, zoo.normal(2, 5, 6))
    before = zoo.outputs(model, x)
    for template, match in (
        (kra.LoRA(7), "`rank` must be at most 6"),
        (kra.IA3(), "does not adapt a PositionEmbedding"),
        (kra.DoRA(kra.LoRA(2)), "does not adapt a PositionEmbedding"),
    ):
        with pytest.raises(ValueError, match=match):
            kra.inject(model, template, "site")
    assert not kra.sites(model)
    np.testing.assert_array_equal(zoo.outputs(model, x), before)


@pytest.mark.one_backend
def test_16_bits_merge_to_what_was_computed():
    layer = keras_hub.layers.PositionEmbedding(
        9, dtype="mixed_bfloat16", name="site"
    )
    model, x = _around(layer, zoo.normal(2, 5, 6))
    base = zoo.outputs(model, x)
    _adapted(model)
    out = zoo.outputs(model, x)
    assert np.abs(out - base).max() > 1e-2
    kra.merge(model)
    np.testing.assert_array_equal(zoo.outputs(model, x), out)


@pytest.mark.one_backend("torch")
# A rank of 2 is much of a table of six rows.
@pytest.mark.filterwarnings(
    "ignore:The LoRA has rank:keras_randadapt.AdapterWarning"
)
def test_peft_knows_position_tables(tmp_path):
    """PEFT adapts `position_embeddings`, an embedding in transformers."""
    model, x, _ = zoo.bert()
    names = list(kra.peft.name_map(model).parts)
    assert "layers/position_embedding" in names
    kra.inject(model, kra.LoRA(2), ["position_embedding", "query"])
    zoo.randomize(model)
    out = zoo.outputs(model, x)
    assert list(kra.peft.name_map(model).parts) == names
    kra.peft.save(model, tmp_path)
    saved = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    (table,) = [
        array
        for name, array in saved.items()
        if name.endswith("embeddings.position_embeddings.lora_embedding_A")
    ]
    assert table.shape == (2, 6)
    other, _, _ = zoo.bert()
    kra.peft.load(other, tmp_path)
    np.testing.assert_allclose(zoo.outputs(other, x), out, atol=1e-6)
