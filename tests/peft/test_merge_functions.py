"""TIES and DARE against PEFT's functions on the same updates."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt.matrices import merging
from tests import zoo

pytestmark = pytest.mark.skipif(
    keras.config.backend() != "torch", reason="PEFT's functions are PyTorch's"
)

WEIGHTS = [0.7, 1.4, 0.2]


def _deltas():
    """Updates of three LoRAs of rank 2, in float64."""
    rng = np.random.default_rng(0)
    return [
        rng.standard_normal((12, 2)) @ rng.standard_normal((2, 9))
        for _ in WEIGHTS
    ]


def _tensors(arrays):
    import torch

    return [torch.tensor(array) for array in arrays]


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties(density):
    import torch
    from peft.utils import merge_utils

    deltas = _deltas()
    expected = merge_utils.ties(
        _tensors(deltas), torch.tensor(WEIGHTS, dtype=torch.float64), density
    )
    found = merging.ties(deltas, WEIGHTS, density)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_dare(density):
    import torch
    from peft.utils import merge_utils

    deltas = _deltas()
    torch.manual_seed(0)
    expected = merge_utils.dare_linear(
        _tensors(deltas), torch.tensor(WEIGHTS, dtype=torch.float64), density
    )
    # What PEFT drew: a uniform number under the density keeps an entry.
    torch.manual_seed(0)
    ones = torch.ones(12, 9, dtype=torch.float64)
    kept = [merge_utils.random_pruning(ones, density, False) for _ in deltas]
    found = sum(
        weight * merging.drop_and_rescale(delta, density, 1.0 - mask.numpy())
        for weight, delta, mask in zip(WEIGHTS, deltas, kept)
    )
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-12, atol=1e-13)


def test_combine_is_peft_s_ties_on_a_model():
    """`combine` itself, on the factors of adapters in a model."""
    import torch
    from peft.utils import merge_utils

    inputs = keras.Input((12,))
    dense = keras.layers.Dense(9, name="site")
    model = keras.Model(inputs, dense(inputs))
    before = keras.ops.convert_to_numpy(dense.kernel)
    rng = np.random.default_rng(1)
    deltas = []
    for name in ("a", "b"):
        kra.inject(model, kra.LoRA(2), ["site"], name=name)
        (layer,) = kra.sites(model).values()
        adapter = layer.adapter.get(name)
        a = rng.standard_normal((12, 2)).astype("float32")
        b = rng.standard_normal((2, 9)).astype("float32")
        adapter.lora_a.assign(a)
        adapter.lora_b.assign(b)
        deltas.append(adapter.scaling * a.astype("float64") @ b)
    with pytest.warns(kra.AdapterWarning, match="larger than the kernel"):
        kra.combine(
            model, {"a": 0.7, "b": 0.6}, "ab", method="ties", density=0.4
        )
    kra.set_active(model, "ab")
    x = zoo.normal(5, 12)
    found = model.predict(x, verbose=0) - x @ before
    expected = merge_utils.ties(
        _tensors(deltas), torch.tensor([0.7, 0.6], dtype=torch.float64), 0.4
    ).numpy()
    np.testing.assert_allclose(found, x @ expected, rtol=1e-4, atol=1e-4)
