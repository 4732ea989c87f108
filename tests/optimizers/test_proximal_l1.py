"""The soft threshold after each update."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_randadapt as kra
from keras_randadapt.optimizers import ProximalL1
from tests import methods
from tests.optimizers.test_masked_gradient import OPTIMIZERS
from tests.optimizers.test_masked_gradient import needs_multi
from tests.optimizers.test_masked_gradient import sweep

pytestmark = pytest.mark.one_backend


def soft_threshold(v, threshold):
    return np.sign(v) * np.maximum(np.abs(v) - threshold, 0)


def _variables():
    values = np.array([-0.3, -0.1, 0.0, 0.05, 0.15, 0.199, 0.2, 1.0], "float32")
    with keras.name_scope("default", override_parent="site/adapter"):
        gate = keras.Variable(values, name="gate")
    other = keras.Variable(values, name="lora_b")
    gradients = [np.linspace(-1, 1, 8).astype("float32")] * 2
    return [gate, other], gradients


def _apply(optimizer, gradients, variables):
    optimizer.apply([ops.convert_to_tensor(g) for g in gradients], variables)
    return [methods.numpy(v) for v in variables]


class TestProximalL1:
    @pytest.mark.every_backend
    def test_values_of_the_soft_threshold(self):
        """Values up to twice the threshold survive, as the paper has it."""
        (gate, other), gradients = _variables()
        zeros = [np.zeros(8, "float32")] * 2
        optimizer = ProximalL1(keras.optimizers.SGD(0.1), 1.0)
        before = methods.numpy(gate)
        after, untouched = _apply(optimizer, zeros, [gate, other])
        np.testing.assert_allclose(
            after, [-0.2, 0, 0, 0, 0.05, 0.099, 0.1, 0.9], atol=1e-7
        )
        assert after[2] == after[3] == 0
        np.testing.assert_array_equal(untouched, before)

    @pytest.mark.parametrize("name", sweep(OPTIMIZERS))
    def test_every_optimizer(self, name):
        """The inner optimizer's step, then the threshold."""
        plain, gradients = _variables()
        wrapped, _ = _variables()
        inner = OPTIMIZERS[name]()
        inner.exclude_from_weight_decay(var_names=["gate"])
        optimizer = ProximalL1(OPTIMIZERS[name](), 0.7)
        gate, other = _apply(optimizer, gradients, wrapped)
        stepped, expected = _apply(inner, gradients, plain)
        np.testing.assert_allclose(
            gate, soft_threshold(stepped, 0.07), atol=1e-6
        )
        np.testing.assert_array_equal(other, expected)

    def test_closed_values_stay_closed_without_a_gradient(self):
        variables, _ = _variables()
        zeros = [np.zeros(8, "float32")] * 2
        optimizer = ProximalL1(keras.optimizers.Adam(0.1), 1.0)
        for _ in range(12):
            gate, _ = _apply(optimizer, zeros, variables)
        assert not gate.any()

    def test_no_weight_decay(self):
        (gate, other), _ = _variables()
        zeros = [np.zeros(8, "float32")] * 2
        before = methods.numpy(gate)
        optimizer = ProximalL1(keras.optimizers.AdamW(0.1, weight_decay=0.5), 0)
        after, decayed = _apply(optimizer, zeros, [gate, other])
        np.testing.assert_array_equal(after, before)
        np.testing.assert_allclose(decayed, 0.95 * before, rtol=1e-6)

    def test_what_was_excluded_from_decay_stays_so(self):
        (gate, other), _ = _variables()
        zeros = [np.zeros(8, "float32")] * 2
        before = methods.numpy(other)
        inner = keras.optimizers.AdamW(0.1, weight_decay=0.5)
        inner.exclude_from_weight_decay(var_list=[other])
        # Keras 3.15 on torch fails where nothing is left to decay.
        third = keras.Variable(before, name="lora_a")
        _, after, _ = _apply(
            ProximalL1(inner, 0), [*zeros, zeros[0]], [gate, other, third]
        )
        np.testing.assert_array_equal(after, before)

    def test_gradient_accumulation(self):
        variables, gradients = _variables()
        optimizer = ProximalL1(
            keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), 1.0
        )
        before = methods.numpy(variables[0])
        between, _ = _apply(optimizer, gradients, variables)
        np.testing.assert_array_equal(between, before)
        after, _ = _apply(optimizer, gradients, variables)
        np.testing.assert_allclose(
            after, soft_threshold(before - 0.1 * gradients[0], 0.1), atol=1e-6
        )

    def test_the_rate_of_a_schedule(self):
        schedule = keras.optimizers.schedules.PiecewiseConstantDecay(
            [0], [0.2, 0.1]
        )
        variables, _ = _variables()
        zeros = [np.zeros(8, "float32")] * 2
        optimizer = ProximalL1(keras.optimizers.SGD(schedule), 1.0)
        before = methods.numpy(variables[0])
        first, _ = _apply(optimizer, zeros, variables)
        np.testing.assert_allclose(
            first, soft_threshold(before, 0.2), atol=1e-7
        )
        second, _ = _apply(optimizer, zeros, variables)
        np.testing.assert_allclose(
            second, soft_threshold(first, 0.1), atol=1e-7
        )

    @needs_multi
    def test_the_rate_of_a_group(self):
        variables, _ = _variables()
        zeros = [np.zeros(8, "float32")] * 2
        multi = keras.optimizers.MultiOptimizer(
            keras.optimizers.OptimizerMap(
                keras.optimizers.SGD(0.5),
                {".*/gate": keras.optimizers.SGD(0.1)},
            )
        )
        before = methods.numpy(variables[0])
        after, _ = _apply(ProximalL1(multi, 1.0), zeros, variables)
        np.testing.assert_allclose(
            after, soft_threshold(before, 0.1), atol=1e-7
        )

    def test_other_paths(self):
        variables, gradients = _variables()
        optimizer = ProximalL1(keras.optimizers.SGD(0.1), 1.0, paths="lora_b")
        before = methods.numpy(variables[0])
        gate, b = _apply(optimizer, gradients, variables)
        np.testing.assert_allclose(gate, before - 0.1 * gradients[0], 1e-6)
        np.testing.assert_allclose(b, soft_threshold(gate, 0.1), atol=1e-7)

    def test_bad_arguments(self):
        variables, gradients = _variables()
        for arguments, message in (
            ({"strength": -1}, "`strength` must be at least 0"),
            ({"strength": 1, "paths": "("}, "must be a regular expression"),
        ):
            with pytest.raises(ValueError, match=message):
                ProximalL1("adam", **arguments)
        with pytest.raises(ValueError, match="found no variable"):
            ProximalL1("adam", 1.0, paths="doors").build(variables)
        with pytest.raises(ValueError, match="use_ema"):
            ProximalL1(keras.optimizers.SGD(use_ema=True), 1).build(variables)

    def test_config_round_trip(self):
        optimizer = ProximalL1(keras.optimizers.SGD(0.1), 0.5, paths="x$")
        again = kra.optimizers.ProximalL1.from_config(optimizer.get_config())
        assert again.get_config() == optimizer.get_config()
