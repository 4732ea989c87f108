"""CKA against independent formulas, and activations of every kind of model."""

import itertools

import keras
import numpy as np
import pytest
from matplotlib.figure import Figure

import keras_randadapt as kra
from tests import zoo

pytestmark = pytest.mark.one_backend("torch")


def _feature_space_cka(x, y):
    """Kornblith et al., equation 4's form in feature space, features centred:
    ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F)."""
    x, y = (np.reshape(a, (len(a), -1)).astype("float64") for a in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    cross = np.linalg.norm(y.T @ x) ** 2
    return cross / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))


def _u_statistic(k, other):
    """Song et al., equation 4: HSIC as an average over quadruples."""
    total, n = 0.0, len(k)
    for i, j, q, r in itertools.permutations(range(n), 4):
        total += k[i, j] * (other[i, j] + other[q, r] - 2 * other[i, q])
    return total / (n * (n - 1) * (n - 2) * (n - 3))


def _debiased_cka(x, y):
    k, other = x @ x.T, y @ y.T
    scale = np.sqrt(_u_statistic(k, k) * _u_statistic(other, other))
    return _u_statistic(k, other) / scale


def _rotation(n):
    return np.linalg.qr(zoo.normal(n, n, seed=3))[0]


class TestLinearCKA:
    def test_biased_against_feature_space(self):
        x, y = zoo.normal(20, 3, 4), zoo.normal(20, 7)
        y[:, 0] += x[:, 0, 0]
        got = kra.analysis.linear_cka(x, y, debiased=False)
        np.testing.assert_allclose(got, _feature_space_cka(x, y), rtol=1e-10)

    def test_debiased_against_quadruples(self):
        x, y = zoo.normal(7, 3) + 1, zoo.normal(7, 4) - 2
        y[:, 0] += 3 * x[:, 0]
        got = kra.analysis.linear_cka(x, y)
        expected = _debiased_cka(x.astype("float64"), y.astype("float64"))
        np.testing.assert_allclose(got, expected, rtol=1e-8)

    @pytest.mark.parametrize("debiased", [True, False])
    def test_of_the_same_features_is_one(self, debiased):
        x = zoo.normal(30, 6)
        for y in (x, x @ _rotation(6), -5 * x, x + 3):
            got = kra.analysis.linear_cka(x, y, debiased=debiased)
            np.testing.assert_allclose(got, 1, rtol=1e-5)
        # A scale of one feature is no rotation.
        other = x * np.array([9, 1, 1, 1, 1, 1])
        assert kra.analysis.linear_cka(x, other, debiased=debiased) < 0.9

    def test_of_noise_is_zero_without_bias(self):
        x, y = zoo.normal(60, 300), zoo.normal(60, 301)
        assert abs(kra.analysis.linear_cka(x, y)) < 0.05
        assert kra.analysis.linear_cka(x, y, debiased=False) > 0.7

    @pytest.mark.parametrize("debiased", [True, False])
    @pytest.mark.parametrize("n", [4, 8, 12])
    @pytest.mark.parametrize("constant", [1.0, 0.1, 3.3])
    def test_of_constants_is_nan(self, constant, n, debiased):
        """Whose mean need not be equal to them."""
        constants = np.full((n, 2), constant)
        for other in (zoo.normal(n, 3), constants * 0.7):
            value = kra.analysis.linear_cka(other, constants, debiased=debiased)
            assert np.isnan(value)

    def test_errors(self):
        x = zoo.normal(8, 3)
        with pytest.raises(ValueError, match="same examples"):
            kra.analysis.linear_cka(x, x[:5])
        with pytest.raises(ValueError, match="at least 4 examples"):
            kra.analysis.linear_cka(x[:3], x[:3])


def _model(seed=0, units=5):
    inputs = keras.Input((6,))
    x = keras.layers.Dense(8, activation="tanh", name="first")(inputs)
    y = keras.layers.Dense(units, name="second")(x)
    return zoo.set_weights(keras.Model(inputs, y), seed)


def _activations(model, x):
    """By NumPy, from the weights."""
    a, b, c, d = (keras.ops.convert_to_numpy(w) for w in model.weights)
    first = np.tanh(x @ a + b)
    return first, first @ c + d


