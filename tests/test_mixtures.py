"""KerasHub's mixtures of experts: what is in reach, and that it is computed."""

import math
import re

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt import _compat
from keras_randadapt.sites import experts
from tests import methods
from tests import zoo

COMMON = dict(
    vocabulary_size=20,
    num_layers=1,
    num_query_heads=2,
    num_key_value_heads=1,
    hidden_dim=8,
)
QWEN = dict(num_experts=4, top_k=2, moe_intermediate_dim=8)

#: The arguments of a tiny backbone of each family.
FAMILIES = {
    "Mixtral": dict(intermediate_dim=8, num_experts=4, top_k=2),
    "QwenMoe": dict(
        **QWEN, intermediate_dim=8, shared_expert_intermediate_dim=8
    ),
    "Qwen3Moe": dict(**QWEN, intermediate_dim=8, head_dim=4),
    "Qwen3_5Moe": dict(
        **QWEN,
        head_dim=8,
        shared_expert_intermediate_size=8,
        layer_types=["full_attention"],
    ),
    "GptOss": dict(intermediate_dim=8, num_experts=4),
    "Gemma4": dict(
        image_size=8,
        intermediate_dim=8,
        head_dim=4,
        enable_moe_block=True,
        num_experts=4,
        expert_intermediate_dim=8,
        num_experts_per_token=2,
    ),
}

#: Arguments that are widths of a feed-forward network.
_WIDTHS = (
    "moe_intermediate_dim",
    "intermediate_dim",
    "shared_expert_intermediate_dim",
    "shared_expert_intermediate_size",
    "expert_intermediate_dim",
)


def make(family, seed=0):
    backbone = zoo.backbone(family)
    model = backbone(**COMMON, **FAMILIES[family])
    for i, weight in enumerate(model.weights):
        if "scale" not in weight.path and "norm" not in weight.path:
            weight.assign(0.3 * zoo.normal(*weight.shape, seed=seed + i))
    return model


def inputs(model):
    ids = zoo.integers(2, 4, high=20)
    found = {}
    for name, tensor in model.input.items():
        found[name] = np.ones((2, 4), "int32")
        if name == "token_ids":
            found[name] = ids
        elif name == "position_ids":
            found[name] = np.tile(np.arange(4, dtype="int32"), (2, 1))
        elif tuple(tensor.shape) != (None, None):
            sizes = [2 if size is None else size for size in tensor.shape]
            sizes[1] = 0 if tensor.shape[1] is None else sizes[1]
            found[name] = np.zeros(sizes, tensor.dtype)
    return found


def outputs(model):
    return methods.numpy(model(inputs(model)))


def train(model):
    """A step of `fit`, and values that change outputs."""
    y = np.zeros(outputs(model).shape)
    model.compile("adam", "mse")
    model.fit(inputs(model), y, verbose=0)
    randomize(model)


def randomize(model):
    for i, weight in enumerate(model.trainable_variables):
        weight.assign(0.2 * zoo.normal(*weight.shape, seed=70 + i))


def out_of_reach(model, report):
    """`(share, variables)`: what no adapter of a model adapts.

    Returns:
        The share of the parameters, embeddings apart, and the variables.
    """
    tables = {
        id(variable)
        for layer in _compat.flatten_layers(model)
        if isinstance(layer, keras.layers.Embedding)
        for variable in layer.weights
    }
    adapters = {id(v) for v in model.trainable_variables}
    layers = model._randadapt.layers
    reached = {id(layers[address]._kernel) for address in report.sites}
    whole = [v for v in model.variables if id(v) not in tables | adapters]
    left = [v for v in whole if id(v) not in reached]
    sizes = [sum(math.prod(v.shape) for v in part) for part in (left, whole)]
    return sizes[0] / sizes[1], left


