"""Depthwise and transposed convolutions beside sums in NumPy."""

import itertools

import keras
import numpy as np
import pytest
from keras import layers

import keras_randadapt as kra
from tests import methods
from tests import zoo

pytestmark = pytest.mark.every_backend


def _depthwise(x, kernel, stride):
    """A depthwise convolution without padding, position by position."""
    *window, channels, multiplier = kernel.shape
    sizes = [
        (n - k) // stride + 1
        for n, k in zip(x.shape[1:-1], window, strict=True)
    ]
    y = np.zeros((x.shape[0], *sizes, channels, multiplier))
    for at in itertools.product(*map(range, sizes)):
        for offset in itertools.product(*map(range, window)):
            place = tuple(stride * a + o for a, o in zip(at, offset))
            y[(slice(None), *at)] += (
                x[(slice(None), *place)][..., None] * kernel[offset]
            )
    return y.reshape(*y.shape[:-2], channels * multiplier)


def _transposed(x, kernel, stride):
    """A transposed convolution without padding: it scatters and adds."""
    *window, filters, _ = kernel.shape
    sizes = [
        (n - 1) * stride + max(k, stride)
        for n, k in zip(x.shape[1:-1], window, strict=True)
    ]
    y = np.zeros((x.shape[0], *sizes, filters))
    for at in itertools.product(*map(range, x.shape[1:-1])):
        for offset in itertools.product(*map(range, window)):
            place = tuple(stride * a + o for a, o in zip(at, offset))
            y[(slice(None), *place)] += x[(slice(None), *at)] @ kernel[offset].T
    return y


def _depthwise_kernel(view, shape):
    """Column `c * multiplier + m` is multiplier m of channel c."""
    kernel = np.zeros(shape)
    for i, offset in enumerate(np.ndindex(*shape[:-2])):
        for c, m in np.ndindex(*shape[-2:]):
            kernel[(*offset, c, m)] = view[i, c * shape[-1] + m]
    return kernel


def _transposed_kernel(view, shape):
    """Column `i * filters + f` is filter f at position i of the window."""
    kernel = np.zeros(shape)
    for i, offset in enumerate(np.ndindex(*shape[:-2])):
        for f in range(shape[-2]):
            kernel[(*offset, f)] = view[:, i * shape[-2] + f]
    return kernel


CASES = {
    "depthwise_1d": (
        lambda: layers.DepthwiseConv1D(
            3, strides=2, depth_multiplier=2, name="site"
        ),
        (3, 8, 4),
        _depthwise,
        _depthwise_kernel,
        (3, 8),
    ),
    "depthwise_2d": (
        lambda: layers.DepthwiseConv2D(
            (3, 2), strides=2, depth_multiplier=2, name="site"
        ),
        (2, 7, 5, 3),
        _depthwise,
        _depthwise_kernel,
        (6, 6),
    ),
    "transposed_1d": (
        lambda: layers.Conv1DTranspose(4, 3, strides=2, name="site"),
        (3, 5, 6),
        _transposed,
        _transposed_kernel,
        (6, 12),
    ),
    "transposed_2d": (
        lambda: layers.Conv2DTranspose(4, (3, 2), strides=2, name="site"),
        (2, 4, 3, 5),
        _transposed,
        _transposed_kernel,
        (5, 24),
    ),
    "transposed_3d": (
        lambda: layers.Conv3DTranspose(3, (2, 3, 2), name="site"),
        (2, 2, 3, 2, 4),
        _transposed,
        _transposed_kernel,
        (4, 36),
    ),
}


class _Case:
    def __init__(self, name):
        build, shape, self.product, self.unfold, self.view = CASES[name]
        self.layer = build()
        inputs = keras.Input(shape[1:])
        self.model = zoo.set_weights(keras.Model(inputs, self.layer(inputs)))
        self.x = zoo.normal(*shape)
        self.kernel = methods.numpy(self.layer.kernel).astype("float64")
        self.bias = methods.numpy(self.layer.bias).astype("float64")

    def inject(self, template):
        kra.inject(self.model, template, "site")
        zoo.randomize(self.model)
        (adapter,) = self.model._randadapt.adapters("default").values()
        return adapter

    def wanted(self, kernel, bias):
        stride = self.layer.strides[0]
        return self.product(self.x.astype("float64"), kernel, stride) + bias

    def check(self, kernel, bias):
        wanted = self.wanted(kernel, bias)
        y = methods.numpy(self.model(self.x))
        assert y.shape == wanted.shape
        np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)
        kra.merge(self.model)
        y = methods.numpy(self.model(self.x))
        np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)
        merged = methods.numpy(self.layer.kernel)
        np.testing.assert_allclose(merged, kernel, rtol=1e-4, atol=1e-5)