class TestCKA:
    @pytest.mark.parametrize("estimator", ["debiased", "biased"])
    def test_two_models(self, estimator):
        a, b = _model(0), _model(1, units=3)
        x = zoo.normal(21, 6)
        similarity = kra.analysis.cka(a, b, x, estimator=estimator)
        assert similarity.layers_a == ["layers/dense", "layers/dense_1"]
        for i, left in enumerate(_activations(a, x)):
            for j, right in enumerate(_activations(b, x)):
                expected = kra.analysis.linear_cka(
                    left, right, debiased=estimator == "debiased"
                )
                np.testing.assert_allclose(
                    similarity.values[i, j], expected, rtol=1e-4, atol=1e-6
                )

    def test_batches_change_nothing(self):
        a, b, x = _model(0), _model(1), zoo.normal(21, 6)
        whole = kra.analysis.cka(a, b, x, batch_size=21).values
        parts = kra.analysis.cka(a, b, x, batch_size=4).values
        np.testing.assert_allclose(parts, whole, rtol=1e-5)

    def test_minibatch(self):
        # Nguyen et al.: averages of the unbiased HSIC over batches of 8; the
        # last three examples are too few for one.
        a, b, x = _model(0), _model(1), zoo.normal(27, 6)
        similarity = kra.analysis.cka(
            a, b, x, layers="second", estimator="minibatch", batch_size=8
        )
        sums = np.zeros(3)
        for start in (0, 8, 16):
            grams = []
            for model in (a, b):
                out = _activations(model, x[start : start + 8])[1]
                grams.append(out.astype("float64") @ out.T)
            k, other = grams
            sums += [
                _u_statistic(k, other),
                _u_statistic(k, k),
                _u_statistic(other, other),
            ]
        expected = sums[0] / np.sqrt(sums[1] * sums[2])
        np.testing.assert_allclose(similarity.values, [[expected]], rtol=1e-4)

    def test_itself(self):
        model, x = _model(), zoo.normal(12, 6)
        values = kra.analysis.cka(model, model, x).values
        np.testing.assert_allclose(np.diag(values), 1, rtol=1e-6)
        np.testing.assert_allclose(values, values.T, rtol=1e-6)

    def test_named_layers(self):
        a, b, x = _model(0), _model(1), zoo.normal(12, 6)
        similarity = kra.analysis.cka(a, b, x, "first", ["first", "second"])
        assert similarity.values.shape == (1, 2)
        full = kra.analysis.cka(a, b, x).values
        np.testing.assert_allclose(similarity.values, full[:1], rtol=1e-6)
        columns = similarity.table().columns
        assert columns == ["layer", "layers/dense", "layers/dense_1"]
        assert "dense_1" in repr(similarity)

    def test_adapted_against_base(self):
        model, x = _model(), zoo.normal(12, 6)
        kra.inject(model, kra.LoRA(2), "second")
        same = kra.analysis.cka(model, None, x).values
        np.testing.assert_allclose(np.diag(same), 1, rtol=1e-6)
        zoo.randomize(model, scale=2.0)
        out = keras.ops.convert_to_numpy(model(x))
        with kra.disabled(model):
            base = keras.ops.convert_to_numpy(model(x))
        similarity = kra.analysis.cka(model, None, x)
        np.testing.assert_allclose(similarity.values[0, 0], 1, rtol=1e-6)
        np.testing.assert_allclose(
            similarity.values[1, 1],
            kra.analysis.linear_cka(out, base),
            rtol=1e-4,
        )
        assert similarity.values[1, 1] < 0.9
        # The adapter computes again.
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(model(x)), out)

    @pytest.mark.parametrize(
        "builder",
        [
            zoo.sequential,
            zoo.functional,
            zoo.subclassed,
            zoo.pretrained_classifier,
            zoo.clip,
            zoo.einsum_int8,
        ],
        ids=lambda builder: builder.__name__,
    )
    def test_every_kind_of_model(self, builder):
        model, x, targets = builder()
        kra.inject(model, kra.LoRA(2), targets)
        traces = {id(a): set(vars(a)) for a in model._flatten_layers()}
        out = zoo.outputs(model, x)
        similarity = kra.analysis.cka(model, None, x)
        assert len(similarity.layers_a) >= 1
        diagonal = np.diag(similarity.values)
        varying = ~np.isnan(diagonal)
        assert varying.any()
        np.testing.assert_allclose(diagonal[varying], 1, rtol=1e-5)
        for layer in model._flatten_layers():
            assert set(vars(layer)) == traces[id(layer)]
        np.testing.assert_array_equal(zoo.outputs(model, x), out)

    def test_a_layer_called_twice(self):
        model, x, _ = zoo.functional()
        similarity = kra.analysis.cka(model, model, x, "shared")
        (address,) = [a for a in similarity.layers_a if "[" not in a]
        assert similarity.layers_a == [address, f"{address}[1]"]
        assert 0 < similarity.values[0, 1] < 0.99

    @pytest.mark.every_backend
    def test_rematerialized(self):
        """JAX recomputes them in a compiled part, which can't be read."""
        with keras.RematScope(mode="full"):
            model, x = _model(), zoo.normal(8, 6)
        if keras.config.backend() == "jax":
            with pytest.raises(ValueError, match="such as a rematerialized"):
                kra.analysis.cka(model, model, x)
        else:
            values = kra.analysis.cka(model, model, x).values
            np.testing.assert_allclose(np.diag(values), 1, rtol=1e-6)
        assert "call" not in vars(model.get_layer("first"))

    def test_reduce(self):
        model, x, _ = zoo.functional()
        similarity = kra.analysis.cka(
            model, model, x, reduce=lambda hidden: hidden[:, 0]
        )
        whole = kra.analysis.cka(model, model, x)
        assert np.abs(similarity.values - whole.values).max() > 1e-3
        np.testing.assert_allclose(np.diag(similarity.values), 1, rtol=1e-5)

    def test_plot(self):
        a, b, x = _model(0), _model(1), zoo.normal(12, 6)
        similarity = kra.analysis.cka(a, b, x)
        axis = Figure().subplots()
        assert similarity.plot(axis) is axis
        np.testing.assert_array_equal(
            axis.images[0].get_array(), similarity.values
        )
        labels = [label.get_text() for label in axis.get_yticklabels()]
        assert labels == ["dense", "dense_1"]


