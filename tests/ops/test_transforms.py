import contextlib
import functools
import os
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest

from keras_randadapt import random
from keras_randadapt.hadamard import hadamard
from keras_randadapt.hadamard import window_order
from keras_randadapt.ops import RandomizedTransform
from keras_randadapt.ops import fwht
from keras_randadapt.ops import randomized_transform

pytestmark = pytest.mark.needs_optimizer

BACKEND = keras.config.backend()
only_jax = pytest.mark.skipif(BACKEND != "jax", reason="tests JAX")
only_tensorflow = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="tests TensorFlow"
)
only_torch = pytest.mark.skipif(BACKEND != "torch", reason="tests PyTorch")
differentiable = pytest.mark.skipif(
    BACKEND == "numpy", reason="NumPy has no gradients"
)


def normal(*shape, dtype="float32"):
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype)


def to_numpy(x):
    return keras.ops.convert_to_numpy(keras.ops.cast(x, "float32"))


def vjp(function, x, upstream):
    """The gradient of `sum(upstream * function(x))`."""
    if BACKEND == "jax":
        import jax

        return jax.vjp(function, x)[1](upstream)[0]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        x = tf.convert_to_tensor(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        return tape.gradient(y, x, tf.convert_to_tensor(upstream))
    import torch

    # As a graph, so that this can be differentiated again.
    x = torch.as_tensor(x).requires_grad_()
    upstream = torch.as_tensor(upstream)
    return torch.autograd.grad(function(x), x, upstream, create_graph=True)[0]


def compiled(function):
    """Compiled by XLA."""
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    import tensorflow as tf

    return tf.function(function, jit_compile=True)


@functools.lru_cache
def dense_stage(order):
    """The orthogonal matrix of one stage, from its definition."""
    window = window_order(order)
    if window is None:
        return hadamard(order)
    first, last = np.eye(order), np.eye(order)
    first[:window, :window] = hadamard(window)
    last[-window:, -window:] = hadamard(window)
    return last @ first


def dense_transform(order, signs, inputs, outputs):
    """`Select H B_k ... H B_1 Embed`, from its definition."""
    product = np.eye(order)
    for row in signs:
        product = dense_stage(order) @ np.diag(row) @ product
    return np.eye(order)[outputs] @ product @ np.eye(order)[:, inputs]


def make(order, stages, inputs, outputs, scatter=False, gather=False):
    """A plan and its dense matrix."""
    signs = random.signs(0, "test", (stages, order))
    input_index = random.permutation(0, "in", order)[:inputs]
    output_index = random.permutation(0, "out", order)[:outputs]
    plan = RandomizedTransform(
        order,
        signs,
        inputs,
        outputs,
        input_index if scatter else None,
        output_index if gather else None,
    )
    matrix = dense_transform(
        order,
        signs,
        input_index if scatter else np.arange(inputs),
        output_index if gather else np.arange(outputs),
    )
    return plan, matrix


# Order, stages, input and output dimensions, scattered, gathered.
CASES = [
    (1, 1, 1, 1, False, False),
    (2, 2, 2, 1, False, False),
    (3, 1, 2, 3, True, False),
    (5, 3, 5, 5, False, False),
    (7, 2, 3, 6, False, True),
    # Not symmetric, one and several stages.
    (20, 1, 20, 20, False, False),
    (20, 3, 11, 9, True, True),
    (64, 2, 64, 8, False, False),
    # Keep one row; fewer inputs than the last factor has columns.
    (768, 2, 768, 1, False, False),
    (768, 1, 5, 40, False, False),
    (768, 2, 512, 512, False, False),
    (768, 2, 700, 512, True, True),
    (1024, 3, 1000, 100, False, True),
    (1600, 1, 1600, 200, False, False),
    # Windows: 1031 and 257 are prime.
    (1031, 2, 1031, 1031, False, False),
    (257, 1, 200, 17, True, False),
    (257, 2, 17, 200, False, True),
]


# `fwht` against the dense matrix.


@pytest.mark.parametrize(
    "order", [1, 2, 3, 7, 12, 20, 43, 44, 64, 256, 768, 1280, 1600, 3072]
)
def test_fwht(order):
    x = normal(3, order)
    matrix = hadamard(order)
    np.testing.assert_allclose(to_numpy(fwht(x)), x @ matrix.T, atol=2e-5)
    transposed = fwht(x, transpose=True)
    np.testing.assert_allclose(to_numpy(transposed), x @ matrix, atol=2e-5)
    np.testing.assert_allclose(
        to_numpy(fwht(x, normalize=False)) / order**0.5,
        x @ matrix.T,
        atol=2e-5,
    )


#: A dense matrix of this order takes 4 CPU seconds.
LARGEST = pytest.param(11008, marks=pytest.mark.slow)


@pytest.mark.parametrize("order", [4096, LARGEST])
def test_fwht_of_large_orders(order):
    x = normal(2, order)
    y = to_numpy(fwht(x))
    rows = np.random.default_rng(0).integers(order, size=50)
    matrix = hadamard(order)[rows]
    np.testing.assert_allclose(y[:, rows], x @ matrix.T, atol=2e-5)
    back = to_numpy(fwht(y, transpose=True))
    np.testing.assert_allclose(back, x, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -4, -2])
def test_fwht_axis(axis):
    x = normal(12, 4, 20, 3)
    matrix = hadamard(x.shape[axis])
    expected = np.moveaxis(np.moveaxis(x, axis, -1) @ matrix.T, -1, axis)
    actual = fwht(x, axis=axis)
    np.testing.assert_allclose(to_numpy(actual), expected, atol=1e-5)


