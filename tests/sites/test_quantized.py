"""Adapters on every quantization that Keras has."""

import functools

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from tests import gradients
from tests import quantizing
from tests import zoo

METHODS = {
    "lora": lambda: kra.LoRA(4),
    "dora": lambda: kra.DoRA(kra.LoRA(4)),
    "randlora": lambda: kra.RandLoRA(4),
}


def _modes(everywhere=()):
    """Every mode; those that are not named run on one backend."""
    found = []
    for mode in quantizing.MODES:
        marks = [] if mode in everywhere else [pytest.mark.one_backend]
        if not quantizing.has(mode):
            marks.append(pytest.mark.skip(f"This Keras has no {mode}."))
        found.append(pytest.param(mode, marks=marks))
    return found


def _targets(count=32):
    return zoo.integers(
        count, quantizing.LENGTH, high=quantizing.VOCABULARY, seed=1
    )


def _losses(model, steps):
    """The losses of some steps of training, with the adapters as they are."""
    x, y = quantizing.ids(32), _targets()
    model.compile(
        keras.optimizers.Adam(0.02),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    # There is one batch, and a step's loss is that before it.
    history = model.fit(x, y, batch_size=32, epochs=steps + 1, verbose=0)
    return history.history["loss"]


def _base_values(model):
    return {
        path: value
        for path, value in (
            (v.path, np.array(keras.ops.convert_to_numpy(v)))
            for v in model.variables
        )
        if "/adapter/" not in path and not path.startswith(("adam", "seed"))
    }


@functools.cache
def _float_losses(method, steps):
    model = quantizing.model()
    kra.inject(model, METHODS[method](), quantizing.SITES)
    return _losses(model, steps)


@pytest.mark.cpu_seconds(10, reason="the float model is trained first")
@pytest.mark.needs_optimizer
@pytest.mark.parametrize("mode", _modes(everywhere=("float8", "gptq")))
def test_trains_the_adapter_alone_and_learns_like_float(mode, tmp_path):
    start, *_, wanted = _float_losses("lora", 12)
    assert wanted < 0.9 * start

    x = quantizing.ids()
    model = quantizing.quantized(mode)
    base, before = zoo.outputs(model, x), _base_values(model)
    kra.inject(model, METHODS["lora"](), quantizing.SITES)
    np.testing.assert_array_equal(zoo.outputs(model, x), base)
    *_, found = _losses(model, 12)
    assert abs(found - wanted) < 0.05 * wanted
    after = _base_values(model)
    assert before.keys() <= after.keys()
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, path)
    with kra.disabled(model):
        np.testing.assert_array_equal(zoo.outputs(model, x), base)

    trained = zoo.outputs(model, x)
    assert np.abs(trained - base).max() > 0.1
    kra.save_adapter(model, tmp_path / "a.safetensors")
    again = quantizing.quantized(mode)
    kra.load_adapter(again, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(zoo.outputs(again, x), trained)
    kra.eject(model)
    np.testing.assert_array_equal(zoo.outputs(model, x), base)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "method, mode",
    [
        ("dora", "int4"),
        ("dora", "float8"),
        ("dora", "gptq"),
        ("randlora", "int8"),
        ("randlora", "int4 blocks"),
        ("randlora", "awq"),
    ],
)
def test_methods_that_ask_for_the_kernel(mode, method):
    if not quantizing.has(mode):
        pytest.skip(f"This Keras has no {mode}.")
    model = quantizing.quantized(mode)
    kra.inject(model, METHODS[method](), quantizing.SITES)
    x = quantizing.ids()
    base = zoo.outputs(quantizing.quantized(mode), x)
    np.testing.assert_allclose(
        zoo.outputs(model, x), base, atol=2e-5 if mode != "float8" else 0.05
    )
    *_, wanted = _float_losses(method, 10)
    *_, found = _losses(model, 10)
    assert abs(found - wanted) < 0.05 * wanted


def _kernel(layer):
    """The kernel view by which a layer multiplies, by Keras's own product."""
    view = layer.kernel_view
    units = keras.ops.eye(view.input_dim)
    if layer.quantization_mode == "float8":
        # A unit may be beyond the scale of the inputs.
        units = units * keras.ops.convert_to_tensor(layer.inputs_scale)
        return keras.ops.convert_to_numpy(
            layer.multiply(units) / layer.inputs_scale
        )
    return keras.ops.convert_to_numpy(layer.multiply(units))


@pytest.mark.parametrize("mode", _modes(everywhere=("float8",)))
@pytest.mark.parametrize("name", quantizing.SITES)
def test_gradient_of_the_input(mode, name):
    """It is that of the product with the dequantized kernel."""
    model = quantizing.quantized(mode)
    kra.inject(model, kra.LoRA(2), quantizing.SITES)
    layer = model.get_layer(name)
    if mode == "float8":
        # Such gradients vanish if they are rounded to an untrained scale.
        layer.inputs_scale.assign(0.01)
    kernel = _kernel(layer)
    layer.activation = None
    x = zoo.normal(3, quantizing.LENGTH, kernel.shape[0])
    shape = np.shape(layer(x))
    upstream = 1e-6 * zoo.normal(*shape, seed=1)
    (of_x,) = gradients.gradients(layer, x, [], upstream)
    rows = upstream.reshape(*upstream.shape[:2], -1)
    np.testing.assert_allclose(of_x, rows @ kernel.T, rtol=1e-3, atol=1e-9)


