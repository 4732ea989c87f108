"""DoRA against dense matrices written from the paper."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from tests import gradients
from tests import methods
from tests import zoo
from tests.methods import site_of
from tests.test_rlora import dense_delta as rlora_delta
from tests.test_vera import dense_delta as vera_delta

pytestmark = pytest.mark.one_backend

# Long enough columns for norms in closed form.
VIEW = (70, 9)


def _lora_delta(adapter, view, lora_a, lora_b):
    return adapter.scaling * lora_a @ lora_b


def _vera(adapter, view, vera_d, vera_b):
    return vera_delta(adapter, view, vera_d, vera_b)


def _rlora(adapter, view, alpha, beta):
    return rlora_delta(adapter, view, alpha, beta)[0]


INNER = {
    "lora": (lambda: kra.LoRA(3, alpha=6), _lora_delta),
    "vera": (lambda: kra.VeRA(5), _vera),
    "rlora": (lambda: kra.RLoRA(5, scaling=2.0), _rlora),
}


def adapted_kernel(kernel, delta, magnitude):
    """Equation 5: each column, one an output, of length `m`."""
    direction = kernel + delta
    return magnitude * direction / np.linalg.norm(direction, axis=0)


def _model(template, quantized=None):
    inputs = keras.Input((VIEW[0],))
    site = keras.layers.Dense(VIEW[1], use_bias=False, name="site")
    outputs = site(inputs)
    model = zoo.set_weights(keras.Model(inputs, outputs))
    kernel = methods.numpy(model.get_layer("site").kernel).astype("float64")
    if quantized:
        model.quantize(quantized)
    kra.inject(model, template, "site")
    (adapter,) = model._randadapt.adapters("default").values()
    return model, adapter, kernel


def _randomize(adapter):
    """Inner values by name, and the magnitude."""
    values = methods.randomize(adapter)
    magnitude = np.abs(values.pop("magnitude")) + 0.5
    adapter.magnitude.assign(magnitude)
    return values, magnitude


class _Linear:
    """The product of `adapt`, of a bare kernel."""

    def __init__(self, kernel):
        self._kernel = keras.ops.convert_to_tensor(kernel.astype("float32"))
        self.base = self

    def __call__(self, x):
        return keras.ops.matmul(x, self._kernel)

    def base_kernel(self):
        return self._kernel

    def times_base(self, rows):
        return keras.ops.matmul(rows, self._kernel)

    kernel = base_kernel


class TestDoRA:
    @pytest.mark.every_backend
    @pytest.mark.parametrize("detach_norm", [True, False])
    @pytest.mark.parametrize("inner", INNER)
    def test_against_dense_reference(self, inner, detach_norm):
        make, delta = INNER[inner]
        model, adapter, kernel = _model(
            kra.DoRA(make(), detach_norm=detach_norm)
        )
        values, magnitude = _randomize(adapter)
        dense = adapted_kernel(
            kernel, delta(adapter.inner, VIEW, **values), magnitude
        )
        x = zoo.normal(5, VIEW[0])
        methods.close(model(x), x @ dense)
        methods.close(model.get_layer("site").kernel, dense)
        kra.merge(model)
        merged = methods.numpy(model.get_layer("site").kernel)
        methods.close(merged, dense)
        # What the magnitude is.
        methods.close(np.linalg.norm(merged, axis=0), magnitude)

    def test_starts_as_the_base_model(self):
        model, adapter, kernel = _model(kra.DoRA(kra.LoRA(3)))
        methods.close(adapter.magnitude, np.linalg.norm(kernel, axis=0), 1e-6)
        assert methods.numpy(adapter.inner.lora_a).any()
        methods.close(model.get_layer("site").kernel, kernel, 1e-6)

    def test_a_column_of_zeros(self):
        inputs = keras.Input((4,))
        outputs = keras.layers.Dense(3, name="site")(inputs)
        model = zoo.set_weights(keras.Model(inputs, outputs))
        kernel = methods.numpy(model.get_layer("site").kernel)
        kernel[:, 1] = 0
        model.get_layer("site").kernel.assign(kernel)
        x = zoo.normal(8, 4)
        before = zoo.outputs(model, x)
        kra.inject(model, kra.DoRA(kra.LoRA(2)), "site")
        methods.close(zoo.outputs(model, x), before, 1e-6)
        model.compile("adam", "mse")
        model.fit(x, zoo.normal(8, 3), verbose=0)
        assert np.all(np.isfinite(zoo.outputs(model, x)))

    @pytest.mark.parametrize("left", [0.1, 1e-3, 1e-4])
    @pytest.mark.parametrize("dim", [1, 70])
    def test_a_delta_that_takes_a_column_away(self, dim, left):
        """But for a small part of it: what a closed form can't resolve."""
        inputs = keras.Input((dim,))
        site = keras.layers.Dense(1, use_bias=False, name="site")
        model = zoo.set_weights(keras.Model(inputs, site(inputs)))
        kernel = methods.numpy(site.kernel)
        kra.inject(model, kra.DoRA(kra.LoRA(1)), "site")
        inner = site.adapter.get("default").inner
        inner.lora_a.assign(kernel * 1.3)
        inner.lora_b.assign([[-(1 - left) / 1.3]])
        x = zoo.normal(5, dim)
        out = zoo.outputs(model, x)
        kra.merge(model)
        merged = zoo.outputs(model, x)
        if dim == 1:
            np.testing.assert_allclose(out, merged, rtol=2e-2)
        # It is of no use, but of no harm to others.
        assert np.abs(out).max() < 2 * np.abs(merged).max()

    def test_scale_of_the_direction_does_not_matter(self):
        kernel = zoo.normal(*VIEW).astype("float64")
        adapter = kra.DoRA(kra.LoRA(3))
        adapter.build_at(site_of(VIEW))
        methods.randomize(adapter)
        for scale in (1.0, 3.0):
            adapter.start_from(scale * kernel)
            adapter.magnitude.assign(np.ones(9))
            adapter.inner.lora_b.assign(scale * zoo.normal(3, 9))
            merged = adapter.merged(
                *[keras.ops.convert_to_tensor((scale * kernel).astype("f"))] * 2
            )
            if scale == 1.0:
                expected = methods.numpy(merged)
        methods.close(merged, expected)

    @pytest.mark.every_backend
    @pytest.mark.parametrize("detach_norm", [True, False])
    @pytest.mark.parametrize("inner", INNER)
    def test_gradients(self, inner, detach_norm):
        """With the norms as constants, as the paper trains, or without."""
        make, delta = INNER[inner]
        adapter = kra.DoRA(make(), detach_norm=detach_norm)
        adapter.build_at(site_of(VIEW))
        kernel = zoo.normal(*VIEW).astype("float64")
        adapter.start_from(kernel.astype("float32"))
        values, magnitude = _randomize(adapter)
        x, upstream = zoo.normal(6, VIEW[0]), zoo.normal(6, 9, seed=4)
        norms = np.linalg.norm(
            kernel + delta(adapter.inner, VIEW, **values), axis=0
        )

        def loss(values, magnitude):
            direction = kernel + delta(adapter.inner, VIEW, **values)
            n = norms if detach_norm else np.linalg.norm(direction, axis=0)
            return np.sum(upstream * (x @ (magnitude * direction / n)))

        names = list(values)
        found = gradients.gradients(
            lambda x: adapter.adapt(x, _Linear(kernel), training=True),
            x,
            [adapter.magnitude, *(getattr(adapter.inner, n) for n in names)],
            upstream,
        )
        dense = adapted_kernel(
            kernel, delta(adapter.inner, VIEW, **values), magnitude
        )
        methods.close(found[0], upstream @ dense.T, 5e-5)
        methods.close(
            found[1],
            gradients.numeric_gradient(lambda m: loss(values, m), magnitude),
            5e-5,
        )
        for name, got in zip(names, found[2:]):
            expected = gradients.numeric_gradient(
                lambda v, name=name: loss({**values, name: v}, magnitude),
                values[name],
            )
            methods.close(got, expected, 5e-5)

    def test_full_gradient_has_no_part_along_the_direction(self):
        """Which a change of length, that the norm undoes, would be."""
        parts = []
        for detach_norm in (True, False):
            # A is the identity: B is the delta.
            adapter = kra.DoRA(kra.LoRA(7), detach_norm=detach_norm)
            adapter.build_at(site_of((7, 9)))
            kernel = zoo.normal(7, 9)
            adapter.start_from(kernel)
            adapter.inner.lora_a.assign(np.eye(7))
            b = zoo.normal(7, 9, seed=2)
            adapter.inner.lora_b.assign(b)
            _, of_b = gradients.gradients(
                lambda x: adapter.adapt(x, _Linear(kernel), training=True),
                zoo.normal(6, 7),
                [adapter.inner.lora_b],
                zoo.normal(6, 9, seed=4),
            )
            direction = (kernel + b) / np.linalg.norm(kernel + b, axis=0)
            parts.append((np.sum(of_b * direction, axis=0), of_b))
        (with_part, detached), (without, full) = parts
        assert np.abs(with_part).max() > 0.1
        assert np.abs(without).max() < 1e-4
        # The projection of the one is the other.
        methods.close(full, detached - direction * with_part, 1e-4)

    @pytest.mark.every_backend
    def test_no_delta_is_formed_for_thin_factors(self, monkeypatch):
        model, adapter, _ = _model(kra.DoRA(kra.LoRA(3)))

        def fail():
            raise AssertionError("the delta was formed")

        monkeypatch.setattr(adapter.inner, "delta_kernel", fail)
        model(zoo.normal(5, VIEW[0]), training=True)

    @pytest.mark.parametrize("inner", [kra.VeRA, kra.RLoRA, kra.RandLoRA])
    def test_dear_factors_are_not_formed(self, inner, monkeypatch):
        model, adapter, _ = _model(kra.DoRA(inner(3)))

        def fail():
            raise AssertionError("the factors were formed")

        monkeypatch.setattr(adapter.inner, "factors", fail)
        model(zoo.normal(5, VIEW[0]), training=True)

    def test_dropout_spares_the_base_product(self):
        """The reference code: W0 x is whole, both corrections see drops."""
        model, adapter, kernel = _model(kra.DoRA(kra.LoRA(3, dropout=0.5)))
        values, magnitude = _randomize(adapter)
        delta = _lora_delta(adapter.inner, VIEW, **values)
        x = zoo.normal(5, VIEW[0])
        state = adapter.inner.dropout_seed_generator.state
        before = methods.numpy(state)
        y = methods.numpy(model(x, training=True))
        state.assign(before)
        dropped = methods.numpy(
            adapter.inner.drop(keras.ops.convert_to_tensor(x), True)
        )
        assert np.any(dropped == 0)
        c = magnitude / np.linalg.norm(kernel + delta, axis=0)
        expected = x @ kernel + dropped @ (c * (kernel + delta) - kernel)
        methods.close(y, expected)

    def test_inner_adapters_know_their_sites(self):
        """SAID's map is another at each site."""
        model, _, _ = zoo.bert()
        kra.inject(model, kra.DoRA(kra.SAID(10)), ["query", "value"])
        adapters = model._randadapt.adapters("default").values()
        assert [a.inner.site.number for a in adapters] == [0, 1, 2, 3]
        zoo.randomize(model)
        for adapter in adapters:
            adapter.inner.said_scale.assign(1.0)
        deltas = [methods.numpy(a.inner.delta_kernel()) for a in adapters]
        for i, one in enumerate(deltas):
            for other in deltas[:i]:
                assert np.abs(one - other).max() > 1e-2

    def test_beside_another_adapter(self):
        model, adapter, kernel = _model(kra.DoRA(kra.LoRA(3)))
        values, magnitude = _randomize(adapter)
        kra.inject(model, kra.LoRA(2, seed=9), "site", name="other")
        zoo.randomize(model, "other")
        (other,) = model._randadapt.adapters("other").values()
        dense = adapted_kernel(
            kernel, _lora_delta(adapter.inner, VIEW, **values), magnitude
        ) + methods.numpy(other.delta_kernel())
        x = zoo.normal(5, VIEW[0])
        for order in (["default", "other"], ["other", "default"]):
            kra.set_active(model, order)
            methods.close(model(x), x @ dense)
            methods.close(model.get_layer("site").kernel, dense)

    @pytest.mark.parametrize("inner", INNER)
    def test_quantized_kernels(self, inner):
        make, delta = INNER[inner]
        model, adapter, kernel = _model(kra.DoRA(make()), "int8")
        values, magnitude = _randomize(adapter)
        dense = adapted_kernel(
            kernel, delta(adapter.inner, VIEW, **values), magnitude
        )
        x = zoo.normal(5, VIEW[0])
        y = methods.numpy(model(x))
        assert np.abs(y - x @ dense).mean() < 0.03 * np.abs(x @ dense).mean()

    def test_file_holds_what_is_trained(self, tmp_path):
        model, adapter, _ = _model(kra.DoRA(kra.LoRA(3)))
        _randomize(adapter)
        x = zoo.normal(5, VIEW[0])
        out = zoo.outputs(model, x)
        kra.save_adapter(model, tmp_path / "file")
        assert {w.name for w in adapter.stored_weights()} == {
            "magnitude",
            "lora_a",
            "lora_b",
        }
        kra.eject(model)
        kra.load_adapter(model, tmp_path / "file")
        np.testing.assert_array_equal(zoo.outputs(model, x), out)

    def test_inner_optimizers_and_penalties(self):
        model, adapter, _ = _model(kra.DoRA(kra.RMLoRA(4)))
        model.compile("sgd", "mse")
        assert isinstance(model.optimizer, kra.optimizers.MaskedGradient)
        assert len(model.losses) == 2
        model.fit(zoo.normal(5, VIEW[0]), zoo.normal(5, 9), verbose=0)

    def test_counts(self):
        model, _, _ = zoo.bert()
        report = kra.inject(model, kra.DoRA(kra.LoRA(3)), ["query", "value"])
        assert report.adapter_parameters == 4 * (3 * (8 + 8) + 8)
        kra.eject(model)
        report = kra.inject(model, kra.DoRA(kra.VeRA(5)), ["query", "value"])
        assert report.adapter_parameters == 4 * (2 * 8 + 5)

    def test_analysis(self):
        model, adapter, kernel = _model(kra.DoRA(kra.LoRA(3)))
        values, magnitude = _randomize(adapter)
        delta = _lora_delta(adapter.inner, VIEW, **values)
        update = adapted_kernel(kernel, delta, magnitude) - kernel
        table = kra.analysis.intrinsic_rank(model)
        assert list(table["rank"]) == [np.linalg.matrix_rank(update)]

    @pytest.mark.parametrize(
        "adapter, error, message",
        [
            (8, TypeError, "`adapter` must be an adapter"),
            (kra.LoRA, TypeError, "`adapter` must be an adapter"),
            (kra.DoRA(kra.LoRA(2)), ValueError, "an unbuilt adapter that adds"),
        ],
        ids=str,
    )
    def test_bad_arguments(self, adapter, error, message):
        with pytest.raises(error, match=message):
            kra.DoRA(adapter)

    def test_rank_above_the_dimensions(self):
        with pytest.raises(ValueError, match="`rank` must be at most 9"):
            _model(kra.DoRA(kra.LoRA(10)))

    def test_config_round_trip(self):
        template = kra.DoRA(
            kra.VeRA(7, basis="sparse", seed=3, dropout=0.1), detach_norm=False
        )
        config = template.get_config()
        again = kra.DoRA.from_config(config)
        assert again.get_config() == config
        assert again.inner.get_config() == template.inner.get_config()
        assert again.seed == 3 and again.dropout == 0.1