@pytest.mark.parametrize(
    "family",
    [
        "Mixtral",
        *(
            pytest.param(name, marks=pytest.mark.slow("one of many families"))
            for name in FAMILIES
            if name != "Mixtral"
        ),
    ],
)
def test_experts_of_a_family(family):
    model = make(family)
    before = [methods.numpy(v) for v in model.variables]
    base = outputs(model)
    report = kra.inject(model, kra.LoRA(2), "all-linear", experts=True)
    kernels = [a for a in report.sites if model._randadapt.layers.is_kernel(a)]
    # Gate and up are one kernel in some families.
    assert len(kernels) in (2, 3)
    np.testing.assert_array_equal(outputs(model), base)
    randomize(model)
    trained = outputs(model)
    assert np.abs(trained - base).max() > 1e-3
    with kra.merged(model):
        methods.close(outputs(model), trained, 1e-4)
    with kra.disabled(model):
        np.testing.assert_array_equal(outputs(model), base)
    kra.eject(model)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(methods.numpy(variable), value)


#: What no method for kernels adapts: it steers experts, or is added to them.
_STEERS = re.compile("router|gate_dense/kernel|gate/kernel|bias")


@pytest.mark.one_backend
@pytest.mark.slow("it builds a mixture of every family")
@pytest.mark.parametrize("family", FAMILIES)
def test_share_in_reach(family):
    """Above 95 per cent, in widths where the rest no longer counts.

    The rest, routers, biases and scales, grows with the width, and kernels
    with its square, so that real mixtures have more in reach than these.
    """
    backbone = zoo.backbone(family)
    lefts = []
    for width in (64, 128):
        wider = {name: width for name in _WIDTHS if name in FAMILIES[family]}
        model = backbone(
            **{**COMMON, **FAMILIES[family], "hidden_dim": width, **wider}
        )
        report = kra.inject(model, kra.LoRA(2), "all-linear", experts=True)
        share, variables = out_of_reach(model, report)
        lefts.append(share)
        assert not [
            v.path
            for v in variables
            if len(v.shape) > 1 and not _STEERS.search(v.path)
        ]
    assert lefts[1] < lefts[0] < 0.05


_QUANTIZED = [
    pytest.param(
        family,
        mode,
        marks=pytest.mark.one_backend("torch")
        if (family, mode) == ("Mixtral", "int8")
        else pytest.mark.slow("one of many families"),
    )
    for family in FAMILIES
    for mode in ("int8", "int4")
]


@pytest.mark.parametrize(("family", "mode"), _QUANTIZED)
def test_experts_of_a_quantized_mixture(family, mode, tmp_path):
    """KerasHub's experts have no quantized form, so they stay float."""
    floating = make(family)
    kra.inject(floating, kra.LoRA(2), _is_bank)
    kra.save_adapter(floating, tmp_path / "float.safetensors")
    model = make(family)
    (bank,) = filter(_is_bank, _compat.flatten_layers(model))
    kernels = [methods.numpy(v) for v in bank.weights]
    model.quantize(mode)
    assert any(
        layer.quantization_mode == mode
        for layer in _compat.flatten_layers(model)
    )
    # A release that quantizes experts fails here, and is to be adapted.
    assert bank.quantization_mode is None
    for variable, kernel in zip(bank.weights, kernels, strict=True):
        np.testing.assert_array_equal(methods.numpy(variable), kernel)

    before = [methods.numpy(v) for v in model.variables]
    base = outputs(model)
    # KerasHub's block reads the integers of these layers.
    exclude = re.compile("ffw_") if family == "Gemma4" else None
    report = kra.inject(
        model, kra.LoRA(2), "all-linear", experts=True, exclude=exclude
    )
    kinds = {model._randadapt.layers[a].quantization_mode for a in report.sites}
    assert kinds == {None, mode}
    np.testing.assert_array_equal(outputs(model), base)
    train(model)
    trained = outputs(model)
    assert np.abs(trained - base).max() > 1e-3
    with kra.merged(model):
        # Other kernels are quantized anew.
        error = np.abs(outputs(model) - trained).mean()
        assert error < 0.9 * np.abs(base - trained).mean()
    np.testing.assert_array_equal(outputs(model), trained)
    kra.eject(model)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(methods.numpy(variable), value)

    # Experts alone are merged exactly, and take files of a float model.
    kra.load_adapter(model, tmp_path / "float.safetensors")
    randomize(model)
    trained = outputs(model)
    kra.merge(model)
    methods.close(outputs(model), trained, 1e-4)
    assert bank.quantization_mode is None


def _is_bank(layer):
    return bool(experts.sites_of(layer))
