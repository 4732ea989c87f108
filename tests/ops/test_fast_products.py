"""`ops.fast_products` gives what Keras's operations give."""

import re

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt.ops import fast_products
from tests import gradients
from tests import zoo

pytestmark = pytest.mark.needs_optimizer


@pytest.mark.parametrize(
    "dtypes",
    [
        ("float32", "float32"),
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
        ("float32", "bfloat16"),
        ("int8", "float32"),
    ],
    ids=str,
)
def test_matmul(dtypes):
    x, y = (
        keras.ops.cast(4 * zoo.normal(*shape), dtype)
        for shape, dtype in zip(((2, 3, 5), (5, 4)), dtypes)
    )
    got, expected = fast_products.matmul(x, y), keras.ops.matmul(x, y)
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(
        *(
            keras.ops.convert_to_numpy(keras.ops.cast(z, "float32"))
            for z in (got, expected)
        )
    )


def test_reshape():
    x = keras.ops.convert_to_tensor(zoo.normal(2, 3, 4))
    x = keras.ops.transpose(x, (0, 2, 1))
    got = fast_products.reshape(x, (-1, 6))
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(got),
        keras.ops.convert_to_numpy(keras.ops.reshape(x, (-1, 6))),
    )


def test_what_is_no_tensor():
    """Variables, arrays and symbolic tensors, as Keras takes them."""
    array = zoo.normal(3, 3)
    variable = keras.Variable(array)
    expected = array @ array
    for x in (array, variable):
        got = keras.ops.convert_to_numpy(fast_products.matmul(x, variable))
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        assert tuple(fast_products.reshape(x, (9,)).shape) == (9,)
    symbolic = keras.Input((5, 3))
    assert fast_products.matmul(symbolic, array).shape == (None, 5, 3)
    assert fast_products.reshape(symbolic, (-1, 3)).shape == (None, 3)


@pytest.mark.parametrize("shape", [(7, 20), (2, 3, 20)], ids=str)
@pytest.mark.parametrize("columns", [3, 30])
@pytest.mark.parametrize("training", [True, False])
def test_thin_product(shape, columns, training):
    x, matrix = zoo.normal(*shape), zoo.normal(20, columns, seed=1)
    upstream = zoo.normal(*shape[:-1], columns, seed=2)
    y = fast_products.thin_product(
        *map(keras.ops.convert_to_tensor, (x, matrix)), training
    )
    y = keras.ops.convert_to_numpy(y)
    np.testing.assert_allclose(y, x @ matrix, atol=1e-5)
    variable = keras.Variable(matrix)

    def product(x):
        return fast_products.thin_product(
            x, keras.ops.convert_to_tensor(variable), training
        )

    of_x, of_matrix = gradients.gradients(product, x, [variable], upstream)
    np.testing.assert_allclose(of_x, upstream @ matrix.T, atol=1e-4)
    expected = x.reshape(-1, 20).T @ upstream.reshape(-1, columns)
    np.testing.assert_allclose(of_matrix, expected, atol=1e-4)


