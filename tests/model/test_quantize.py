"""`inject(..., quantize=...)`."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt.model import attach
from tests import quantizing
from tests import zoo


def _modes(model):
    return {
        layer.name: layer.quantization_mode
        for layer in model.layers
        if layer.weights
    }


def _state(model):
    """All that injection must leave as it was when it fails."""
    return (
        [(type(layer), set(vars(layer))) for layer in model.layers],
        [(id(v), v.path, v.trainable, v.dtype) for v in model.variables],
        _modes(model),
        [layer.dtype_policy.name for layer in model.layers],
    )


@pytest.mark.cpu_seconds(10, reason="a model is quantized twice")
@pytest.mark.parametrize("mode", ["int4", "float8"])
def test_one_call(mode):
    x = quantizing.ids()
    by_hand = quantizing.model()
    names = ["query", "up", "down"]
    if mode == "int4":
        names.append("embedding")
    by_hand.quantize(mode, filters=lambda layer: layer.name in names)
    base = zoo.outputs(by_hand, x)

    model = quantizing.model()
    kra.inject(model, kra.LoRA(2), "up", keep_trainable="head", quantize=mode)
    assert _modes(model) == {
        "embedding": mode if mode == "int4" else None,
        **dict.fromkeys(("query", "up", "down"), mode),
        "head": None,
    }
    np.testing.assert_array_equal(zoo.outputs(model, x), base)
    assert all(
        "/adapter/" in v.path or v.path.startswith("head")
        for v in model.trainable_variables
    )
    kra.eject(model)
    np.testing.assert_array_equal(zoo.outputs(model, x), base)


@pytest.mark.one_backend
def test_gptq_by_a_config():
    model = quantizing.model()
    inputs = keras.Input((quantizing.LENGTH, 10))
    block = keras.Model(inputs, model.get_layer("up")(inputs))
    config = keras.quantizers.GPTQConfig(
        dataset=[np.arange(60) % quantizing.VOCABULARY],
        tokenizer=str,
        num_samples=1,
        sequence_length=quantizing.LENGTH,
        group_size=-1,
        quantization_layer_structure={
            "pre_block_layers": [
                model.get_layer("embedding"),
                model.get_layer("query"),
                model.layers[3],
            ],
            "sequential_blocks": [block],
        },
    )
    kra.inject(model, kra.LoRA(2), "up", quantize=config)
    layer = model.get_layer("up")
    assert layer.quantization_mode == "gptq" and layer.is_gptq_calibrated
    before = zoo.outputs(model, quantizing.ids())
    zoo.randomize(model)
    after = zoo.outputs(model, quantizing.ids())
    assert np.abs(after - before).max() > 0.01


@pytest.mark.parametrize("stage", ["quantize", "attach"])
def test_a_failure_leaves_the_model_as_it_was(stage, monkeypatch):
    model = quantizing.model()
    x = quantizing.ids()
    before, outputs = _state(model), zoo.outputs(model, x)

    def fail(*args, **kwargs):
        raise RuntimeError("no memory")

    if stage == "quantize":
        # The layers before it are quantized by then.
        monkeypatch.setattr(model.get_layer("down"), "quantize", fail)
        before = _state(model)
    else:
        monkeypatch.setattr(attach, "add_adapter", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        kra.inject(model, kra.LoRA(2), "up", quantize="int4")
    assert _state(model) == before
    np.testing.assert_array_equal(zoo.outputs(model, x), outputs)
    monkeypatch.undo()
    kra.inject(model, kra.LoRA(2), "up", quantize="int8")
    zoo.fit(model, x, steps=1)


@pytest.mark.one_backend
def test_a_kernel_that_needs_floats_stays_float():
    """A kernel that is no plain matrix product can't be adapted quantized."""
    model, _, targets = zoo.einsum_shared()
    with pytest.raises(ValueError, match="has no layer to quantize"):
        kra.inject(model, kra.LoRA(2), targets, quantize="int8")


@pytest.mark.cpu_seconds(12, reason="KerasHub is imported")
@pytest.mark.one_backend
def test_the_head_of_a_task_stays_float():
    model, _, targets = zoo.bert_classifier()
    kra.inject(
        model, kra.LoRA(2), targets, keep_trainable="logits", quantize="int8"
    )
    modes = {
        layer.name: layer.quantization_mode
        for layer in model._flatten_layers()
        if isinstance(layer, (keras.layers.Dense, keras.layers.EinsumDense))
    }
    floats = {name for name, mode in modes.items() if mode is None}
    assert "logits" in floats and len(floats) < len(modes) / 2


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "given, error, match",
    [
        ("gptq", ValueError, "which GPTQ and AWQ need"),
        ("fp4", ValueError, "quantize='fp4'"),
        (4, TypeError, "quantize=4"),
    ],
)
def test_bad_arguments(given, error, match):
    model = quantizing.model()
    before = _state(model)
    with pytest.raises(error, match=match):
        kra.inject(model, kra.LoRA(2), "up", quantize=given)
    assert _state(model) == before


@pytest.mark.one_backend
def test_quantized_or_adapted_already():
    model = quantizing.quantized("int8")
    with pytest.raises(ValueError, match="has quantized layers already"):
        kra.inject(model, kra.LoRA(2), "up", quantize="int8")
    model = quantizing.model()
    kra.inject(model, kra.LoRA(2), "up")
    with pytest.raises(ValueError, match="with the first adapter"):
        kra.inject(model, kra.LoRA(2), "up", name="b", quantize="int8")