def test_fwht_of_a_vector_and_of_nothing():
    x = normal(24)
    np.testing.assert_allclose(to_numpy(fwht(x)), hadamard(24) @ x, atol=1e-5)
    assert tuple(fwht(np.zeros((0, 24), "float32")).shape) == (0, 24)
    assert tuple(fwht(np.zeros((2, 0, 768), "float32")).shape) == (2, 0, 768)
    assert tuple(fwht(np.zeros((24, 0), "float32"), axis=0).shape) == (24, 0)


def test_fwht_takes_variables():
    variable = keras.Variable(normal(3, 12))
    expected = to_numpy(variable) @ hadamard(12).T
    np.testing.assert_allclose(to_numpy(fwht(variable)), expected, atol=1e-5)


# `randomized_transform` against the dense matrix.


@pytest.mark.parametrize("case", CASES, ids=str)
def test_randomized_transform(case):
    plan, matrix = make(*case)
    x, y = normal(2, plan.input_dim), normal(2, plan.output_dim)
    forward = to_numpy(randomized_transform(x, plan))
    np.testing.assert_allclose(forward, x @ matrix.T, atol=2e-5)
    adjoint = to_numpy(randomized_transform(y, plan, adjoint=True))
    np.testing.assert_allclose(adjoint, y @ matrix, atol=2e-5)
    np.testing.assert_allclose(
        np.sum(forward * y), np.sum(x * adjoint), rtol=1e-4, atol=1e-4
    )


