"""The PAC-Bayes bound and its Gaussians against dense float64 algebra."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_randadapt as kra
from tests import zoo

# It differentiates single examples, which TensorFlow compiles slowly.
pytestmark = pytest.mark.one_backend("torch")

N = 14


def _network(adapter=None):
    """A linear network with an update at each of two sites, and squared loss.

    It has one output, so that the gradients can be written down.
    """
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(3, use_bias=False, name="first")(inputs)
    outputs = keras.layers.Dense(1, use_bias=False, name="second")(hidden)
    model = zoo.set_weights(keras.Model(inputs, outputs))
    adapter = kra.RLoRA(3) if adapter is None else adapter
    kra.inject(model, adapter, ["first", "second"])
    model.compile("sgd", "mse")
    for i, variable in enumerate(model.trainable_variables):
        variable.assign(0.3 * zoo.normal(*variable.shape, seed=i))
    return model, zoo.normal(N, 4, seed=1), zoo.normal(N, 1, seed=2)


def _values(model):
    return [
        ops.convert_to_numpy(v).astype("float64")
        for v in model.trainable_variables
    ]


def _flat(values):
    return np.concatenate([np.ravel(v) for v in values])


def _gradients(model, x, y):
    """Central differences of each example's loss, `(N, weights)`."""
    (first, second) = (
        ops.convert_to_numpy(layer._kernel).astype("float64")
        for layer in kra.sites(model).values()
    )
    bases = []
    for layer in kra.sites(model).values():
        adapter = layer.adapter.get("default")
        bases.append((adapter.basis_a.dense(), adapter.basis_b.dense()))

    def losses(w):
        parts, start = [], 0
        for a, b in bases:
            alpha = w[start : start + len(a)]
            beta = w[start + len(a) : start + len(a) + len(b)]
            start += len(a) + len(b)
            parts.append(a.T @ np.diag(alpha) @ b.T @ np.diag(beta))
        out = x @ (first + parts[0]) @ (second + parts[1])
        return ((out - y) ** 2)[:, 0]

    w = _flat(_values(model))
    step = 1e-5
    columns = [
        (losses(w + step * e) - losses(w - step * e)) / (2 * step)
        for e in np.eye(len(w))
    ]
    return np.stack(columns, axis=1)


def _divergence(mean, covariance, prior_mean, prior_covariance):
    """The Kullback-Leibler divergence of two Gaussians, from the textbook."""
    solved = np.linalg.solve(prior_covariance, covariance)
    d = mean - prior_mean
    logs = [np.linalg.slogdet(c)[1] for c in (prior_covariance, covariance)]
    quadratic = d @ np.linalg.solve(prior_covariance, d)
    return 0.5 * (logs[0] - logs[1] + np.trace(solved) - len(d) + quadratic)


class TestFisher:
    @pytest.mark.every_backend
    def test_equations_12_17_and_18(self):
        model, x, y = _network()
        g = _gradients(model, x, y)
        w = _flat(_values(model))
        fisher = sum(np.outer(row, row) for row in g) / N
        bound = kra.analysis.pac_bayes_bound(
            model, x, y, damping=0.2, posterior_scale=0.7, chunk_size=5
        )
        sigma = np.linalg.inv(N * (fisher + 0.2 * np.eye(len(w))))
        right = _divergence(w, 0.7 * sigma, np.zeros_like(w), sigma)
        np.testing.assert_allclose(bound.divergence, right, rtol=2e-4)
        information = sum((row @ w) ** 2 for row in g)
        np.testing.assert_allclose(bound.information, information, rtol=2e-4)
        gap = np.sqrt(right / (2 * N))
        np.testing.assert_allclose(bound.gap, gap, rtol=2e-4)
        assert abs(bound.quadratic - information) > 0.05 * information

    def test_without_damping_it_is_half_of_equation_18(self):
        model, x, y = _network()
        start = [0.1 * value for value in _values(model)]
        bound = kra.analysis.pac_bayes_bound(model, x, y, reference=start)
        d = 0.9 * _flat(_values(model))
        information = np.sum((_gradients(model, x, y) @ d) ** 2)
        np.testing.assert_allclose(bound.information, information, rtol=2e-4)
        assert bound.divergence == bound.information / 2
        sites = bound["information"]
        first = slice(0, bound["weights"][0])
        own = np.sum((_gradients(model, x, y)[:, first] @ d[first]) ** 2)
        np.testing.assert_allclose(sites[0], own, rtol=2e-4)
        np.testing.assert_allclose(
            bound["distance"][0], np.linalg.norm(d[first]), rtol=1e-5
        )

    def test_part_of_the_training_set(self):
        model, x, y = _network()
        whole = kra.analysis.pac_bayes_bound(model, x, y, damping=0.1)
        twice = kra.analysis.pac_bayes_bound(
            model, x, y, damping=0.1, examples=2 * N
        )
        np.testing.assert_allclose(twice.divergence, 2 * whole.divergence)
        # The prior is narrower, by as much as `gap` divides by.
        np.testing.assert_allclose(twice.gap, whole.gap)

    def test_variances_are_conditional(self):
        model, x, y = _network()
        bound = kra.analysis.pac_bayes_bound(
            model, x, y, damping=0.2, posterior_scale=0.5
        )
        g = _gradients(model, x, y)
        precision = g.T @ g + N * 0.2 * np.eye(g.shape[1])
        found = np.concatenate(list(bound.variances.values()))
        right = 0.5 / np.diag(precision)
        np.testing.assert_allclose(found, right, rtol=2e-4)

    def test_data_sets_and_adapter_files(self, tmp_path):
        model, x, y = _network()
        start = _values(model)
        path = tmp_path / "start.safetensors"
        kra.save_adapter(model, path)
        for variable in model.trainable_variables:
            variable.assign(2 * ops.convert_to_numpy(variable))

        class Batches(keras.utils.PyDataset):
            def __len__(self):
                return 2

            def __getitem__(self, i):
                return x[7 * i : 7 * i + 7], y[7 * i : 7 * i + 7]

        by_file = kra.analysis.pac_bayes_bound(model, Batches(), reference=path)
        by_list = kra.analysis.pac_bayes_bound(model, x, y, reference=start)
        assert by_file.examples == N
        np.testing.assert_allclose(by_file.divergence, by_list.divergence, 1e-5)


