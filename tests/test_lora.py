"""LoRA against its formula."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from tests import zoo


def _built(view=(7, 5), **arguments):
    adapter = kra.LoRA(3, **arguments)
    adapter.build(view)
    return adapter


def _numpy(x):
    return keras.ops.convert_to_numpy(x)


class TestLoRA:
    def test_delta_is_scaled_product(self):
        adapter = _built(alpha=6)
        a, b = zoo.normal(7, 3, seed=1), zoo.normal(3, 5, seed=2)
        adapter.lora_a.assign(a)
        adapter.lora_b.assign(b)
        x, z = zoo.normal(2, 4, 7), zoo.normal(2, 4, 5)
        dense = 2.0 * a.astype("float64") @ b.astype("float64")
        ids = zoo.integers(4, high=7)
        for got, expected in (
            (adapter.delta_kernel(), dense),
            (adapter.delta(keras.ops.convert_to_tensor(x)), x @ dense),
            (
                adapter.delta_transpose(keras.ops.convert_to_tensor(z)),
                z @ dense.T,
            ),
            (
                adapter.lookup(keras.ops.convert_to_tensor(ids), "float32"),
                dense[ids],
            ),
        ):
            np.testing.assert_allclose(
                _numpy(got), expected, rtol=1e-5, atol=1e-5
            )

    def test_first_values(self):
        a = _numpy(_built(seed=5).lora_a)
        assert np.abs(a).max() <= 1 / np.sqrt(7)
        assert np.abs(a).max() > 0.5 / np.sqrt(7)
        assert not np.any(_numpy(_built().lora_b))
        np.testing.assert_array_equal(a, _numpy(_built(seed=5).lora_a))
        assert np.any(a != _numpy(_built(seed=6).lora_a))
        # The same on every backend, for ever: experiments repeat.
        np.testing.assert_allclose(
            _numpy(_built(seed=5).lora_a)[0], GOLDEN_A, rtol=1e-6
        )

    def test_counts(self):
        adapter = _built()
        assert sum(np.prod(w.shape) for w in adapter.weights) == 3 * (7 + 5)

    @pytest.mark.parametrize(
        "initializer",
        ["zeros", {"name": "normal", "stddev": 0.5}, "he_normal"],
        ids=str,
    )
    def test_initializers(self, initializer):
        adapter = _built(b_initializer=initializer)
        config = adapter.get_config()
        again = kra.LoRA.from_config(config)
        assert again.get_config() == config
        b = _numpy(adapter.lora_b)
        assert (np.abs(b).max() == 0) == (initializer == "zeros")

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"rank": 0}, "`rank` must be at least 1"),
            ({"rank": 2.5}, "`rank` must be an integer"),
            ({"rank": True}, "`rank` must be an integer"),
            ({"alpha": 1, "scaling": 1}, "give one of them"),
            ({"scaling": float("nan")}, "`scaling` must be a finite number"),
            ({"alpha": "much"}, "`alpha` must be a finite number"),
            ({"dropout": 1.0}, "`dropout` must be at least 0 and below 1"),
            ({"seed": -1}, "`seed`"),
            ({"a_initializer": "no_such"}, "`a_initializer` must be one of"),
        ],
        ids=str,
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises((ValueError, TypeError), match=message):
            kra.LoRA(**arguments)

    def test_rank_above_the_kernel(self):
        model, _, targets = zoo.dense()
        with pytest.raises(ValueError, match="`rank` must be at most 6") as e:
            kra.inject(model, kra.LoRA(7), targets)
        assert "At 'layers/dense'" in str(e.value)

    def test_dropout_only_in_training(self):
        model, x, targets = zoo.dense()
        kra.inject(model, kra.LoRA(2, dropout=0.5), targets)
        zoo.randomize(model)
        calm = zoo.outputs(model, x)
        np.testing.assert_array_equal(zoo.outputs(model, x), calm)
        noisy = _numpy(model(x, training=True)).ravel()
        assert np.abs(noisy - calm).max() > 1e-3
        again = _numpy(model(x, training=True)).ravel()
        assert np.abs(noisy - again).max() > 1e-3
        zoo.fit(model, x)

    def test_dropout_in_a_convolution(self):
        model, x, targets = zoo.conv2d_grouped()
        kra.inject(model, kra.LoRA(2, dropout=0.5), targets)
        zoo.randomize(model)
        calm = zoo.outputs(model, x)
        noisy = _numpy(model(x, training=True)).ravel()
        assert np.abs(noisy - calm).max() > 1e-3
        with kra.disabled(model):
            base = zoo.outputs(model, x)
            np.testing.assert_allclose(
                _numpy(model(x, training=True)).ravel(), base, atol=1e-6
            )


GOLDEN_A = [-0.33777719736099243, -0.17645853757858276, 0.07897330075502396]