@pytest.mark.one_backend("torch")
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("order", [3, 20, 96, 257])
def test_plan_is_dense_transform(order, stages):
    for inputs in {order, max(1, order - 1), order // 3}:
        for outputs in {order, max(1, order // 2), 2}:
            for scatter in (False, True):
                for gather in (False, True):
                    arguments = order, stages, inputs, outputs, scatter, gather
                    plan, matrix = make(*arguments)
                    np.testing.assert_allclose(
                        plan.dense(), matrix, atol=1e-12, err_msg=str(plan)
                    )


@pytest.mark.parametrize(
    "order", [pytest.param(30522, marks=pytest.mark.slow), 50257]
)
def test_vocabulary_sizes_are_orthogonal(order):
    plan, _ = _plan_only(order, 2, order, 40)
    x = np.eye(40, dtype="float32")
    rows = to_numpy(randomized_transform(x, plan, adjoint=True))
    np.testing.assert_allclose(rows @ rows.T, np.eye(40), atol=1e-5)
    # Mixed over all coordinates: none has more than its share.
    assert np.abs(rows).max() < 8 / order**0.5


def _plan_only(order, stages, inputs, outputs):
    signs = random.signs(0, "test", (stages, order))
    return RandomizedTransform(order, signs, inputs, outputs), signs


def test_leading_rows_cost_less():
    plan, _ = _plan_only(768, 1, 768, 8)
    first = plan.program.steps[1]
    shapes = [m.shape for m in first.matrices]
    assert shapes == [(1, 12)] + 3 * [(1, 2)] + 3 * [(2, 2)]
    products = [f.matrix.shape for f in first.grouped(31, exact=False)]
    assert products == [(8, 768)]


def test_batch_shapes():
    plan, matrix = make(24, 2, 20, 10)
    for batch in ((), (0,), (1,), (2, 3), (2, 0, 3), (2, 1, 2, 3)):
        x = normal(*batch, 20)
        y = to_numpy(randomized_transform(x, plan))
        assert y.shape == (*batch, 10)
        np.testing.assert_allclose(y, x @ matrix.T, atol=1e-5)


def test_identity_plan_has_orthonormal_rows():
    plan, _ = make(768, 2, 768, 512)
    rows = plan.dense()
    np.testing.assert_allclose(rows @ rows.T, np.eye(512), atol=1e-12)


# Precision.


@pytest.mark.parametrize(
    "dtype,tolerance", [("float16", 2e-3), ("bfloat16", 1e-2)]
)
@pytest.mark.parametrize("order", [768, 2048, 4096, LARGEST])
def test_low_precision_fwht(order, dtype, tolerance):
    x = keras.ops.cast(16 * normal(4, order), dtype)
    exact = to_numpy(x) @ hadamard(order).T
    y = fwht(x)
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    error = np.linalg.norm(to_numpy(y) - exact) / np.linalg.norm(exact)
    assert error < tolerance


@pytest.mark.parametrize(
    "dtype,tolerance", [("float16", 3e-3), ("bfloat16", 2e-2)]
)
@pytest.mark.parametrize("stages", [1, 2])
def test_low_precision_plan(stages, dtype, tolerance):
    plan, matrix = make(1536, stages, 1500, 512)
    x = keras.ops.cast(normal(4, 1500), dtype)
    exact = to_numpy(x) @ matrix.T
    y = randomized_transform(x, plan)
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    error = np.linalg.norm(to_numpy(y) - exact) / np.linalg.norm(exact)
    assert error < tolerance


def test_float16_does_not_overflow():
    # The sum of the first row is 65,536 before it is divided by 64, and
    # 65,504 is the largest float16.
    x = keras.ops.cast(np.full((1, 4096), 16.0), "float16")
    y = to_numpy(fwht(x))
    assert y[0, 0] == 1024.0
    assert np.all(y[0, 1:] == 0)


@pytest.mark.skipif(
    BACKEND not in ("jax", "tensorflow"), reason="tests what XLA compiles"
)
@pytest.mark.parametrize(
    "dtype,tolerance", [("float16", 3e-3), ("bfloat16", 2e-2)]
)
@pytest.mark.parametrize(
    "case",
    ["fwht", (1536, 2, 1500, 512, False, False), (257, 2, 17, 200, True, True)],
    ids=str,
)
def test_low_precision_compiled(case, dtype, tolerance):
    if case == "fwht":
        apply, matrix = fwht, hadamard(768)
    else:
        plan, matrix = make(*case)
        apply = functools.partial(randomized_transform, plan=plan)
    x = keras.ops.cast(normal(4, matrix.shape[1]), dtype)
    upstream = keras.ops.cast(normal(4, matrix.shape[0]), dtype)
    gradient = compiled(functools.partial(vjp, apply))
    for got, exact in (
        (compiled(apply)(x), to_numpy(x) @ matrix.T),
        (gradient(x, upstream), to_numpy(upstream) @ matrix),
    ):
        assert keras.backend.standardize_dtype(got.dtype) == dtype
        error = np.linalg.norm(to_numpy(got) - exact) / np.linalg.norm(exact)
        assert error < tolerance


def with_float64():
    """A context in which the backend has float64: JAX has not by default."""
    if BACKEND != "jax":
        return contextlib.nullcontext()
    import jax

    return jax.enable_x64(True)


def test_float64():
    x = normal(3, 768, dtype="float64")
    with with_float64():
        y = fwht(x)
        assert keras.backend.standardize_dtype(y.dtype) == "float64"
        np.testing.assert_allclose(
            keras.ops.convert_to_numpy(y), x @ hadamard(768).T, atol=1e-12
        )


@only_jax
@pytest.mark.parametrize("case", [CASES[6], CASES[11], CASES[16]], ids=str)
def test_float64_in_compiled_jax(case):
    plan, matrix = make(*case)
    square = hadamard(plan.order)
    x = normal(3, plan.input_dim, dtype="float64")
    upstream = normal(3, plan.output_dim, dtype="float64")
    z = normal(3, plan.order, dtype="float64")
    apply = functools.partial(randomized_transform, plan=plan)
    with with_float64():
        for function, argument, pulled, matrix in (
            (apply, x, upstream, matrix),
            (fwht, z, z[::-1].copy(), square),
        ):
            y = compiled(function)(argument)
            gradient = compiled(functools.partial(vjp, function))(
                argument, pulled
            )
            assert y.dtype == gradient.dtype == "float64"
            np.testing.assert_allclose(y, argument @ matrix.T, atol=1e-12)
            np.testing.assert_allclose(gradient, pulled @ matrix, atol=1e-12)


# Gradients.


@differentiable
@pytest.mark.parametrize(
    "case", [CASES[6], CASES[10], CASES[11], CASES[15]], ids=str
)
def test_gradient_is_the_adjoint(case):
    plan, matrix = make(*case)
    x, upstream = normal(2, plan.input_dim), normal(2, plan.output_dim)
    gradient = vjp(lambda x: randomized_transform(x, plan), x, upstream)
    np.testing.assert_allclose(to_numpy(gradient), upstream @ matrix, atol=2e-5)
    gradient = vjp(
        lambda y: randomized_transform(y, plan, adjoint=True), upstream, x
    )
    np.testing.assert_allclose(to_numpy(gradient), x @ matrix.T, atol=2e-5)


@differentiable
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("transpose", [False, True])
def test_fwht_gradient(axis, transpose):
    x, upstream = normal(20, 12), normal(12, 20).T
    matrix = hadamard(x.shape[axis])
    matrix = matrix.T if transpose else matrix
    gradient = vjp(
        lambda x: fwht(x, axis=axis, transpose=transpose), x, upstream
    )
    expected = matrix.T @ upstream if axis == 0 else upstream @ matrix
    np.testing.assert_allclose(to_numpy(gradient), expected, atol=1e-5)


@differentiable
def test_double_backward():
    plan, matrix = make(20, 2, 15, 10)
    x, v = normal(2, 15), normal(3, 15)[:2]

    def cubes(x):
        return randomized_transform(x, plan) ** 3

    ones = np.ones((2, 10), "float32")
    hessian_product = vjp(lambda x: vjp(cubes, x, ones), x, v)
    expected = (6 * (x @ matrix.T) * (v @ matrix.T)) @ matrix
    np.testing.assert_allclose(
        to_numpy(hessian_product), expected, rtol=1e-4, atol=1e-4
    )


# Errors.


@pytest.mark.parametrize("dtype", ["int32", "bool", "uint8"])
def test_dtypes_that_are_not_floating(dtype):
    x = np.ones((2, 4), dtype)
    plan, _ = make(4, 1, 4, 4)
    for call in (fwht, lambda x: randomized_transform(x, plan)):
        with pytest.raises(TypeError, match=f"`x`.*float32.*{dtype}"):
            call(x)
        with pytest.raises(TypeError, match=f"`x`.*float32.*{dtype}"):
            call(keras.KerasTensor((2, 4), dtype))


def test_bad_fwht_arguments():
    x = normal(2, 4)
    for axis in (2, -3):
        with pytest.raises(ValueError, match=f"`axis`.*{axis}"):
            fwht(x, axis=axis)
    with pytest.raises(TypeError, match="`axis`"):
        fwht(x, axis=1.0)
    with pytest.raises(ValueError, match="1031.*1030.*1032"):
        fwht(normal(1, 1031))
    with pytest.raises(ValueError, match="1031.*1030.*1032"):
        fwht(keras.KerasTensor((None, 1031)))
    with pytest.raises(ValueError, match="must be known"):
        fwht(keras.KerasTensor((2, None)))
    with pytest.raises(ValueError, match="`x` must not be empty"):
        fwht(np.zeros((2, 0), "float32"))


def test_bad_transform_arguments():
    plan, _ = make(24, 2, 20, 10)
    with pytest.raises(ValueError, match="plan.input_dim=20"):
        randomized_transform(normal(2, 10), plan)
    with pytest.raises(ValueError, match="plan.output_dim=10"):
        randomized_transform(normal(2, 20), plan, adjoint=True)
    with pytest.raises(ValueError, match="plan.input_dim=20"):
        randomized_transform(keras.KerasTensor((None, 24)), plan)
    with pytest.raises(TypeError, match="`plan`.*int"):
        randomized_transform(normal(2, 10), 24)


@pytest.mark.parametrize(
    "change,error,match",
    [
        ({"order": 0}, ValueError, "`order`.*0"),
        ({"order": 8.0}, TypeError, "`order`.*float"),
        ({"signs": np.ones(8)}, ValueError, r"`signs`.*\(8,\)"),
        ({"signs": np.ones((0, 8))}, ValueError, r"`signs`.*\(0, 8\)"),
        ({"signs": np.zeros((1, 8))}, ValueError, "`signs`.*0.0"),
        ({"input_dim": 9}, ValueError, "`input_dim`.*9"),
        ({"input_dim": None}, TypeError, "`input_dim`.*None"),
        ({"output_dim": 0}, ValueError, "`output_dim`.*0"),
        ({"input_index": [0, 1]}, ValueError, r"`input_index`.*\(2,\)"),
        ({"input_index": [0, 1, 1]}, ValueError, "`input_index`.*repeated"),
        ({"output_index": [0, 8]}, ValueError, "`output_index`.*8"),
        ({"output_index": [-1, 0]}, ValueError, "`output_index`.*-1"),
        ({"output_index": [0.0, 1.0]}, TypeError, "`output_index`.*float64"),
    ],
)
def test_bad_plans(change, error, match):
    arguments = {
        "order": 8,
        "signs": np.ones((1, 8), "int8"),
        "input_dim": 3,
        "output_dim": 2,
    }
    RandomizedTransform(**arguments)
    with pytest.raises(error, match=match):
        RandomizedTransform(**{**arguments, **change})


def test_plans_are_frozen():
    signs = np.ones((1, 8), "int8")
    index = np.arange(3)
    plan = RandomizedTransform(8, signs, 3, 8, input_index=index)
    signs[:] = -1
    index[:] = 5
    assert plan.signs.min() == 1 and plan.input_index.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="read-only"):
        plan.signs[0, 0] = -1
    with pytest.raises(AttributeError):
        plan.order = 9


# Symbolic tensors, models and export.


class Transform(keras.layers.Layer):
    """Both operations in one layer."""

    def build(self, input_shape):
        self.plan, self.matrix = make(24, 2, 20, 12, gather=True)

    def call(self, x):
        return fwht(randomized_transform(x, self.plan))


def test_symbolic_shapes():
    x = keras.KerasTensor((None, 3, 20), "bfloat16")
    plan, _ = make(24, 2, 20, 10)
    y = randomized_transform(x, plan)
    assert y.shape == (None, 3, 10) and y.dtype == "bfloat16"
    y = randomized_transform(y, plan, adjoint=True)
    assert y.shape == (None, 3, 20)
    assert fwht(x, axis=1).shape == (None, 3, 20)
    assert fwht(x).dtype == "bfloat16"


def test_functional_model(tmp_path):
    inputs = keras.Input((5, 12))
    model = keras.Model(inputs, fwht(fwht(inputs), axis=1, normalize=False))
    x = normal(2, 5, 12)
    expected = hadamard(5, normalize=False) @ (x @ hadamard(12).T)
    np.testing.assert_allclose(model.predict(x), expected, atol=1e-5)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.predict(x), expected, atol=1e-5)


@differentiable
def test_layer_in_a_model_that_trains():
    layer = Transform()
    inputs = keras.Input((None, 20))
    hidden = keras.layers.Dense(20)(inputs)
    model = keras.Model(inputs, layer(hidden))
    assert model.output_shape == (None, None, 12)
    model.compile("sgd", "mse")
    x = normal(8, 3, 20)
    history = model.fit(x, normal(8, 3, 12), epochs=3, verbose=0)
    assert history.history["loss"][-1] < history.history["loss"][0]
    kernel, bias = (to_numpy(w) for w in model.weights)
    expected = (x @ kernel + bias) @ layer.matrix.T @ hadamard(12).T
    np.testing.assert_allclose(model.predict(x), expected, atol=1e-4)


@pytest.mark.skipif(
    BACKEND not in ("tensorflow", "jax"), reason="no SavedModel export"
)
def test_export(tmp_path):
    tf = pytest.importorskip("tensorflow")
    layer = Transform()
    inputs = keras.Input((None, 20))
    model = keras.Model(inputs, layer(inputs))
    model.export(tmp_path / "model", verbose=False)
    restored = tf.saved_model.load(tmp_path / "model")
    for x in (normal(2, 3, 20), normal(1, 5, 20)):
        expected = x @ layer.matrix.T @ hadamard(12).T
        actual = restored.serve(tf.constant(x)).numpy()
        np.testing.assert_allclose(actual, expected, atol=1e-5)


# What is special to a backend.


@only_jax
def test_jax_transformations():
    import jax

    plan, matrix = make(24, 2, 20, 12, scatter=True)
    apply = functools.partial(randomized_transform, plan=plan)
    x, v = normal(4, 20), normal(5, 20)[:4]
    close = functools.partial(np.testing.assert_allclose, atol=1e-4)

    close(jax.jit(apply)(x), x @ matrix.T)
    close(jax.vmap(apply)(x), x @ matrix.T)
    close(jax.vmap(apply, in_axes=1, out_axes=1)(x.T), matrix @ x.T)
    close(jax.jvp(apply, (x,), (v,))[1], v @ matrix.T)
    close(jax.jacrev(apply)(x[0]), matrix)
    close(jax.jacfwd(apply)(x[0]), matrix)

    def loss(x):
        return (apply(x) ** 2).sum()

    gradient = 2 * x @ matrix.T @ matrix
    close(jax.jit(jax.vmap(jax.grad(loss)))(x), gradient)
    close(jax.grad(jax.checkpoint(loss))(x), gradient)
    close(jax.hessian(loss)(x[0]), 2 * matrix.T @ matrix)
    close(
        jax.linear_transpose(apply, x)(v @ matrix.T)[0], v @ matrix.T @ matrix
    )
    close(jax.lax.map(apply, x), x @ matrix.T)


@only_jax
def test_jax_keeps_nothing_for_the_gradient():
    import jax

    plan, _ = make(24, 2, 20, 12, scatter=True)
    x = normal(4, 20)
    _, pullback = jax.vjp(lambda x: randomized_transform(x, plan), x)
    assert jax.tree_util.tree_leaves(pullback) == []


@only_tensorflow
@pytest.mark.parametrize("jit_compile", [False, True])
def test_tensorflow_functions(jit_compile):
    import tensorflow as tf

    plan, matrix = make(24, 2, 20, 12, scatter=True)
    signature = [tf.TensorSpec((None, None, 20), "float32")]

    @tf.function(input_signature=signature, jit_compile=jit_compile)
    def apply(x):
        return randomized_transform(x, plan)

    @tf.function(input_signature=signature, jit_compile=jit_compile)
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(randomized_transform(x, plan) ** 2)
        return tape.gradient(loss, x)

    for x in (normal(2, 3, 20), normal(1, 7, 20), normal(0, 3, 20)):
        np.testing.assert_allclose(apply(x), x @ matrix.T, atol=1e-5)
        expected = 2 * x @ matrix.T @ matrix
        np.testing.assert_allclose(gradient(x), expected, atol=1e-4)
    specification = apply.get_concrete_function().structured_outputs
    assert specification.shape.as_list() == [None, None, 12]


@only_tensorflow
def test_tensorflow_fwht_of_an_inner_axis_with_unknown_sizes():
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec((None, 12, None), "float32")])
    def apply(x):
        return fwht(x, axis=1)

    x = normal(2, 12, 5)
    np.testing.assert_allclose(apply(x), hadamard(12) @ x, atol=1e-5)