class TestBootstrap:
    def test_equations_15_and_16(self, monkeypatch):
        model, x, y = _network()
        drawn = np.random.default_rng(3).poisson(1.0, (N, 6))

        class Draws:
            def poisson(self, mean, shape):
                assert mean == 1.0 and shape == drawn.shape
                return drawn

        monkeypatch.setattr(np.random, "Generator", lambda bits: Draws())
        bound = kra.analysis.pac_bayes_bound(
            model, x, y, prior="bootstrap", damping=0.3, resamples=6
        )
        g = _gradients(model, x, y)
        w = _flat(_values(model))
        inverse = np.linalg.inv(g.T @ g / N + 0.3 * np.eye(len(w)))
        sigma = 0.3 / N * inverse @ inverse
        for i in range(6):
            moved = sum((drawn[t, i] - 1) * g[t] for t in range(N)) / N
            moved = -inverse @ moved
            sigma = sigma + np.outer(moved, moved) / 6
        right = _divergence(w, sigma, np.zeros_like(w), sigma)
        np.testing.assert_allclose(bound.divergence, right, rtol=1e-3)

    def test_tends_to_equation_17(self):
        model, x, y = _network()
        fisher = kra.analysis.pac_bayes_bound(model, x, y, damping=0.5)
        errors = []
        for resamples in (20, 8000):
            bound = kra.analysis.pac_bayes_bound(
                model,
                x,
                y,
                prior="bootstrap",
                damping=0.5,
                resamples=resamples,
            )
            errors.append(abs(bound.divergence / fisher.divergence - 1))
        assert errors[1] < 0.02 < errors[0]

    def test_default_damping(self):
        model, x, y = _network()
        bound = kra.analysis.pac_bayes_bound(model, x, y, prior="bootstrap")
        diagonal = np.mean(_gradients(model, x, y) ** 2)
        np.testing.assert_allclose(bound.damping, 0.01 * diagonal, rtol=1e-3)
        assert np.isfinite(bound.divergence)


class TestErrors:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"prior": "bootstrap", "damping": 0}, "`damping` must be above"),
            ({"prior": "oracle"}, "`prior` must be one of"),
            ({"posterior_scale": 0}, "`posterior_scale` must be above"),
            ({"damping": -1}, "`damping` must be at least 0"),
            ({"reference": [np.zeros(2)]}, "`reference` must hold a value"),
        ],
    )
    def test_arguments(self, arguments, message):
        model, x, y = _network()
        with pytest.raises(ValueError, match=message):
            kra.analysis.pac_bayes_bound(model, x, y, **arguments)

    def test_types_data_and_models(self):
        model, x, y = _network()
        with pytest.raises(TypeError, match='`reference` must be "zero", l'):
            kra.analysis.pac_bayes_bound(model, x, y, reference=3)
        with pytest.raises(ValueError, match="not every example can be read"):
            kra.analysis.pac_bayes_bound(model, iter([(x, y)]))
        with pytest.raises(ValueError, match="is not finite"):
            kra.analysis.pac_bayes_bound(model, x * np.nan, y)
        kra.set_active(model, [])
        with pytest.raises(ValueError, match="no active adapter"):
            kra.analysis.pac_bayes_bound(model, x, y)
        plain = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        with pytest.raises(ValueError):
            kra.analysis.pac_bayes_bound(plain, x, y)


