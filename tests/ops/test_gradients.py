"""Functions with a gradient of their own."""

import keras
import numpy as np
import pytest

from keras_randadapt import ops
from tests import gradients
from tests import zoo

pytestmark = pytest.mark.needs_optimizer


def _cube(x, factor):
    """`x ** 3`, with a gradient that is wrong by a factor of ten."""

    def backward(arguments, upstream):
        x, factor = ops.fence(upstream, *arguments)
        return 30 * x**2 * upstream * factor, None

    return ops.with_gradient(lambda x, f: x**3 * f, backward, x, factor)


def test_the_gradient_is_the_given_one():
    x, upstream = zoo.normal(3, 4), zoo.normal(3, 4, seed=1)
    factor = keras.ops.convert_to_tensor(2.0)
    y = _cube(keras.ops.convert_to_tensor(x), factor)
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(y), 2 * x**3, rtol=1e-5
    )
    (of_x,) = gradients.gradients(lambda x: _cube(x, factor), x, [], upstream)
    np.testing.assert_allclose(of_x, 60 * x**2 * upstream, rtol=1e-5)


def test_the_gradient_has_a_gradient():
    x = zoo.normal(3, 4)
    one = keras.ops.convert_to_tensor(1.0)
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        def first(x):
            return jax.grad(lambda x: _cube(x, one).sum())(x).sum()

        second = jax.grad(first)(x)
    elif backend == "torch":
        import torch

        tensor = torch.tensor(x, requires_grad=True)
        (first,) = torch.autograd.grad(
            _cube(tensor, one).sum(), tensor, create_graph=True
        )
        (second,) = torch.autograd.grad(first.sum(), tensor)
    else:
        import tensorflow as tf

        tensor = tf.constant(x)
        with tf.GradientTape() as outer:
            outer.watch(tensor)
            with tf.GradientTape() as inner:
                inner.watch(tensor)
                y = _cube(tensor, one)
            first = inner.gradient(y, tensor)
        second = outer.gradient(first, tensor)
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(second), 60 * x, rtol=1e-5
    )


def test_dropped_arguments_are_not_kept():
    matrix = keras.ops.convert_to_tensor(zoo.normal(30, 20))

    def product(x, drop):
        def backward(kept, upstream):
            of_x = keras.ops.matmul(upstream, keras.ops.transpose(kept[-1]))
            return of_x, None

        return ops.with_gradient(
            keras.ops.matmul, backward, 2 * x, matrix, drop=drop
        )

    x, upstream = zoo.normal(50, 30), zoo.normal(50, 20)
    for drop in (0, 1):
        (of_x,) = gradients.gradients(
            lambda x: product(x, drop), x, [], upstream
        )
        np.testing.assert_allclose(
            of_x,
            2 * upstream @ keras.ops.convert_to_numpy(matrix).T,
            rtol=1e-4,
            atol=1e-4,
        )
    if keras.config.backend() == "tensorflow":
        # Its list of what a traced function hands on has the inputs of every
        # gradient; what the gradient does not use is pruned later.
        return
    kept = gradients.kept_for_backward(lambda x: product(x, 1), x, [])
    assert ((50, 30), "float32") not in kept
    kept = gradients.kept_for_backward(lambda x: product(x, 0), x, [])
    assert ((50, 30), "float32") in kept


def _products_in_compiled_gradient(fence):
    """How often both passes together compute the product of the forward."""
    matrix = keras.ops.convert_to_tensor(zoo.normal(8, 8))

    def product(x):
        def backward(arguments, upstream):
            x, matrix = fence(upstream, *arguments)
            return keras.ops.matmul(x, matrix) * upstream, None

        return ops.with_gradient(keras.ops.matmul, backward, x, matrix)

    x = zoo.normal(8, 8, seed=1)
    if keras.config.backend() == "jax":
        import jax

        def both(x):
            y, pullback = jax.vjp(product, x)
            return y, pullback(jax.numpy.cos(y))

        text = jax.jit(both).lower(x).compile().as_text()
    else:
        import tensorflow as tf

        @tf.function(jit_compile=True)
        def both(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = product(x)
            return y, tape.gradient(y, x, output_gradients=tf.cos(y))

        text = both.experimental_get_compiler_ir(tf.constant(x))(
            stage="optimized_hlo"
        )
    return text.count(" dot(")


def test_compilers_do_not_see_through_a_fence():
    """What is to be computed in both passes is, instead of being kept."""
    if keras.config.backend() == "torch":
        # Nothing is compiled, and nothing copied.
        x = keras.ops.convert_to_tensor(zoo.normal(8, 8))
        assert ops.fence(x, x)[0] is x
        return
    assert _products_in_compiled_gradient(lambda _, *x: x) == 1
    assert _products_in_compiled_gradient(ops.fence) == 2


@pytest.mark.parametrize("awaited", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_fence_passes_no_values_on(awaited, dtype):
    """One example that overflows must not spoil the others' weights."""
    awaited = keras.ops.full((2, 3), awaited, dtype)
    x = zoo.normal(8, 8)

    def fenced(awaited, x):
        return ops.fence(awaited, x)[0]

    if keras.config.backend() == "jax":
        import jax

        fenced = jax.jit(fenced)
    elif keras.config.backend() == "tensorflow":
        import tensorflow as tf

        fenced = tf.function(fenced)
    got = fenced(awaited, keras.ops.convert_to_tensor(x))
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(got), x)


@pytest.mark.skipif(
    keras.config.backend() != "tensorflow", reason="TensorFlow's debugger"
)
def test_a_fence_has_no_numbers_that_are_looked_for():
    import tensorflow as tf

    x = tf.constant(zoo.normal(3, 4))
    tf.debugging.enable_check_numerics()
    try:
        (got,) = tf.function(ops.fence)(x, x)
    finally:
        tf.debugging.disable_check_numerics()
    np.testing.assert_array_equal(got, x)