@only_tensorflow
def test_tensorflow_does_not_leak_graph_tensors():
    import tensorflow as tf

    plan, matrix = make(24, 2, 20, 12)
    x = normal(2, 20)
    for _ in range(2):
        tf.function(lambda x: randomized_transform(x, plan))(x)
        y = randomized_transform(x, plan)
        np.testing.assert_allclose(y, x @ matrix.T, atol=1e-5)


@only_tensorflow
def test_tensorflow_graphs_have_every_constant_once(monkeypatch):
    """A model's layers share bases, and blocks of rows their steps."""
    import tensorflow as tf

    from keras_randadapt.ops import transforms

    plan, matrix = make(256, 2, 256, 256, gather=True)
    monkeypatch.setattr(transforms._backend, "_BLOCK", 4 * 256)
    x = normal(16, 256)

    def numbers(uses):
        @tf.function
        def apply(x):
            for _ in range(uses):
                x = randomized_transform(x, plan)
            return x

        graph = apply.get_concrete_function(tf.constant(x)).graph
        np.testing.assert_allclose(
            apply(tf.constant(x)),
            x @ np.linalg.matrix_power(matrix.T, uses),
            atol=1e-5,
        )
        sizes = (
            operation.outputs[0].shape.num_elements()
            for operation in graph.get_operations()
            if operation.type == "Const"
        )
        # Matrices, signs and indices, not the shapes of reshapes.
        return sum(size for size in sizes if size > 8)

    assert numbers(3) == numbers(1) > 2 * 256