class TestUpdatePosterior:
    @pytest.mark.parametrize("method", ["rlora", "vera"])
    def test_moments(self, method):
        adapter = {"rlora": kra.RLoRA(3, scaling=0.8), "vera": kra.VeRA(3)}
        model, _, _ = _network(adapter[method])
        address = next(iter(kra.sites(model)))
        sites = dict.fromkeys(kra.sites(model), 0.1)
        variance = np.array([0.5, 0.1, 0.02])
        found = kra.analysis.update_posterior(
            model, {**sites, address: variance}
        )[address]
        adapter = kra.sites(model)[address].adapter.get("default")
        vectors = _values(model)
        alpha, beta = vectors[0], vectors[1]
        a, b = adapter.basis_a.dense(), adapter.basis_b.dense()
        if method == "vera":
            a = a * np.sqrt(2 / 4)
            b = b * np.sqrt(2 / 3)
        else:
            beta = 0.8 * beta
        # The paper's orientation, entry by entry.
        terms = np.einsum("o,ok,ki->koi", beta, b, a)
        mean = np.einsum("k,koi->io", alpha, terms)
        np.testing.assert_allclose(found.mean, mean, atol=1e-6)
        kernel = ops.convert_to_numpy(adapter.delta_kernel())
        np.testing.assert_allclose(found.mean, kernel, atol=1e-6)
        # Equation 10.
        g = np.stack([np.ravel(term.T) for term in terms], axis=1)
        np.testing.assert_allclose(found.projection, g, atol=1e-6)
        whole = (g * variance) @ g.T
        np.testing.assert_allclose(
            found.entry_variances.ravel(), np.diag(whole), atol=1e-7
        )
        # Equation 20.
        blocks = whole.reshape(4, 3, 4, 3)
        rows = np.einsum("aobo->ab", blocks)
        columns = np.einsum("iaib->ab", blocks)
        np.testing.assert_allclose(found.row_covariance, rows, atol=1e-7)
        np.testing.assert_allclose(
            found.column_covariance, columns / np.trace(columns), atol=1e-6
        )

    def test_orthonormal_bases_give_appendix_a(self):
        """Equation 23, at `beta = 1`, up to the scale of U and V."""
        model, _, _ = _network()
        address, layer = next(iter(kra.sites(model).items()))
        adapter = layer.adapter.get("default")
        adapter.beta.assign(np.ones(3, "float32"))
        variance = np.array([0.5, 0.1, 0.02])
        found = kra.analysis.update_posterior(
            model, {**dict.fromkeys(kra.sites(model), 0.1), address: variance}
        )[address]
        a, b = adapter.basis_a.dense(), adapter.basis_b.dense()
        u = a.T @ np.diag(variance) @ a
        v = b @ np.diag(variance) @ b.T / np.sum(variance)
        np.testing.assert_allclose(found.row_covariance, u, atol=1e-6)
        np.testing.assert_allclose(found.column_covariance, v, atol=1e-6)

    def test_samples_have_these_moments(self):
        model, _, _ = _network()
        address = next(iter(kra.sites(model)))
        posterior = kra.analysis.update_posterior(model, 0.3)[address]
        drawn = posterior.sample(20000, seed=4)
        np.testing.assert_allclose(
            drawn.mean(axis=0), posterior.mean, atol=0.02
        )
        np.testing.assert_allclose(
            drawn.var(axis=0), posterior.entry_variances, rtol=0.1, atol=1e-4
        )
        assert np.array_equal(drawn, posterior.sample(20000, seed=4))

    def test_variances_of_a_bound(self):
        model, x, y = _network()
        bound = kra.analysis.pac_bayes_bound(model, x, y, damping=0.1)
        for address, one in kra.analysis.update_posterior(model, bound).items():
            rank = len(one.variance)
            # Alpha is the first of a site's weights.
            np.testing.assert_array_equal(
                one.variance, bound.variances[address][:rank]
            )

    def test_errors(self):
        model, _, _ = _network()
        posterior = kra.analysis.update_posterior
        with pytest.raises(ValueError, match="must have the sites"):
            posterior(model, {"layers/dense": 0.1})
        with pytest.raises(ValueError, match="finite and at least 0"):
            posterior(model, -1.0)
        with pytest.raises(ValueError, match="or have shape"):
            posterior(model, dict.fromkeys(kra.sites(model), np.ones(7)))
        model, _, _ = _network(kra.LoRA(1))
        with pytest.raises(TypeError, match="for `RLoRA` and `VeRA`"):
            posterior(model, 0.1)
