"""Checks that the tests of several methods use."""

import keras
import numpy as np

from keras_randadapt.sites.site import Site
from tests import zoo


def site_of(view, address="", **facts):
    """A `Site` with a kernel view `(input_dim, output_dim)`."""
    input_dim, output_dim = view
    return Site(
        input_dim=input_dim, output_dim=output_dim, address=address, **facts
    )


numpy = zoo.numpy


def close(got, expected, tolerance=1e-5):
    """Asserts equality up to `tolerance` times the largest expected value."""
    np.testing.assert_allclose(
        numpy(got),
        expected,
        rtol=tolerance,
        atol=tolerance * max(np.abs(expected).max(), 1e-30),
    )


def randomize(adapter, seed=1):
    """Gives trained weights normal values and returns these as float64."""
    values = {}
    for i, weight in enumerate(adapter.trainable_variables):
        value = zoo.normal(*weight.shape, seed=seed + i)
        weight.assign(value)
        values[weight.name] = value.astype("float64")
    return values


def roberta(num_layers=12, hidden_dim=768, num_heads=12, intermediate_dim=64):
    """A backbone whose attention has RoBERTa-base's shapes by default."""
    import keras_hub

    return keras_hub.models.RobertaBackbone(
        vocabulary_size=50,
        num_layers=num_layers,
        num_heads=num_heads,
        hidden_dim=hidden_dim,
        intermediate_dim=intermediate_dim,
        max_sequence_length=8,
    )


def check_products(adapter, dense, tolerance=1e-5):
    """Asserts that all products of an additive adapter are its delta's.

    Args:
        adapter: A built adapter.
        dense: Its delta, `(input_dim, output_dim)`, computed independently.
        tolerance: float.
    """
    tensor = keras.ops.convert_to_tensor
    x = zoo.normal(3, 2, dense.shape[0])
    z = zoo.normal(3, 2, dense.shape[1])
    ids = zoo.integers(2, 5, high=dense.shape[0])
    for got, expected in (
        (adapter.delta_kernel(), dense),
        (adapter.delta(tensor(x)), x @ dense),
        (adapter.delta_transpose(tensor(z)), z @ dense.T),
        (adapter.lookup(tensor(ids), "float32"), dense[ids]),
    ):
        close(got, expected, tolerance)
    if adapter.factors() is not None:
        check_factors(adapter, dense, tolerance)


def check_factors(adapter, dense, tolerance=1e-5):
    """Asserts that an adapter has factors, and that they are its delta's."""
    left, right = map(numpy, adapter.factors())
    assert left.dtype == right.dtype == "float32"
    close(left.astype("float64") @ right, dense, tolerance)
