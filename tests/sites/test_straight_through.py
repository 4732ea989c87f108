"""Gradients flow through quantized layers, sites or not."""

import copy

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from tests import gradients
from tests import zoo
from tests.interruptions import FailingAssignment

DIM, VOCABULARY = 6, 11


def _dense():
    return keras.layers.Dense(VOCABULARY, name="head"), {}


def _einsum():
    return keras.layers.EinsumDense(
        "abc,cd->abd", (None, VOCABULARY), bias_axes="d", name="head"
    ), {}


def _tied():
    return keras.layers.ReversibleEmbedding(VOCABULARY, DIM, name="head"), {
        "reverse": True
    }


def _untied():
    return keras.layers.ReversibleEmbedding(
        VOCABULARY, DIM, tie_weights=False, name="head"
    ), {"reverse": True}


def _capped():
    return keras.layers.ReversibleEmbedding(
        VOCABULARY, DIM, logit_soft_cap=0.5, name="head"
    ), {"reverse": True}


HEADS = [_dense, _einsum, _tied, _untied, _capped]
EMBEDDINGS = [_tied, _untied, _capped]


def _with_head(make=_tied, mode="int8", trained=False):
    """A model of a float layer, `below`, and a quantized head."""
    head, arguments = make()
    inputs = keras.Input((5, DIM))
    hidden = keras.layers.Dense(DIM, activation="tanh", name="below")(inputs)
    if arguments:
        head.build()
    model = keras.Model(inputs, head(hidden, **arguments))
    zoo.set_weights(model)
    if mode:
        model.quantize(**_arguments(mode), filters="head")
    return model


def _arguments(mode):
    """The arguments of Keras's `quantize`.

    "int4 blocks" has two rows to a scale; "int4 rounding" rounds inputs too.
    """
    if not mode.startswith("int4 "):
        return {"mode": mode}
    arguments = {"block_size": 2}
    if "rounding" in mode:
        rounds = keras.quantizers.AbsMaxQuantizer(axis=-1)
        arguments = {"block_size": None, "activation_quantizer": rounds}
    return {"config": keras.quantizers.Int4QuantizationConfig(**arguments)}


def _product(head, arguments):
    return lambda x: head(x, **arguments)


def _kernel_of(head, arguments):
    """The dequantized kernel `(DIM, VOCABULARY)`, of the layer's own class."""
    units = np.eye(DIM, dtype="float32")[None]
    found = [keras.ops.convert_to_numpy(head(units, **arguments))[0]]
    found.append(keras.ops.convert_to_numpy(head(0 * units, **arguments))[0])
    return found[0] - found[1]