class TestMerge:
    def _adapted(self, mode):
        model = quantizing.quantized(mode)
        kra.inject(model, kra.LoRA(2), quantizing.SITES)
        zoo.randomize(model, scale=0.6)
        return model, zoo.outputs(model, quantizing.ids())

    @pytest.mark.one_backend
    @pytest.mark.parametrize("mode", ["gptq", "gptq 8", "awq"])
    def test_calibrated_kernels_are_refused(self, mode):
        model, before = self._adapted(mode)
        for end in (kra.merge, lambda m: kra.merged(m).__enter__()):
            with pytest.raises(ValueError, match="through_float=True"):
                end(model)
        x = quantizing.ids()
        np.testing.assert_array_equal(zoo.outputs(model, x), before)
        assert len(kra.sites(model)) == 3
        with pytest.raises(TypeError, match="through_float=1"):
            kra.merge(model, through_float=1)

    @pytest.mark.one_backend
    @pytest.mark.parametrize("mode", ["gptq", "gptq 8", "awq"])
    def test_through_float(self, mode):
        x = quantizing.ids()
        base = zoo.outputs(quantizing.quantized(mode), x)
        model, adapted = self._adapted(mode)
        values = _base_values(model)
        with pytest.warns(kra.AdapterWarning, match="the error is up to"):
            with kra.merged(model, through_float=True):
                inside = zoo.outputs(model, x)
        for path, value in _base_values(model).items():
            np.testing.assert_array_equal(value, values[path], path)
        np.testing.assert_array_equal(zoo.outputs(model, x), adapted)
        layers = [model.get_layer(name) for name in quantizing.SITES]
        deltas = [
            keras.ops.convert_to_numpy(
                one.adapter.get("default").delta_kernel()
            )
            for one in layers
        ]
        wanted = [_kernel(one) + delta for one, delta in zip(layers, deltas)]
        with pytest.warns(kra.AdapterWarning) as warned:
            kra.merge(model, through_float=True)
        np.testing.assert_array_equal(zoo.outputs(model, x), inside)
        assert layers[1].quantized_kernel.dtype == "uint8"
        kra.inject(model, kra.LoRA(2), quantizing.SITES)
        errors = [
            np.linalg.norm(_kernel(one) - kernel) / np.linalg.norm(delta)
            for one, kernel, delta in zip(layers, wanted, deltas)
        ]
        (told,) = (
            str(one.message).partition("up to ")[2].partition(" %")[0]
            for one in warned
            if issubclass(one.category, kra.AdapterWarning)
        )
        np.testing.assert_allclose(float(told), 100 * max(errors), rtol=0.02)
        assert max(errors) < (0.05 if "8" in mode else 0.6)
        error = np.abs(inside - adapted).mean()
        assert error < 0.5 * np.abs(adapted - base).mean()

    @pytest.mark.one_backend
    def test_float8_keeps_floats(self):
        model, adapted = self._adapted("float8")
        base = zoo.outputs(quantizing.quantized("float8"), quantizing.ids())
        kra.merge(model)
        found = zoo.outputs(model, quantizing.ids())
        error = np.abs(found - adapted).mean()
        assert error < 0.1 * np.abs(base - adapted).mean()
        assert model.get_layer("up").kernel.dtype == "float32"

    @pytest.mark.one_backend
    def test_layers_that_were_not_calibrated(self):
        """Keras gives them the mode too, and computes with their floats."""
        model = quantizing.model()
        layer = model.get_layer("up")
        layer.quantize(
            "gptq",
            config=keras.quantizers.GPTQConfig(
                dataset=["a"], tokenizer=str, group_size=4
            ),
        )
        kra.inject(model, kra.LoRA(2), "up")
        zoo.randomize(model, scale=0.6)
        adapted = zoo.outputs(model, quantizing.ids())
        kra.merge(model)
        found = zoo.outputs(model, quantizing.ids())
        np.testing.assert_allclose(found, adapted, atol=1e-5)


@pytest.mark.parametrize(
    "mode",
    [
        one
        for one in _modes(everywhere=("int4", "awq"))
        # The other kernels have the shape of the float kernel.
        if one.values[0] not in ("int8", "float8")
    ],
)
@pytest.mark.parametrize("name", ["query", "up"])
def test_no_unpacked_copy_is_kept_for_the_backward_pass(mode, name):
    model = quantizing.quantized(mode)
    kra.inject(model, kra.LoRA(1), quantizing.SITES)
    layer = model.get_layer(name)
    view = layer.kernel_view
    # Few inputs, so that none of them is as large as the kernel.
    x = zoo.normal(1, 2, view.input_dim)
    kept = gradients.kept_for_backward(layer, x, [])
    packed = [tuple(v.shape) for v in layer.variables]
    large = [
        (shape, dtype)
        for shape, dtype in kept
        if np.prod(shape) >= view.input_dim * view.output_dim
        # The variables themselves are there anyway.
        and tuple(shape) not in packed
    ]
    assert not large