@only_tensorflow
@pytest.mark.cpu_seconds(10, reason="a process with TensorFlow")
def test_autograph_has_nothing_to_warn_of(tmp_path):
    """It warns once a process, of syntax that it does not know."""
    program = tmp_path / "program.py"
    program.write_text(
        "import tensorflow as tf\n"
        "from keras_randadapt.ops import fwht\n"
        "@tf.function\n"
        "def function(x):\n"
        "    return fwht(x)\n"
        "print(function(tf.ones((3, 64))).shape)\n"
    )
    process = subprocess.run(
        [sys.executable, program], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert "AutoGraph" not in process.stderr


@only_tensorflow
@pytest.mark.parametrize("jit_compile", [False, True])
def test_tensorflow_products_for_xla(jit_compile):
    """Along the last axis, in a function of the compiled one too."""
    import tensorflow as tf

    inner = tf.function(fwht)
    x = tf.constant(normal(6, 768))
    for function in (fwht, lambda x: inner(x)):
        function = tf.function(function, jit_compile=jit_compile)
        np.testing.assert_allclose(
            function(x), x.numpy() @ hadamard(768).T, atol=1e-5
        )
    graph = function.get_concrete_function(x).graph
    definition = str(graph.as_graph_def())
    assert ('op: "Transpose"' in definition) is jit_compile


@only_torch
def test_torch_gradchecks():
    import torch

    plan, _ = make(20, 2, 15, 10, scatter=True)
    x = torch.randn(2, 15, dtype=torch.float64, requires_grad=True)
    apply = functools.partial(randomized_transform, plan=plan)
    assert torch.autograd.gradcheck(apply, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(apply, x)


@only_torch
def test_torch_keeps_nothing_for_the_gradient():
    import torch

    plan, _ = make(20, 2, 15, 10, scatter=True)
    saved = []
    x = torch.randn(2, 15, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        randomized_transform(x, plan)
    assert saved == []


@only_torch
def test_torch_func():
    import torch

    plan, matrix = make(20, 2, 15, 10, scatter=True)
    apply = functools.partial(randomized_transform, plan=plan)
    x = torch.randn(4, 15)
    expected = x.numpy() @ matrix.T
    close = functools.partial(np.testing.assert_allclose, atol=1e-4)
    close(torch.func.vmap(apply)(x), expected)
    close(torch.func.vmap(apply, in_dims=1)(x.T), expected)
    close(torch.func.jvp(apply, (x,), (x,))[1], expected)
    close(torch.func.jacrev(apply)(x[0]), matrix)

    def loss(x):
        return (apply(x) ** 2).sum()

    close(torch.func.hessian(loss)(x[0]), 2 * matrix.T @ matrix)


@only_torch
@pytest.mark.parametrize("inner", ["fwht", "randomized_transform"])
def test_torch_compile(inner):
    import torch

    plan, matrix = make(24, 2, 24, 12, scatter=True)

    def apply(x):
        if inner == "fwht":
            return fwht(x)
        return randomized_transform(x, plan)

    matrix = hadamard(24) if inner == "fwht" else matrix
    # The graph and its gradient, without the C++ compiler.
    compiled = torch.compile(apply, fullgraph=True, backend="aot_eager")
    for rows in (3, 5):
        x = torch.randn(rows, 24, requires_grad=True)
        y = compiled(x)
        np.testing.assert_allclose(
            y.detach(), x.detach().numpy() @ matrix.T, atol=1e-5
        )
        (gradient,) = torch.autograd.grad(y.sum(), x)
        np.testing.assert_allclose(
            gradient, np.ones(y.shape) @ matrix, atol=1e-4
        )
        # What the compiled call has cached works in an ordinary one.
        np.testing.assert_allclose(apply(x).detach(), y.detach(), atol=1e-5)


@only_torch
@pytest.mark.parametrize("dynamic", [None, True])
def test_torch_compile_with_another_size(dynamic):
    """A size that has changed, or is said to, is dynamic."""
    import torch

    torch.compiler.reset()
    # Older Keras moves axes in a way that breaks the graph.
    new = tuple(map(int, keras.version().split(".")[:2])) >= (3, 15)
    for axis in (-1, 0) if new else (-1,):
        apply = torch.compile(
            functools.partial(fwht, axis=axis),
            fullgraph=True,
            backend="aot_eager",
            dynamic=dynamic,
        )
        for size in (12, 20, 24):
            x, matrix = normal(size, size), hadamard(size)
            expected = matrix @ x if axis == 0 else x @ matrix.T
            np.testing.assert_allclose(
                apply(torch.tensor(x)), expected, atol=1e-5
            )


CXX = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)


@only_torch
@pytest.mark.slow
@pytest.mark.skipif(CXX is None, reason="inductor needs a C++ compiler")
def test_torch_compile_with_its_default_compiler():
    import torch
    import torch._inductor.config as inductor

    torch.compiler.reset()
    compiled = torch.compile(fwht, fullgraph=True)
    # It looks for one name of a compiler only, and what an earlier run has left
    # on the disk needs none.
    settings = {"cpp.cxx": (CXX,), "force_disable_caches": True}
    # Not symmetric, with a scale after the factors, and one factor.
    for shape in ((3, 20), (2, 5, 768)):
        matrix = hadamard(shape[-1])
        x = torch.tensor(normal(*shape), requires_grad=True)
        upstream = normal(*shape[::-1]).T.reshape(shape)
        with inductor.patch(settings):
            y = compiled(x)
            (gradient,) = torch.autograd.grad(y, x, torch.tensor(upstream))
        np.testing.assert_allclose(
            y.detach(), x.detach().numpy() @ matrix.T, atol=1e-5
        )
        np.testing.assert_allclose(gradient, upstream @ matrix, atol=1e-5)


@pytest.mark.parametrize("adjoint", [False, True])
def test_scales(adjoint):
    plan, matrix = make(24, 2, 20, 12, gather=True)
    matrix = matrix.T if adjoint else matrix
    x, before = normal(3, matrix.shape[1]), normal(matrix.shape[1])
    after = normal(matrix.shape[0])
    y = randomized_transform(x, plan, adjoint, before, after)
    np.testing.assert_allclose(
        to_numpy(y), (x * before) @ matrix.T * after, atol=1e-5
    )
    for arguments, name in (((after, None), "before"), ((None, x), "after")):
        with pytest.raises(ValueError, match=f"`{name}` must be a vector"):
            randomized_transform(x, plan, adjoint, *arguments)


@only_torch
def test_torch_forward_mode_with_scales():
    import torch

    plan, matrix = make(24, 2, 20, 12, gather=True)
    x, before, after = normal(3, 20), normal(20), normal(12)
    dx, dbefore, dafter = normal(4, 20)[:3], normal(21)[:20], normal(13)[:12]

    def apply(x, before, after):
        return randomized_transform(x, plan, False, before, after)

    tensors = tuple(map(torch.tensor, (x, before, after)))
    tangents = tuple(map(torch.tensor, (dx, dbefore, dafter)))
    y, found = torch.func.jvp(apply, tensors, tangents)
    expected = (dx * before + x * dbefore) @ matrix.T * after
    expected += (x * before) @ matrix.T * dafter
    np.testing.assert_allclose(y, (x * before) @ matrix.T * after, atol=1e-5)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # Some of them alone.
    for place, tangent in enumerate(tangents):

        def of_one(argument):
            arguments = list(tensors)
            arguments[place] = argument
            return apply(*arguments)

        _, found = torch.func.jvp(of_one, (tensors[place],), (tangent,))
        parts = [torch.zeros_like(t) for t in tangents]
        parts[place] = tangent
        _, expected = torch.func.jvp(apply, tensors, tuple(parts))
        np.testing.assert_allclose(found, expected, atol=1e-5)
    hessian = torch.func.hessian(lambda b: apply(tensors[0], b, b[:12]).sum())
    np.testing.assert_allclose(
        hessian(tensors[1]),
        torch.autograd.functional.hessian(
            lambda b: apply(tensors[0], b, b[:12]).sum(), tensors[1]
        ),
        atol=1e-4,
    )


@only_torch
def test_torch_forward_mode_of_tensors_without_gradient():
    """Dual numbers, of which nothing says that a derivative is wanted."""
    import torch
    from torch.autograd import forward_ad

    plan, matrix = make(44, 2, 40, 30)
    tensors = [torch.tensor(normal(*s)) for s in ((7, 40), (40,), (30,))]
    x, before, after = (t.double().numpy() for t in tensors)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(tensors[0], tensors[0] + 1)
        for scales in ([], tensors[1:]):
            y = randomized_transform(dual, plan, False, *scales)
            tangent = forward_ad.unpack_dual(y).tangent
            expected = (x + 1) @ matrix.T
            if scales:
                expected = ((x + 1) * before) @ matrix.T * after
            np.testing.assert_allclose(tangent, expected, atol=1e-5)
    with torch.no_grad():
        x = tensors[0].requires_grad_()
        assert not randomized_transform(x, plan).requires_grad
    assert randomized_transform(x, plan).requires_grad


@only_torch
def test_torch_pulls_back_after_a_function_transform():
    """What `vjp` kept is wrapped then, and has no memory of its own."""
    import torch

    plan, matrix = make(44, 2, 40, 30)
    x, before, after = (
        torch.tensor(normal(*s)) for s in ((7, 40), (40,), (30,))
    )
    upstream = torch.tensor(normal(7, 30))

    def apply(x, before, after):
        return randomized_transform(x, plan, False, before, after)

    _, pull = torch.func.vjp(apply, x, before, after)
    with torch.no_grad():
        found = pull(upstream)
    pulled = (upstream * after).numpy() @ matrix
    expected = (
        pulled * before.numpy(),
        np.sum(pulled * x.numpy(), 0),
        np.sum((x * before).numpy() @ matrix.T * upstream.numpy(), 0),
    )
    for got, right in zip(found, expected):
        np.testing.assert_allclose(got, right, atol=1e-4)


@only_torch
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_torch_records_nothing_for_nothing(dtype, monkeypatch):
    """As in the gradients of adapters, where a call is most of the time."""
    import torch

    from keras_randadapt.ops import torch as torch_backend

    for function in (torch_backend._Linear, torch_backend._Scaled):
        monkeypatch.setattr(function, "apply", None)
    plan, matrix = make(44, 2, 40, 30)
    x, before, after = (
        torch.tensor(normal(*shape), dtype=getattr(torch, dtype))
        for shape in ((7, 40), (40,), (30,))
    )
    expected = (x * before).numpy() @ matrix.T * after.numpy()
    for needed in (False, True):
        with torch.no_grad():
            y = randomized_transform(
                x.requires_grad_(needed), plan, False, before, after
            )
        np.testing.assert_allclose(y, expected, atol=1e-5)


@only_torch
def test_torch_scales_of_another_dtype():
    """The result is of the wider dtype, as of a product."""
    import torch

    plan, matrix = make(24, 2, 20, 12)
    x, before = torch.randn(3, 20), torch.randn(20)
    for dtype in (torch.float64, torch.bfloat16):
        scale = before.to(dtype)
        y = randomized_transform(x, plan, before=scale)
        assert y.dtype == torch.promote_types(dtype, torch.float32)
        expected = (x * scale).numpy() @ matrix.T
        np.testing.assert_allclose(y, expected, atol=1e-5)


@only_torch
class TestTensorsThatAreNotInMemory:
    """Or that more is asked of than a result."""

    def test_zeros(self):
        import torch

        y = fwht(torch._efficientzerotensor((5, 64)))
        np.testing.assert_array_equal(y.numpy(), np.zeros((5, 64)))

    def test_negative_view(self):
        import torch

        x = torch.randn(5, 64)
        np.testing.assert_allclose(
            fwht(torch._neg_view(x)), -fwht(x), atol=1e-5
        )

    def test_meta_scale(self):
        import torch

        plan, _ = make(24, 2, 20, 12)
        scale = torch.empty(20, device="meta")
        with pytest.raises((RuntimeError, NotImplementedError)):
            randomized_transform(torch.randn(3, 20), plan, before=scale).numpy()

    def test_trace(self):
        """As an export to ONNX with a batch of any size makes it."""
        import torch

        plan, matrix = make(24, 2, 20, 12, gather=True)

        def apply(x, before):
            return randomized_transform(x, plan, before=before)

        traced = torch.jit.trace(apply, (torch.randn(3, 20), torch.randn(20)))
        x, before = torch.randn(5, 20), torch.randn(20)
        np.testing.assert_allclose(
            traced(x, before), (x * before).numpy() @ matrix.T, atol=1e-5
        )

    def test_graph_of_operations(self):
        import torch
        from torch.fx.experimental.proxy_tensor import make_fx

        x = torch.randn(5, 64)
        graph = make_fx(lambda x: fwht(x))(torch.randn(5, 64))
        np.testing.assert_allclose(graph(x), fwht(x), atol=1e-5)

    def test_fake_mode(self):
        import torch
        from torch._subclasses.fake_tensor import FakeTensor
        from torch._subclasses.fake_tensor import FakeTensorMode

        plan, _ = make(24, 2, 20, 12)
        x, scale = torch.randn(3, 20), torch.randn(20)
        with FakeTensorMode(allow_non_fake_inputs=True):
            for y in (
                fwht(x),
                randomized_transform(x, plan, before=scale),
            ):
                assert isinstance(y, FakeTensor)


@only_torch
def test_torch_compile_with_another_plan():
    """The second time, what differed between the plans would be dynamic."""
    import torch

    @functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    def apply(x, plan):
        return randomized_transform(x, plan)

    for order in (24, 28, 20):
        plan, matrix = make(order, 2, 20, 12)
        x = torch.randn(3, 20)
        np.testing.assert_allclose(
            apply(x, plan), x.numpy() @ matrix.T, atol=1e-5
        )


@only_torch
def test_torch_meta_and_fake_tensors():
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    plan, matrix = make(28, 2, 20, 12, scatter=True)
    y = randomized_transform(torch.empty(3, 20, device="meta"), plan)
    assert y.device.type == "meta" and y.shape == (3, 12)
    x = torch.randn(3, 20)
    with FakeTensorMode() as mode:
        y = randomized_transform(mode.from_tensor(x), plan)
        assert y.shape == (3, 12)
    y = randomized_transform(x, plan)
    np.testing.assert_allclose(y, x.numpy() @ matrix.T, atol=1e-5)


@only_torch
def test_torch_export():
    import torch

    plan, matrix = make(24, 2, 20, 12)

    class Module(torch.nn.Module):
        def forward(self, x):
            return randomized_transform(x, plan)

    x = torch.randn(3, 20)
    y = torch.export.export(Module(), (x,)).module()(x)
    np.testing.assert_allclose(y, x.numpy() @ matrix.T, atol=1e-5)


@pytest.mark.skipif(BACKEND == "numpy", reason="compares with NumPy")
def test_numpy_backend_in_float32():
    from keras_randadapt.ops import numpy as reference

    plan, _ = make(1031, 2, 900, 500, scatter=True)
    for dtype in ("float16", "float32", "float64"):
        x = normal(3, 900).astype(dtype)
        y = reference.apply(x, plan.program)
        assert y.dtype == dtype
    y = reference.apply(x.astype("float32"), plan.program)
    actual = to_numpy(randomized_transform(x.astype("float32"), plan))
    np.testing.assert_allclose(actual, y, atol=1e-5)


def test_the_backend_is_the_one_asked_for():
    assert os.environ.get("KERAS_BACKEND", BACKEND) == BACKEND


@differentiable
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("rows", [11, 12, 13])
@pytest.mark.parametrize(
    "kind", ["fwht", "square", "gathered", "shrinking", "growing"]
)
def test_blocks_of_rows(kind, rows, dtype, monkeypatch):
    from keras_randadapt.ops import transforms

    # Four rows at a time, or as many of up to four as divide all.
    order = 256
    monkeypatch.setattr(transforms._backend, "_BLOCK", 4 * order)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    if kind == "fwht":
        # No step before the first product.
        apply, matrix = fwht, hadamard(order)
    else:
        # The last step is a product, a selection, a product of another size.
        plan, matrix = make(
            order,
            1,
            128 if kind == "growing" else order,
            128 if kind == "shrinking" else order,
            gather=kind == "gathered",
        )
        apply = functools.partial(randomized_transform, plan=plan)

    def both(x):
        return apply(x), vjp(apply, x, apply(x))

    if BACKEND == "jax":
        import jax

        # Eager calls work on all rows at once.
        both = jax.jit(both)
    x = normal(rows, matrix.shape[1]).astype(dtype)
    y, gradient = map(to_numpy, both(x))
    expected = x @ matrix.T
    np.testing.assert_allclose(y, expected, atol=tolerance)
    np.testing.assert_allclose(gradient, expected @ matrix, atol=tolerance)


@only_jax
def test_jax_compiles_no_program_of_its_own_for_eager_calls():
    """A merge calls a program of every site: all would take minutes."""
    from jax import monitoring

    compiled = []

    def listen(event, seconds, **_):
        if "backend_compile" in event:
            compiled.append(event)

    x = normal(3, 20)
    first, _ = make(24, 2, 20, 12)
    y = randomized_transform(x, first)
    monitoring.register_event_duration_secs_listener(listen)
    try:
        for _ in range(3):
            # Equal to the last bit, whenever it is called.
            np.testing.assert_array_equal(randomized_transform(x, first), y)
            plan, matrix = make(24, 2, 20, 12)
            np.testing.assert_allclose(
                randomized_transform(x, plan), x @ matrix.T, atol=1e-5
            )
    finally:
        monitoring.unregister_event_duration_listener(listen)
    assert compiled == []