@pytest.mark.skipif(
    keras.config.backend() == "tensorflow",
    reason="TensorFlow computes both at nearly one rate",
)
def test_a_gradient_is_computed_by_columns():
    """`(g' x)'` rather than `x' g`, which is several times slower on a CPU."""
    x, matrix = zoo.normal(50, 20), zoo.normal(20, 3, seed=1)
    if keras.config.backend() == "jax":
        import jax

        gradient = jax.grad(
            lambda a: (fast_products.thin_product(x, a, True) ** 2).sum()
        )
        compiled = jax.jit(gradient).lower(matrix).compile().as_text()
        products = re.findall(r"= f32\[(\d+,\d+)\]\S* dot\(", compiled)
        assert sorted(products) == ["3,20", "50,3"]
    else:
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode

        results = []

        class Record(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                y = function(*args, **(kwargs or {}))
                if function is torch.ops.aten.mm.default:
                    results.append(tuple(y.shape))
                return y

        matrix = torch.tensor(matrix, requires_grad=True)
        with Record():
            y = fast_products.thin_product(torch.tensor(x), matrix, True)
            y.sum().backward()
        assert results == [(50, 3), (3, 20)]


@pytest.mark.parametrize("by_columns", [False, True])
def test_plus_products(by_columns):
    """`y` may have its stacks side by side in memory, as an einsum gives it."""
    y, x = zoo.normal(3, 7, 5), zoo.normal(3, 7, 2, seed=1)
    matrices = zoo.normal(3, 2, 5, seed=2)
    upstream = zoo.normal(3, 7, 5, seed=3)
    variables = [keras.Variable(x), keras.Variable(matrices)]

    def product(y):
        if by_columns:
            y = keras.ops.transpose(y, (1, 0, 2))
        tensors = map(keras.ops.convert_to_tensor, variables)
        return fast_products.plus_products(y, *tensors)

    given = y.transpose(1, 0, 2).copy() if by_columns else y
    got = keras.ops.convert_to_numpy(
        product(keras.ops.convert_to_tensor(given))
    )
    np.testing.assert_allclose(got, y + x @ matrices, atol=1e-5)
    of_y, of_x, of_matrices = gradients.gradients(
        product, given, variables, upstream
    )
    if by_columns:
        of_y = of_y.transpose(1, 0, 2)
    np.testing.assert_allclose(of_y, upstream, atol=1e-6)
    np.testing.assert_allclose(
        of_x, upstream @ matrices.transpose(0, 2, 1), atol=1e-5
    )
    np.testing.assert_allclose(
        of_matrices, x.transpose(0, 2, 1) @ upstream, atol=1e-5
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_plus_products_of_16_bits(dtype):
    arrays = [zoo.normal(2, 3, 4), zoo.normal(2, 3, 4), zoo.normal(2, 4, 4)]
    y, x, matrices = (keras.ops.cast(one, dtype) for one in arrays)
    got = fast_products.plus_products(y, x, matrices)
    assert keras.backend.standardize_dtype(got.dtype) == dtype
    got = keras.ops.convert_to_numpy(keras.ops.cast(got, "float32"))
    np.testing.assert_allclose(got, arrays[0] + arrays[1] @ arrays[2], atol=0.1)


only_torch = pytest.mark.skipif(
    keras.config.backend() != "torch", reason="tests PyTorch"
)


@only_torch
def test_experts_add_their_updates_in_the_product():
    """A sum of its own takes a tenth of a step of a mixture on a CPU."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    sums, products = [], []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            y = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.baddbmm.default:
                products.append(y.shape)
            elif function is torch.ops.aten.add.Tensor:
                sums.append(y.shape)
            return y

    model, x, targets = zoo.experts()
    kra.inject(model, kra.LoRA(2), targets)
    x = keras.ops.convert_to_tensor(x)
    with Record():
        model(x)
    assert products == [(3, 8, 8), (3, 8, 6)]
    # The layer adds its own bias.
    assert [one for one in sums if len(one) == 3] == [(3, 8, 6)]


@only_torch
def test_matmul_under_autocast():
    """Keras gives the dtype of the arguments, and PyTorch the lower one."""
    import torch

    x = keras.ops.convert_to_tensor(zoo.normal(5, 5))
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = fast_products.matmul(x, x), keras.ops.matmul(x, x)
    assert got.dtype == expected.dtype == torch.float32


@only_torch
@pytest.mark.parametrize(
    "adapter", [kra.LoRA(2), kra.RLoRA(4), kra.RandLoRA(2)], ids=repr
)
@pytest.mark.parametrize("kind", ["Dense", "EinsumDense"])
def test_a_site_takes_tensors_of_another_device(kind, adapter):
    """As Keras's layers do: here from memory, as to a GPU."""
    import torch

    layer = keras.layers.Dense(4)
    if kind == "EinsumDense":
        layer = keras.layers.EinsumDense("...a,ab->...b", (4,))
    model = keras.Sequential([keras.Input((3, 8)), layer])
    kra.inject(model, adapter, "all-linear")
    x = torch.ones(2, 3, 8)
    assert layer(x).shape == (2, 3, 4)
    with keras.device("meta"):
        y = layer(x)
    assert y.device.type == "meta" and y.shape == (2, 3, 4)