class Unused(keras.Model):
    def __init__(self):
        super().__init__()
        self.used = keras.layers.Dense(4, name="used")
        self.other = keras.layers.Dense(4, name="other")
        self.pair = Pair(name="pair")

    def build(self, shape):
        for layer in (self.used, self.other):
            layer.build(shape)
        self.pair.build(shape)

    def call(self, x):
        return self.pair(self.used(x))[0]


class Pair(keras.layers.Layer):
    def call(self, x):
        return x, 2 * x


class TestErrors:
    def _unused(self):
        model = Unused()
        model.build((None, 6))
        return model, zoo.normal(8, 6)

    def test_layers(self):
        model, x = self._unused()
        with pytest.raises(ValueError, match="is not called when"):
            kra.analysis.cka(model, model, x, ["used", "other"])
        with pytest.raises(ValueError, match="`layers` matches no layer"):
            kra.analysis.cka(model, model, x, "usd")
        with pytest.raises(ValueError, match="`layers_b` matches no layer"):
            kra.analysis.cka(model, model, x, "used", "usd")
        with pytest.raises(ValueError, match="pair' gives 2 tensors"):
            kra.analysis.cka(model, model, x, "pair")
        # What was not asked for and not called is left out.
        assert kra.analysis.cka(model, model, x).layers_a == ["layers/dense"]
        assert "call" not in vars(model.used)

    def test_hooks_are_removed_after_an_error(self):
        model, _ = self._unused()
        with pytest.raises(Exception):
            kra.analysis.cka(model, model, zoo.normal(8, 5))
        assert "call" not in vars(model.used)
        assert model.used(zoo.normal(8, 6)).shape == (8, 4)

    def test_arguments(self):
        model, x = _model(), zoo.normal(8, 6)
        cka = kra.analysis.cka
        with pytest.raises(TypeError, match="`model` must be a"):
            cka(model, "model", x)
        with pytest.raises(ValueError, match="has no adapter attached"):
            cka(model, None, x)
        with pytest.raises(ValueError, match="`estimator` must be one of"):
            cka(model, model, x, estimator="hsic")
        with pytest.raises(ValueError, match="at least 4 examples"):
            cka(model, model, x[:3])
        with pytest.raises(TypeError, match="`x` must be an array"):
            cka(model, model, iter([x]))
        with pytest.raises(ValueError, match="equally many examples"):
            cka(model, model, [x, x[:5]])
        with pytest.raises(TypeError, match="`batch_size` must be an integer"):
            cka(model, model, x, batch_size=2.5)
        with pytest.raises(ValueError, match="`batch_size` must be at least 4"):
            cka(model, model, x, batch_size=3, estimator="minibatch")
        with pytest.raises(ValueError, match="one row an example"):
            cka(model, model, x, reduce=lambda hidden: hidden[:2])
        with pytest.raises(ValueError, match="is not built"):
            cka(keras.Sequential([keras.layers.Dense(2)]), model, x)
        kra.inject(model, kra.LoRA(2), "second")
        with kra.merged(model):
            with pytest.raises(ValueError, match="inside a `merged` block"):
                cka(model, None, x)