@pytest.mark.one_backend
@pytest.mark.parametrize("site", [False, True], ids=["no site", "site"])
@pytest.mark.parametrize(
    "mode", ["int8", "int4", "int4 blocks", "int4 rounding"]
)
@pytest.mark.parametrize("make", HEADS)
def test_gradient_of_the_input(make, mode, site):
    """It is that of the product with the dequantized kernel."""
    if mode.startswith("int4 ") and not hasattr(
        keras.quantizers, "Int4QuantizationConfig"
    ):
        pytest.skip("This Keras has no configs of int4 kernels.")
    model = _with_head(make, mode)
    head, (_, arguments) = model.get_layer("head"), make()
    x, upstream = zoo.normal(4, 5, DIM), zoo.normal(4, 5, VOCABULARY, seed=1)
    before = keras.ops.convert_to_numpy(head(x, **arguments))
    kernel = _kernel_of(head, arguments)
    if make is _capped:
        kernel = 0.5 * np.arctanh(kernel / 0.5)
        upstream_of_logits = upstream * (1 - (before / 0.5) ** 2)
    else:
        upstream_of_logits = upstream

    kra.inject(model, kra.LoRA(2), "head" if site else "below")
    after = keras.ops.convert_to_numpy(head(x, **arguments))
    np.testing.assert_array_equal(after, before)
    (of_x,) = gradients.gradients(_product(head, arguments), x, [], upstream)
    expected = upstream_of_logits @ kernel.T
    np.testing.assert_allclose(
        of_x, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max()
    )


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("make", EMBEDDINGS)
def test_adapters_below_a_quantized_head_learn_like_float(make, mode):
    found = {}
    x, y = zoo.normal(32, 5, DIM), zoo.integers(32, 5, high=VOCABULARY)
    for one in (None, mode):
        model = _with_head(make, one)
        before = zoo.outputs(model, x)
        kra.inject(model, kra.LoRA(2), "below")
        np.testing.assert_array_equal(zoo.outputs(model, x), before)
        model.compile(
            keras.optimizers.SGD(0.5),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        losses = model.fit(x, y, epochs=4, verbose=0).history["loss"]
        found[one] = losses[0] - losses[-1]
    assert found[None] > 0
    assert found[mode] == pytest.approx(found[None], rel=0.35)


def test_in_16_bits():
    head = keras.layers.ReversibleEmbedding(
        VOCABULARY, DIM, dtype="mixed_bfloat16", name="head"
    )
    head.build()
    inputs = keras.Input((5, DIM))
    hidden = keras.layers.Dense(DIM, name="below")(inputs)
    model = zoo.set_weights(keras.Model(inputs, head(hidden, reverse=True)))
    model.quantize("int8", filters="head")
    kra.inject(model, kra.LoRA(2), "below")
    model.compile(keras.optimizers.SGD(0.5), "mse")
    y = zoo.normal(16, 5, VOCABULARY)
    losses = model.fit(
        zoo.normal(16, 5, DIM), y, epochs=3, batch_size=16, verbose=0
    ).history["loss"]
    assert losses[-1] < losses[0]


def test_masked_lookups_still_work():
    inputs = keras.Input((5,), dtype="int32")
    head = keras.layers.ReversibleEmbedding(
        VOCABULARY, DIM, mask_zero=True, name="head"
    )
    hidden = keras.layers.Dense(DIM, name="below")(head(inputs))
    model = zoo.set_weights(keras.Model(inputs, head(hidden, reverse=True)))
    model.quantize("int8", filters="head")
    x = zoo.integers(4, 5, high=VOCABULARY)
    before = zoo.outputs(model, x)
    kra.inject(model, kra.LoRA(2), "below")
    np.testing.assert_array_equal(zoo.outputs(model, x), before)


@pytest.mark.one_backend
class TestClass:
    """The layer's class changes as that of a site does."""

    def test_eject_and_merge_restore_it(self):
        for end in (kra.eject, kra.merge):
            model = _with_head()
            head = model.get_layer("head")
            own = type(head)
            kra.inject(model, kra.LoRA(2), "below")
            assert type(head) is not own and isinstance(head, own)
            assert type(head).__name__ == own.__name__
            end(model)
            assert type(head) is own

    def test_a_head_that_becomes_a_site_and_stops_being_one(self):
        model = _with_head()
        head = model.get_layer("head")
        own = type(head)
        kra.inject(model, kra.LoRA(2), "below")
        carrying = type(head)
        kra.inject(model, kra.LoRA(2), "head", name="second")
        assert hasattr(head, "adapter")
        kra.eject(model, "second")
        assert type(head) is carrying and not hasattr(head, "adapter")
        kra.inject(model, kra.LoRA(2), "head", name="second")
        kra.eject(model, "default")
        assert hasattr(head, "adapter")
        kra.eject(model)
        assert type(head) is own

    def test_a_failed_injection_leaves_it(self):
        model = _with_head()
        head = model.get_layer("head")
        own = type(head)
        with pytest.raises(MemoryError):
            with FailingAssignment(1):
                kra.inject(model, kra.LoRA(2, initialization="pissa"), "below")
        assert type(head) is own
        assert not kra.sites(model)

    def test_float_heads_and_classes_with_a_product_of_their_own_stay(self):
        class Own(keras.layers.ReversibleEmbedding):
            def quantized_call(self, inputs, reverse=False):
                return super().quantized_call(inputs, reverse=reverse)

        for mode, make in (
            (None, _tied),
            ("int8", lambda: (Own(VOCABULARY, DIM, name="head"), _tied()[1])),
        ):
            model = _with_head(make, None)
            head = model.get_layer("head")
            own = type(head)
            if mode:
                head.quantize(mode, type_check=False)
            kra.inject(model, kra.LoRA(2), "below")
            assert type(head) is own

    def test_files_do_not_know_of_it(self, tmp_path):
        model = _with_head()
        plain = model.get_config()
        kra.inject(model, kra.LoRA(2), "below")
        zoo.randomize(model)
        x = zoo.normal(4, 5, DIM)
        expected = zoo.outputs(model, x)
        base = model.get_config()["base"]["config"]
        assert base["layers"] == plain["layers"]
        kra.save_adapter(model, tmp_path / "a.safetensors")
        model.save(tmp_path / "m.keras")
        again = keras.models.load_model(tmp_path / "m.keras")
        np.testing.assert_array_equal(zoo.outputs(again, x), expected)
        np.testing.assert_array_equal(
            zoo.outputs(copy.deepcopy(model), x), expected
        )
        other = _with_head()
        kra.load_adapter(other, tmp_path / "a.safetensors")
        np.testing.assert_array_equal(zoo.outputs(other, x), expected)

    def test_flags_and_variables_stay(self):
        model = _with_head()
        head = model.get_layer("head")
        before = [(v, v.trainable) for v in head.variables]
        kra.inject(model, kra.LoRA(2), "below")
        after = [(v, v.trainable) for v in head.variables]
        assert all(a is b for (a, _), (b, _) in zip(before, after))
        kra.eject(model)
        assert [(v, v.trainable) for v in head.variables] == before
