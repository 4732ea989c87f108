"""The error bounds of the RandLoRA and RM-LoRA papers, in float64."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt.sites.site import Site

pytestmark = pytest.mark.one_backend


def _normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


class TestRandLoRA:
    @pytest.mark.parametrize("shape", [(12, 8), (8, 12), (9, 7)])
    def test_theorem_4_1_and_equation_8(self, shape):
        """The paper's sums, with the fitted vectors put in."""
        target = _normal(*shape)
        template = kra.RandLoRA(3, seed=5)
        errors = kra.analysis.randlora_errors(target, template, sweeps=200)
        built = kra.RandLoRA(3, seed=5)
        built.build_at(
            Site(input_dim=shape[0], output_dim=shape[1], address="x")
        )
        a, b = built.basis_a.dense(), built.basis_b.dense()
        w = target if shape[0] > shape[1] else target.T
        u, s, vt = np.linalg.svd(w, full_matrices=False)
        total = np.zeros_like(w)
        count = -(-len(s) // 3)
        assert len(errors) == count

        def term(j, lam, gamma):
            return b[:, 3 * j : 3 * j + 3] @ np.diag(lam) @ a @ np.diag(gamma)

        for j in range(count):
            segment = sum(
                s[i] * np.outer(u[:, i], vt[i])
                for i in range(3 * j, min(3 * j + 3, len(s)))
            )
            lam, gamma = errors.lambdas[j], errors.gammas[j]
            fitted = term(j, lam, gamma)
            total += fitted
            error = np.linalg.norm(segment - fitted)
            np.testing.assert_allclose(errors["error"][j], error, rtol=1e-9)
            np.testing.assert_allclose(
                errors["norm"][j], np.linalg.norm(segment), rtol=1e-9
            )
            # It is a minimum: no other vectors nearby are better.
            for seed in range(10):
                step = 1e-2
                near = term(
                    j,
                    lam * (1 + step * _normal(3, seed=seed)),
                    gamma * (1 + step * _normal(len(gamma), seed=seed)),
                )
                assert np.linalg.norm(segment - near) > error * (1 - 1e-6)
        np.testing.assert_allclose(
            errors.error, np.linalg.norm(w - total), rtol=1e-9
        )
        assert errors.epsilon == max(errors["error"])
        assert errors.error <= errors.bound == count * errors.epsilon
        best = (u[:, :3] * s[:3]) @ vt[:3]
        np.testing.assert_allclose(
            errors.lora_error(), np.linalg.norm(w - best), rtol=1e-9
        )
        np.testing.assert_allclose(
            errors.lora_error(5) ** 2, np.sum(s[5:] ** 2), rtol=1e-9
        )

    def test_reaches_what_it_can_express(self):
        template = kra.RandLoRA(6, seed=2)
        known = kra.RandLoRA(6, seed=2)
        known.build_at(Site(input_dim=6, output_dim=9, address="x"))
        assert known.terms == 1
        known.randlora_lambda.assign(_normal(1, 6).astype("float32"))
        known.randlora_gamma.assign(_normal(1, 6, seed=1).astype("float32"))
        target = keras.ops.convert_to_numpy(known.delta_kernel())
        errors = kra.analysis.randlora_errors(target, template, sweeps=2000)
        assert errors.error < 1e-3 * errors.norm
        assert "bound" in repr(errors)

    @pytest.mark.parametrize(
        "target, adapter, options, error, message",
        [
            (np.ones((4, 3)), kra.LoRA(2), {}, TypeError, "a `RandLoRA`"),
            (np.ones(4), kra.RandLoRA(2), {}, ValueError, "must be a matrix"),
            (
                np.full((4, 3), np.nan),
                kra.RandLoRA(2),
                {},
                ValueError,
                "finite numbers",
            ),
            (
                np.ones((4, 3)),
                kra.RandLoRA(2, variant="half"),
                {},
                ValueError,
                "variant='full'",
            ),
            (
                np.ones((4, 3)),
                kra.RandLoRA(2),
                {"sweeps": 0},
                ValueError,
                "`sweeps`",
            ),
        ],
    )
    def test_errors(self, target, adapter, options, error, message):
        with pytest.raises(error, match=message):
            kra.analysis.randlora_errors(target, adapter, **options)


def _relu(x):
    return np.maximum(x, 0)


class TestLoRA:
    def test_equation_8_as_printed(self):
        """Written from the paper, with `D = 5`, two layers and four."""
        target = [
            (0.5 * _normal(5, 5, seed=i), _normal(5, seed=i)) for i in (1, 2)
        ]
        frozen = [0.4 * _normal(5, 5, seed=i) for i in (3, 4, 5, 6)]
        s = _normal(5, 5, seed=7)
        moment = s @ s.T
        bound = kra.analysis.lora_error_bound(
            target,
            frozen,
            [1, 1, 2, 1],
            moment,
            partition=[[0], [1, 2, 3]],
            norm="frobenius",
        )
        w = [weight for weight, _ in target]
        discrepancies = [
            w[0] - frozen[0],
            w[1] - frozen[1] @ frozen[2] @ frozen[3],
        ]
        e1 = np.linalg.svd(discrepancies[0])[1][1]
        e2 = np.linalg.svd(discrepancies[1])[1][4]
        np.testing.assert_allclose(bound["error"], [e1, e2])
        n1, n2 = (np.linalg.norm(one) for one in w)
        b1, b2 = (np.linalg.norm(one) for _, one in target)
        m = np.sqrt(np.linalg.norm(moment))
        beta = max(m, m * n1 + b1, m * n1 * n2 + n2 * b1 + b2)
        np.testing.assert_allclose(bound.magnitude, beta)
        right = beta * (max(n1 + e1, n2 + e2) * e1 + e2)
        np.testing.assert_allclose(bound.bound, right)
        assert not bound.exact

    def test_holds_with_the_trace_alone(self):
        """The adapter of the proof, and inputs with few entries of 1."""
        width = 64
        x = (np.random.default_rng(0).random((4000, width)) < 1 / 16) * 1.0
        moment = x.T @ x / len(x)
        weight = np.eye(width) / 8
        best = np.zeros_like(weight)
        best[0, 0] = 1 / 8
        distance = np.linalg.norm(_relu(x @ best) - _relu(x @ weight), axis=1)
        target = [(weight, np.zeros(width))]
        frozen = [np.zeros((width, width))]
        found = {
            norm: kra.analysis.lora_error_bound(
                target, frozen, 1, moment, norm=norm
            ).bound
            for norm in ("frobenius", "trace")
        }
        assert 2 * found["frobenius"] < np.mean(distance) < found["trace"]

    def test_exact_where_ranks_suffice(self):
        thin = _normal(6, 2) @ _normal(2, 6)
        frozen = _normal(6, 6, seed=3)
        target = [(frozen + thin, np.zeros(6))]
        arguments = (target, [frozen])
        bound = kra.analysis.lora_error_bound(*arguments, 2, np.eye(6))
        assert bound.exact and bound.bound == 0
        bound = kra.analysis.lora_error_bound(*arguments, 1, np.eye(6))
        assert not bound.exact and bound.bound > 0

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"frozen": [np.eye(3)]}, "at least as many layers"),
            ({"frozen": [np.eye(2)] * 3}, r"`frozen\[0\]` must have the shape"),
            ({"ranks": [1, 1]}, "`ranks` must be one number or 3"),
            ({"ranks": 0}, "`ranks`"),
            ({"second_moment": np.ones(3)}, "`second_moment` must be a square"),
            ({"partition": [[1], [0, 2]]}, "`partition` must split"),
            ({"norm": "nuclear"}, "`norm` must be one of"),
            ({"frozen": [np.full((3, 3), np.inf)] * 3}, "NaN or infinity"),
            ({"target": [(np.eye(3), np.zeros(2))]}, "The bias of"),
        ],
    )
    def test_errors(self, change, message):
        arguments = {
            "target": [(np.eye(3), np.zeros(3))] * 2,
            "frozen": [np.eye(3)] * 3,
            "ranks": 1,
            "second_moment": np.eye(3),
            **change,
        }
        with pytest.raises(ValueError, match=message):
            kra.analysis.lora_error_bound(**arguments)
