"""AdaLoRA's scores and budgets against hand-computed ones."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_randadapt as kra
from keras_randadapt.callbacks import rank_budget
from keras_randadapt.optimizers import RankAllocation
from tests import methods
from tests import zoo
from tests.methods import site_of

pytestmark = pytest.mark.one_backend("torch")


def _adapters(count=2, rank=3):
    """Variables `A, B, gate` of bare adapters, and gradients."""
    variables = []
    for i in range(count):
        with keras.name_scope("adapter", override_parent=f"site{i}"):
            adapter = kra.AdaLoRA(rank, name="default", seed=i)
            adapter.build_at(site_of((7, 5)))
        adapter.gate.assign(zoo.normal(rank, seed=i))
        variables += [adapter.lora_a, adapter.lora_b, adapter.gate]
    gradients = [
        zoo.normal(*v.shape, seed=10 + i) for i, v in enumerate(variables)
    ]
    return variables, gradients


def _apply(optimizer, gradients, variables):
    optimizer.apply([ops.convert_to_tensor(g) for g in gradients], variables)
    return [methods.numpy(v) for v in variables]


def reference_scores(history):
    """Equations 5 to 10 over `(values, gradients)` of steps, in order."""
    smooth = spread = 0.0
    for values, gradients in history:
        now = [np.abs(v * g) for v, g in zip(values, gradients)]
        if smooth == 0.0:
            smooth = [0.0] * len(now)
            spread = [0.0] * len(now)
        smooth = [0.85 * s + 0.15 * n for s, n in zip(smooth, now)]
        spread = [
            0.85 * u + 0.15 * np.abs(n - s)
            for u, n, s in zip(spread, now, smooth)
        ]
    score = [s * u for s, u in zip(smooth, spread)]
    return np.concatenate(
        [
            score[i + 2] + score[i].mean(0) + score[i + 1].mean(1)
            for i in range(0, len(score), 3)
        ]
    )


class TestScores:
    def test_the_first_step(self):
        """0.15 I smoothed, 0.15 * 0.85 I off: 0.019125 I^2."""
        variables, gradients = _adapters()
        optimizer = RankAllocation(keras.optimizers.SGD(0.1))
        values = [methods.numpy(v) for v in variables]
        _apply(optimizer, gradients, variables)
        squares = [(v * g) ** 2 for v, g in zip(values, gradients)]
        expected = np.concatenate(
            [
                squares[i + 2] + squares[i].mean(0) + squares[i + 1].mean(1)
                for i in (0, 3)
            ]
        )
        methods.close(optimizer.scores(), 0.019125 * expected)

    @pytest.mark.every_backend
    def test_several_steps(self):
        """Weights from before each update, with its own gradients."""
        variables, gradients = _adapters()
        optimizer = RankAllocation(keras.optimizers.SGD(0.1))
        history = []
        for step in range(4):
            given = [(1 + step) * g for g in gradients]
            history.append(([methods.numpy(v) for v in variables], given))
            _apply(optimizer, given, variables)
        methods.close(optimizer.scores(), reference_scores(history))

    @pytest.mark.every_backend
    def test_singular_value_magnitude(self):
        """`|lambda|` from before the update, and the largest stay open."""
        variables, gradients = _adapters()
        optimizer = RankAllocation(keras.optimizers.SGD(0.1), score="magnitude")
        optimizer.build(variables)
        optimizer.set_schedule(lambda t: {1: 6, 2: 4}.get(t, 3), 2, 3, 1)
        scores = None
        for update in range(1, 6):
            before = np.concatenate(
                [methods.numpy(variables[i]) for i in (2, 5)]
            )
            if update < 3:
                scores = np.abs(before)
            after = _apply(optimizer, gradients, variables)
            methods.close(optimizer.scores(), scores)
            gates = np.concatenate([after[2], after[5]])
            count = {1: 6, 2: 4}.get(update, 3)
            kept = sorted(np.argsort(-scores, kind="stable")[:count].tolist())
            assert np.flatnonzero(gates).tolist() == kept
        # It needs a number for each gate, and sensitivities two for each
        # weight.
        own = [v for v in optimizer.variables if "magnitude" in v.path]
        assert [tuple(v.shape) for v in own] == [(3,), (3,)]

    def test_without_a_schedule_nothing_is_pruned(self):
        variables, gradients = _adapters()
        optimizer = RankAllocation(keras.optimizers.SGD(0.1))
        plain, _ = _adapters()
        inner = keras.optimizers.SGD(0.1)
        for _ in range(3):
            after = _apply(optimizer, gradients, variables)
            expected = _apply(inner, gradients, plain)
        for one, two in zip(after, expected):
            np.testing.assert_array_equal(one, two)


class TestPruning:
    def test_exactly_the_budget_survives(self):
        variables, gradients = _adapters()
        optimizer = RankAllocation(keras.optimizers.SGD(0.01))
        optimizer.build(variables)
        budgets = {1: 6, 2: 5, 3: 5, 4: 3, 5: 2, 6: 2}
        optimizer.set_schedule(lambda t: budgets[min(t, 6)], 2, 5, 2)
        history = []
        for update in range(1, 7):
            if update < 5:
                history.append(
                    ([methods.numpy(v) for v in variables], gradients)
                )
            after = _apply(optimizer, gradients, variables)
            gates = np.concatenate([after[2], after[5]])
            # Every second update from the second on, and all from the fifth.
            if update in (2, 4, 5, 6):
                best = np.argsort(-reference_scores(history), kind="stable")
                kept = sorted(best[: budgets[update]].tolist())
                assert np.flatnonzero(gates).tolist() == kept
            elif update == 1:
                assert gates.all()
            else:
                # Pruned gates have a gradient, and come back.
                assert gates.all()
            assert (
                int(methods.numpy(optimizer.budget(update)))
                == (budgets[update])
            )

    @pytest.mark.every_backend
    def test_ties_go_to_the_first(self):
        """Zero gates and gradients: all scores are 0."""
        variables, gradients = _adapters()
        optimizer = RankAllocation(keras.optimizers.SGD(1.0))
        optimizer.build(variables)
        optimizer.set_schedule(lambda t: 4, 1, 1, 1)
        for v in variables:
            v.assign(np.zeros(v.shape))
        after = _apply(optimizer, gradients, variables)
        gates = np.concatenate([after[2], after[5]])
        assert np.flatnonzero(gates).tolist() == [0, 1, 2, 3]

    @pytest.mark.parametrize("budget", [0, 6])
    def test_extreme_budgets(self, budget):
        variables, gradients = _adapters()
        optimizer = RankAllocation(keras.optimizers.SGD(0.1))
        optimizer.build(variables)
        optimizer.set_schedule(lambda t: budget, 1, 1, 1)
        after = _apply(optimizer, gradients, variables)
        gates = np.concatenate([after[2], after[5]])
        assert np.count_nonzero(gates) == budget

    def test_gradient_accumulation(self):
        variables, gradients = _adapters()
        optimizer = RankAllocation(
            keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
        )
        optimizer.build(variables)
        optimizer.set_schedule(lambda t: 2, 1, 1, 1)
        before = [methods.numpy(v) for v in variables]
        between = _apply(optimizer, gradients, variables)
        np.testing.assert_array_equal(between[2], before[2])
        after = _apply(optimizer, gradients, variables)
        gates = np.concatenate([after[2], after[5]])
        assert np.count_nonzero(gates) == 2

    def test_bad_arguments(self):
        variables, _ = _adapters()
        with pytest.raises(ValueError, match="`beta1` must be below 1"):
            RankAllocation("adam", beta1=1.0)
        with pytest.raises(ValueError, match="must be a regular expression"):
            RankAllocation("adam", paths="(")
        with pytest.raises(ValueError, match="found no adapter"):
            RankAllocation("adam").build(variables[:2])
        with pytest.raises(ValueError, match="use_ema"):
            RankAllocation(keras.optimizers.SGD(use_ema=True)).build(variables)


class TestBudget:
    def test_against_a_table_made_by_hand(self):
        """24 ranks to 8 in 12 updates: 2 of warm-up, 2 at the end.

        (1 - k / 8)^3 of 16, cut down: 10.7, 6.8, 3.9, 2, 0.8, 0.25, 0.03.
        """
        expected = [24, 24, 18, 14, 11, 10, 8, 8, 8, 8, 8, 8]
        got = [rank_budget.budget(t, 24, 8, 2, 2, 12) for t in range(1, 13)]
        assert got == expected
        variables, _ = _adapters(count=8)
        optimizer = RankAllocation("sgd")
        optimizer.build(variables)
        optimizer.set_schedule(
            lambda t: rank_budget.budget(t, 24, 8, 2, 2, 12), 3, 11, 1
        )
        got = [int(methods.numpy(optimizer.budget(t))) for t in range(1, 13)]
        assert got == expected