@pytest.fixture(params=CASES)
def case(request):
    return _Case(request.param)


def test_lora(case):
    adapter = case.inject(kra.LoRA(2, alpha=3))
    assert adapter.site.kernel_view == case.view
    a, b = methods.numpy(adapter.lora_a), methods.numpy(adapter.lora_b)
    delta = 1.5 * a.astype("float64") @ b
    case.check(case.kernel + case.unfold(delta, case.kernel.shape), case.bias)


def test_dora(case):
    adapter = case.inject(kra.DoRA(kra.LoRA(2)))
    view = np.zeros(case.view)
    for i, j in np.ndindex(*case.view):
        unit = np.zeros(case.view)
        unit[i, j] = 1
        view[i, j] = case.kernel[case.unfold(unit, case.kernel.shape) == 1][0]
    a = methods.numpy(adapter.inner.lora_a).astype("float64")
    view = view + a @ methods.numpy(adapter.inner.lora_b)
    view = (
        view / np.linalg.norm(view, axis=0) * methods.numpy(adapter.magnitude)
    )
    case.check(case.unfold(view, case.kernel.shape), case.bias)


def test_ia3_scales_channels_of_the_output(case):
    """Its vector has a number for each channel, whatever the view's columns."""
    adapter = case.inject(kra.IA3())
    scale = methods.numpy(adapter.ia3_l).astype("float64")
    assert scale.shape == case.bias.shape
    wanted = scale * case.wanted(case.kernel, case.bias)
    y = methods.numpy(case.model(case.x))
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)
    kra.merge(case.model)
    y = methods.numpy(case.model(case.x))
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)


def test_ia3_scales_channels_of_the_input():
    case = _Case("transposed_2d")
    adapter = case.inject(kra.IA3(feedforward=["site"]))
    scale = methods.numpy(adapter.ia3_l).astype("float64")
    assert scale.shape == (5,)
    case.check(case.kernel * scale, case.bias)


def test_bitfit(case):
    adapter = case.inject(kra.BitFit())
    case.check(case.kernel, case.bias + methods.numpy(adapter.bias_delta))


def test_dropout_reaches_the_delta_alone(case):
    """A step with dropout sees the base product and part of the delta."""
    keras.utils.set_random_seed(0)
    case.inject(kra.LoRA(2, dropout=0.9))
    base = case.wanted(case.kernel, case.bias)
    trained = methods.numpy(case.model(case.x, training=True))
    assert np.abs(trained - base).max() > 1e-2
    again = methods.numpy(case.model(case.x, training=True))
    assert np.abs(trained - again).max() > 1e-2
    once = methods.numpy(case.model(case.x))
    np.testing.assert_array_equal(once, methods.numpy(case.model(case.x)))


@pytest.mark.parametrize(
    "template, match",
    [
        (lambda view: kra.LoRA(min(view) + 1), "`rank` must be at most"),
        (lambda view: kra.Bottleneck(2), "does not adapt a"),
    ],
    ids=["rank", "bottleneck"],
)
def test_what_is_refused(case, template, match):
    before = methods.numpy(case.model(case.x))
    with pytest.raises(ValueError, match=match):
        kra.inject(case.model, template(case.view), "site")
    assert not kra.sites(case.model)
    np.testing.assert_array_equal(methods.numpy(case.model(case.x)), before)


def test_hydra_refuses_a_bias_of_fewer_numbers():
    case = _Case("transposed_1d")
    with pytest.raises(ValueError, match="bias of 4 numbers for 12 outputs"):
        kra.inject(case.model, kra.Hydra(2), "site")
    assert not kra.sites(case.model)


@pytest.mark.one_backend
def test_a_subclass_that_computes_something_else():
    class Squared(layers.DepthwiseConv2D):
        def call(self, inputs):
            return super().call(inputs) ** 2

    inputs = keras.Input((5, 5, 2))
    model = keras.Model(inputs, Squared(2, name="site")(inputs))
    with pytest.raises(ValueError, match="Squared that overrides `call`"):
        kra.inject(model, kra.LoRA(2), "site")


@pytest.mark.one_backend
def test_channels_first_bias_is_along_the_channels():
    layer = layers.Conv1DTranspose(
        4, 3, data_format="channels_first", name="site"
    )
    inputs = keras.Input((6, 5))
    model = zoo.set_weights(keras.Model(inputs, layer(inputs)))
    x = zoo.normal(2, 6, 5)
    base = methods.numpy(model(x))
    kra.inject(model, kra.BitFit(), "site")
    zoo.randomize(model)
    (adapter,) = model._randadapt.adapters("default").values()
    change = methods.numpy(adapter.bias_delta)[:, None]
    np.testing.assert_allclose(
        methods.numpy(model(x)), base + change, atol=1e-6
    )
