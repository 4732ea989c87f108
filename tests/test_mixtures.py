"""KerasHub's mixtures of experts: what is in reach, and that it is computed."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt import _compat
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


def randomize(model):
    for i, weight in enumerate(model.trainable_variables):
        weight.assign(0.2 * zoo.normal(*weight.shape, seed=70 + i))


def share_in_reach(model, report):
    """The share of the parameters in adapted kernels, embeddings apart."""
    tables = {
        id(variable)
        for layer in _compat.flatten_layers(model)
        if isinstance(layer, keras.layers.Embedding)
        for variable in layer.weights
    }
    adapters = {id(v) for v in model.trainable_variables}
    whole = sum(
        int(np.prod(v.shape))
        for v in model.variables
        if id(v) not in tables | adapters
    )
    state = model._randadapt
    reached = sum(
        int(np.prod(state.layers[a]._kernel.shape)) for a in report.sites
    )
    return reached / whole


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
    experts = [a for a in report.sites if model._randadapt.layers.is_kernel(a)]
    # Gate and up are one kernel in some families.
    assert len(experts) in (2, 3)
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


@pytest.mark.one_backend
@pytest.mark.slow("it builds a mixture of every family")
@pytest.mark.parametrize("family", FAMILIES)
def test_share_in_reach(family):
    """At least 95 per cent, in sizes that are nearer to real ones."""
    backbone = zoo.backbone(family)
    wider = {
        name: 64
        for name in (
            "moe_intermediate_dim",
            "intermediate_dim",
            "shared_expert_intermediate_dim",
            "shared_expert_intermediate_size",
            "expert_intermediate_dim",
        )
        if name in FAMILIES[family]
    }
    model = backbone(
        **{**COMMON, **FAMILIES[family], "hidden_dim": 64, **wider}
    )
    report = kra.inject(model, kra.LoRA(2), "all-linear", experts=True)
    assert share_in_reach(model, report) >= 0.95
