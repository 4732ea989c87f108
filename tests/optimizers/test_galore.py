"""GaLore against its algorithm in NumPy."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_randadapt as kra
from keras_randadapt.optimizers import GaLore
from tests import methods
from tests import zoo
from tests.optimizers.test_masked_gradient import OPTIMIZERS
from tests.optimizers.test_masked_gradient import needs_multi
from tests.optimizers.test_masked_gradient import sweep

pytestmark = pytest.mark.one_backend("torch")

SHAPES = [(6, 9), (9, 6), (7, 7)]


def _variables(*shapes):
    variables = [
        keras.Variable(zoo.normal(*shape, seed=i), name=f"kernel_{i}")
        for i, shape in enumerate(shapes)
    ]
    gradients = [zoo.normal(*s, seed=10 + i) for i, s in enumerate(shapes)]
    return variables, gradients


def _apply(optimizer, gradients, variables):
    optimizer.apply([ops.convert_to_tensor(g) for g in gradients], variables)
    return [methods.numpy(v) for v in variables]


def reference_adam(weight, gradients, rank, interval, scale, rate):
    """Algorithm 2 in float64, on a weight with as many rows as columns or
    fewer."""
    weight = weight.astype("float64")
    m = v = 0.0
    for t, gradient in enumerate(gradients):
        if t % interval == 0:
            p = np.linalg.svd(gradient.astype("float64"))[0][:, :rank]
            p = p * np.sign(p[np.argmax(np.abs(p), axis=0), range(rank)])
        r = p.T @ gradient
        m = 0.9 * m + 0.1 * r
        v = 0.999 * v + 0.001 * r**2
        m_hat, v_hat = m / (1 - 0.9 ** (t + 1)), v / (1 - 0.999 ** (t + 1))
        weight = weight - rate * scale * p @ (m_hat / (np.sqrt(v_hat) + 1e-7))
    return weight


class TestGaLore:
    @pytest.mark.every_backend
    @pytest.mark.parametrize("transposed", [False, True])
    def test_adam(self, transposed):
        """Five updates, a new projection every second one."""
        (variable,), _ = _variables((6, 9))
        before = methods.numpy(variable)
        gradients = [zoo.normal(6, 9, seed=20 + t) for t in range(5)]
        expected = reference_adam(before, gradients, 2, 2, 0.5, 0.1)
        if transposed:
            # The other side is projected; the update is the transpose.
            variable = keras.Variable(before.T, name="kernel")
            gradients = [g.T.copy() for g in gradients]
            expected = expected.T
        optimizer = GaLore(
            keras.optimizers.Adam(0.1), 2, update_interval=2, scale=0.5
        )
        for gradient in gradients:
            (after,) = _apply(optimizer, [gradient], [variable])
        methods.close(after, expected, 2e-4)

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_first_step_of_adam(self, shape):
        """scale * rate * P sign(R): a step of rank 2, in P's columns."""
        (variable,), (gradient,) = _variables(shape)
        before = methods.numpy(variable)
        optimizer = GaLore(keras.optimizers.Adam(0.1), 2, scale=0.5)
        (after,) = _apply(optimizer, [gradient], [variable])
        u, _, v = np.linalg.svd(gradient, full_matrices=False)
        if shape[0] <= shape[1]:
            p = u[:, :2]
            expected = p @ np.sign(p.T @ gradient)
        else:
            p = v[:2].T
            expected = np.sign(gradient @ p) @ p.T
        methods.close(before - after, 0.05 * expected, 1e-4)
        assert np.linalg.matrix_rank(before - after, tol=1e-5) <= 2

    @pytest.mark.every_backend
    @pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
    def test_two_sided(self, shape):
        """Definition 3.4 with Adam in float64: five updates, three spaces."""
        (variable,), _ = _variables(shape)
        weight = methods.numpy(variable).astype("float64")
        gradients = [zoo.normal(*shape, seed=20 + t) for t in range(5)]
        optimizer = GaLore(
            keras.optimizers.Adam(0.1, epsilon=0.1),
            2,
            update_interval=2,
            scale=0.5,
            two_sided=True,
        )
        for gradient in gradients:
            (after,) = _apply(optimizer, [gradient], [variable])
        m = v = 0.0
        for t, gradient in enumerate(gradients):
            if t % 2 == 0:
                u, _, vt = np.linalg.svd(gradient.astype("float64"))
                p, q = u[:, :2], vt[:2].T
                p = p * np.sign(p[np.argmax(np.abs(p), axis=0), range(2)])
                q = q * np.sign(q[np.argmax(np.abs(q), axis=0), range(2)])
            r = p.T @ gradient @ q
            m, v = 0.9 * m + 0.1 * r, 0.999 * v + 0.001 * r**2
            m_hat = m / (1 - 0.9 ** (t + 1))
            v_hat = v / (1 - 0.999 ** (t + 1))
            # Keras adds epsilon before it corrects the bias of `v`.
            epsilon = 0.1 / np.sqrt(1 - 0.999 ** (t + 1))
            n = m_hat / (np.sqrt(v_hat) + epsilon)
            weight = weight - 0.1 * 0.5 * p @ n @ q.T
        methods.close(after, weight, 2e-4)
        (projection,) = optimizer._projections.values()
        assert tuple(projection.update.shape) == (2, 2)
        clone = GaLore.from_config(optimizer.get_config())
        assert clone.two_sided

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_full_rank_sgd_is_sgd(self, shape):
        (variable,), (gradient,) = _variables(shape)
        before = methods.numpy(variable)
        optimizer = GaLore(keras.optimizers.SGD(0.1), 99, scale=1.0)
        (after,) = _apply(optimizer, [gradient], [variable])
        methods.close(after, before - 0.1 * gradient)

    def test_projection_is_orthonormal_and_kept_for_the_interval(self):
        variables, _ = _variables((6, 9))
        optimizer = GaLore("adam", 3, update_interval=3)
        seen = []
        for step in range(7):
            _apply(optimizer, [zoo.normal(6, 9, seed=step)], variables)
            (projection,) = optimizer._projections.values()
            p = methods.numpy(projection.left)
            methods.close(p.T @ p, np.eye(3))
            seen.append(p)
        changed = [np.any(a != b) for a, b in zip(seen, seen[1:])]
        assert changed == [False, False, True, False, False, True]

    def test_other_variables_are_trained_as_ever(self):
        variables, gradients = _variables((6, 9), (5,), (4, 4))
        plain, _ = _variables((6, 9), (5,), (4, 4))
        optimizer = GaLore(keras.optimizers.Adam(0.1), 2, paths="kernel_0$")
        inner = keras.optimizers.Adam(0.1)
        for _ in range(3):
            after = _apply(optimizer, gradients, variables)
            expected = _apply(inner, gradients, plain)
        assert np.any(after[0] != expected[0])
        for one, two in zip(after[1:], expected[1:]):
            np.testing.assert_array_equal(one, two)

    @pytest.mark.parametrize(
        "name", sweep(sorted(set(OPTIMIZERS) - {"ftrl", "schedule_free_adamw"}))
    )
    def test_every_optimizer(self, name):
        """Kernels change by the inner one's steps with projected gradients."""
        (variable,), (gradient,) = _variables((6, 9))
        expected = methods.numpy(variable)
        optimizer = GaLore(OPTIMIZERS[name](weight_decay=0.0), 2, scale=0.5)
        p = np.linalg.svd(gradient)[0][:, :2]
        small = keras.Variable(np.zeros((2, 9), "float32"), name="kernel_0")
        inner = OPTIMIZERS[name](weight_decay=0.0)
        for _ in range(3):
            (after,) = _apply(optimizer, [gradient], [variable])
            (update,) = _apply(inner, [p.T @ gradient], [small])
            small.assign(np.zeros((2, 9), "float32"))
            # Signs of singular vectors are arbitrary, updates odd in them.
            expected = expected + 0.5 * p @ update
            methods.close(after, expected)

    def test_optimizers_that_do_not_take_steps(self):
        names = ["Ftrl", "ScheduleFreeAdamW"]
        found = [n for n in names if hasattr(keras.optimizers, n)]
        assert "Ftrl" in found
        for name in found:
            with pytest.raises(ValueError, match=f"`{name}` sets variables"):
                GaLore(getattr(keras.optimizers, name)(0.1), 2)

    def test_constraints_of_kernels(self):
        inputs = keras.Input((6,))
        outputs = keras.layers.Dense(5, kernel_constraint="non_neg")(inputs)
        model = zoo.set_weights(keras.Model(inputs, outputs))
        model.compile(GaLore(keras.optimizers.SGD(1.0), 2, scale=1.0), "mse")
        x = zoo.normal(8, 6)
        model.fit(x, -np.ones((8, 5)), epochs=3, verbose=0)
        kernel = methods.numpy(model.layers[-1].kernel)
        assert kernel.min() == 0

    @needs_multi
    def test_fit_with_learning_rate_groups(self):
        model, x, _ = zoo.bert_classifier()
        kra.inject(model, kra.LoRA(2), keep_trainable="logits")
        groups = kra.optimizers.learning_rate_groups(model, adapter=1e-3)
        model.compile(
            GaLore(groups, 1),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        rows = len(next(iter(x.values())))
        history = model.fit(x, np.arange(rows) % 2, epochs=2, verbose=0)
        losses = history.history["loss"]
        assert losses[1] < losses[0]

    def test_kernels_of_several_axes(self):
        """(8, 2, 3) is 8 by 6, and (2, 3, 8) 6 by 8."""
        for shape, matrix in (((8, 2, 3), (8, 6)), ((2, 3, 8), (6, 8))):
            (variable,), (gradient,) = _variables(shape)
            before = methods.numpy(variable)
            optimizer = GaLore(keras.optimizers.SGD(0.1), 2, scale=1.0)
            (after,) = _apply(optimizer, [gradient], [variable])
            u, s, v = np.linalg.svd(gradient.reshape(matrix))
            best = (u[:, :2] * s[:2]) @ v[:2]
            methods.close((before - after).reshape(matrix), 0.1 * best, 1e-4)

    def test_weight_decay_is_of_the_kernel(self):
        variables, gradients = _variables((6, 9), (5,))
        zeros = [np.zeros_like(g) for g in gradients]
        before = [methods.numpy(v) for v in variables]
        optimizer = GaLore(keras.optimizers.AdamW(0.1, weight_decay=0.5), 2)
        after = _apply(optimizer, zeros, variables)
        for one, two in zip(before, after):
            methods.close(two, 0.95 * one)

    def test_gradient_accumulation(self):
        (variable,), _ = _variables((6, 9))
        before = methods.numpy(variable)
        gradients = [zoo.normal(6, 9, seed=t) for t in range(2)]
        optimizer = GaLore(
            keras.optimizers.SGD(
                0.1, gradient_accumulation_steps=2, weight_decay=0.5
            ),
            2,
            update_interval=1,
            scale=1.0,
        )
        (between,) = _apply(optimizer, gradients[:1], [variable])
        np.testing.assert_array_equal(between, before)
        (after,) = _apply(optimizer, gradients[1:], [variable])
        p = np.linalg.svd(gradients[0])[0][:, :2]
        mean = (gradients[0] + gradients[1]) / 2
        methods.close(after, 0.95 * before - 0.1 * p @ p.T @ mean, 1e-4)

    @pytest.mark.every_backend
    def test_a_gradient_that_is_not_finite(self):
        """The step is lost, as with any optimizer, and not the projection."""
        optimizer = GaLore("sgd", rank=2, update_interval=1)
        variables, gradients = _variables((6, 9))
        _apply(optimizer, gradients, variables)
        (projection,) = optimizer._projections.values()
        before = methods.numpy(projection.left)
        (value,) = _apply(optimizer, [gradients[0] * np.nan], variables)
        assert np.isnan(value).all()
        np.testing.assert_array_equal(methods.numpy(projection.left), before)

    @needs_multi
    def test_optimizers_are_chosen_by_path(self):
        variables, gradients = _variables((6, 9), (6, 9))
        before = [methods.numpy(v) for v in variables]
        multi = keras.optimizers.MultiOptimizer(
            keras.optimizers.OptimizerMap(
                keras.optimizers.SGD(0.1),
                {".*kernel_1": keras.optimizers.SGD(0.01)},
            )
        )
        optimizer = GaLore(multi, 99, scale=1.0)
        after = _apply(optimizer, gradients, variables)
        for rate, b, a, g in zip((0.1, 0.01), before, after, gradients):
            methods.close(a, b - rate * g)

    def test_state_of_768_by_768_at_rank_128(self):
        (variable,), _ = _variables((768, 768))
        optimizer = GaLore("adam", 128)
        optimizer.build([variable])
        numbers = 4 * 128 * 768
        assert numbers == 393_216
        # And counters and rates of the two optimizers.
        assert 0 <= optimizer.state_bytes() - 4 * numbers <= 32
        full = keras.optimizers.Adam()
        full.build([variable])
        size = sum(np.prod(v.shape) for v in full.variables)
        assert size >= 1_179_648

    @pytest.mark.every_backend
    def test_plain_fit(self):
        """On every backend's compiled step, and resumed from a file."""
        model, x, y = self._model()
        before = [methods.numpy(v) for v in model.trainable_variables]
        losses = model.fit(x, y, epochs=20, verbose=0).history["loss"]
        assert losses[-1] < 0.7 * losses[0]
        for variable, value in zip(model.trainable_variables, before):
            assert np.any(methods.numpy(variable) != value)

    def test_resumes_from_a_checkpoint(self, tmp_path):
        model, x, y = self._model()
        model.fit(x, y, epochs=3, verbose=0)
        model.save(tmp_path / "model.keras")
        model.fit(x, y, epochs=3, verbose=0)
        again = keras.models.load_model(tmp_path / "model.keras")
        again.fit(x, y, epochs=3, verbose=0)
        for one, two in zip(model.variables, again.variables):
            np.testing.assert_allclose(
                methods.numpy(one), methods.numpy(two), rtol=1e-4, atol=1e-5
            )

    def _model(self):
        x = zoo.normal(16, 7)
        inputs = keras.Input((7,))
        hidden = keras.layers.Dense(6, activation="tanh", name="one")(inputs)
        outputs = keras.layers.Dense(5, name="two")(hidden)
        model = zoo.set_weights(keras.Model(inputs, outputs))
        model.compile(
            GaLore(
                keras.optimizers.Adam(0.05), 3, update_interval=2, scale=1.0
            ),
            "mse",
        )
        return model, x, zoo.normal(16, 5, seed=1)

    def test_bad_arguments(self):
        for arguments, message in (
            ({"rank": 0}, "`rank` must be at least 1"),
            ({"update_interval": 0}, "`update_interval` must be at least 1"),
            ({"scale": np.nan}, "`scale` must be a finite number"),
            ({"paths": "("}, "must be a regular expression"),
        ):
            with pytest.raises(ValueError, match=message):
                GaLore("adam", **arguments)
        variables, _ = _variables((5,))
        with pytest.raises(ValueError, match="found no matrix to project"):
            GaLore("adam").build(variables)
        built = keras.optimizers.Adam()
        built.build(variables)
        with pytest.raises(ValueError, match="is built already"):
            GaLore(built)
        with pytest.raises(ValueError, match="must not hold another `GaLore`"):
            GaLore(GaLore("adam"))
        variables, _ = _variables((6, 9))
        with pytest.raises(ValueError, match="use_ema"):
            GaLore(keras.optimizers.SGD(use_ema=True)).build(variables)

    def test_config_round_trip(self):
        optimizer = GaLore(keras.optimizers.SGD(0.1), 3, 7, 0.5, "x$")
        again = GaLore.from_config(optimizer.get_config())
        assert again.get_config() == optimizer.get_config()