class TestPaperCounts:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "template, count",
        [
            (lambda: kra.DoRA(kra.LoRA(8)), 313_344),
            (lambda: kra.DoRA(kra.VeRA(256)), 43_008),
        ],
    )
    def test_roberta_base(self, template, count):
        model = methods.roberta()
        report = kra.inject(model, template(), ["query", "value"])
        assert report.adapter_parameters == count


@pytest.mark.every_backend
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_columns_that_16_bits_round_to_zero(policy, kind):
    """A float32 kernel is read as it is, also inside a 16-bit layer."""
    if kind == "dense":
        layer = keras.layers.Dense(6, dtype=policy, name="site")
        x = zoo.normal(16, 8)
    else:
        layer = keras.layers.Conv2D(6, 3, dtype=policy, name="site")
        x = zoo.normal(16, 4, 4, 8)
    inputs = keras.Input(x.shape[1:])
    y = keras.layers.Flatten(dtype="float32")(layer(inputs))
    model = zoo.set_weights(
        keras.Model(inputs, keras.layers.Dense(1, dtype="float32")(y))
    )
    kernel = methods.numpy(layer._kernel)
    # Zero, below what 16 bits hold, and below what float32 holds normally.
    kernel[..., :3] = 0.0, 1e-8, 1e-39
    layer._kernel.assign(kernel)
    base = zoo.outputs(model, x)
    kra.inject(model, kra.DoRA(kra.LoRA(2)), "site")
    np.testing.assert_allclose(
        zoo.outputs(model, x), base, rtol=1e-2, atol=1e-2
    )
    losses = zoo.fit(model, x, steps=4).history["loss"]
    assert np.all(np.isfinite(losses)) and losses[-1] < losses[0]
    assert all(np.all(np.isfinite(methods.numpy(w))) for w in model.weights)
