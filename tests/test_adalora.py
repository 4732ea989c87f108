"""AdaLoRA by plain Keras training."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from tests import methods
from tests import zoo
from tests.methods import site_of

pytestmark = pytest.mark.one_backend


def _built(view=(7, 9), rank=4, **arguments):
    adapter = kra.AdaLoRA(rank, seed=3, **arguments)
    adapter.build_at(site_of(view))
    return adapter


def _adapted(compile=True, **arguments):
    x = zoo.normal(8, 7)
    inputs = keras.Input((7,))
    hidden = keras.layers.Dense(6, activation="tanh", name="one")(inputs)
    outputs = keras.layers.Dense(5, name="two")(hidden)
    model = zoo.set_weights(keras.Model(inputs, outputs))
    kra.inject(model, kra.AdaLoRA(4, **arguments), ["one", "two"])
    if compile:
        model.compile(keras.optimizers.Adam(0.02), "mse")
    return model, x, zoo.normal(8, 5, seed=1)


def _gates(model):
    return np.concatenate(
        [
            methods.numpy(adapter.gate)
            for adapter in model._randadapt.adapters("default").values()
        ]
    )


class TestAdaLoRA:
    @pytest.mark.every_backend
    def test_against_dense_reference(self):
        adapter = _built(alpha=6)
        values = methods.randomize(adapter)
        gated = values["lora_a"] @ np.diag(values["gate"])
        methods.check_products(adapter, 1.5 * gated @ values["lora_b"])

    def test_rank_is_the_number_of_open_gates(self):
        adapter = _built()
        gate = methods.randomize(adapter)["gate"]
        gate[[1, 2]] = 0
        adapter.gate.assign(gate)
        delta = methods.numpy(adapter.delta_kernel())
        assert np.linalg.matrix_rank(delta) == 2

    def test_first_values(self):
        adapter = _built((70, 90))
        assert not methods.numpy(adapter.gate).any()
        for factor in (adapter.lora_a, adapter.lora_b):
            assert 0.015 < methods.numpy(factor).std() < 0.025

    def test_penalty(self):
        model, _, _ = _adapted(orthogonality=0.5)
        expected = 0.0
        for adapter in model._randadapt.adapters("default").values():
            a, b = map(methods.numpy, (adapter.lora_a, adapter.lora_b))
            for gram in (a.T @ a, b @ b.T):
                expected += 0.5 * np.sum((gram - np.eye(4)) ** 2)
        methods.close(sum(model.losses), expected)
        for adapter in model._randadapt.adapters("default").values():
            adapter.lora_a.assign(np.eye(adapter.input_dim, 4))
            adapter.lora_b.assign(np.eye(4, adapter.output_dim))
        assert abs(float(methods.numpy(sum(model.losses)))) < 1e-6

    def test_counts(self):
        model, _, _ = zoo.bert()
        report = kra.inject(model, kra.AdaLoRA(3), ["query", "value"])
        assert report.adapter_parameters == 4 * 3 * (8 + 8 + 1)

    def test_plain_fit_ends_at_the_budget(self):
        model, x, y = _adapted()
        history = model.fit(
            x,
            y,
            batch_size=4,
            epochs=10,
            callbacks=[kra.callbacks.RankBudget(1.5, interval=2)],
            verbose=0,
        )
        assert np.count_nonzero(_gates(model)) == 3
        budgets = history.history["rank_budget"]
        # 20 updates: 2 of warm-up, 6 at the end.
        assert budgets[0] == 8 and budgets[-1] == 3
        assert budgets == sorted(budgets, reverse=True)
        before = zoo.outputs(model, x)
        report = kra.compact(model)
        methods.close(zoo.outputs(model, x), before)
        ranks = {
            a: adapter.rank
            for a, adapter in model._randadapt.adapters("default").items()
        }
        assert sum(ranks.values()) == 3
        assert report.method == "LoRA"

    def test_score_by_magnitude(self):
        model, x, y = _adapted(score="magnitude")
        optimizer = model.optimizer
        assert optimizer.score == "magnitude"
        budget = kra.callbacks.RankBudget(2, interval=1)
        model.fit(x, y, epochs=8, batch_size=4, callbacks=[budget], verbose=0)
        assert np.count_nonzero(_gates(model)) == 4
        clone = kra.AdaLoRA.from_config(
            kra.AdaLoRA(4, score="magnitude").get_config()
        )
        assert clone.score == "magnitude"
        assert "score" not in kra.AdaLoRA(4).get_config()
        with pytest.raises(ValueError, match="`score` must be one of"):
            kra.AdaLoRA(4, score="size")

    def test_resumes_from_a_checkpoint(self, tmp_path):
        def fit(model, epochs, initial=0):
            model.fit(
                x,
                y,
                epochs=epochs,
                initial_epoch=initial,
                callbacks=[
                    kra.callbacks.RankBudget(
                        1, interval=1, total_updates=12, warmup=2
                    )
                ],
                verbose=0,
            )

        # NumPy's integers are numbers of updates as well.
        budget = kra.callbacks.RankBudget(1, warmup=np.int64(50))
        assert budget.warmup == 50 and isinstance(budget.warmup, int)
        model, x, y = _adapted()
        fit(model, 6)
        model.save(tmp_path / "model.keras")
        fit(model, 12, 6)
        again = keras.models.load_model(tmp_path / "model.keras")
        assert np.count_nonzero(_gates(again)) < 8
        fit(again, 12, 6)
        np.testing.assert_allclose(_gates(model), _gates(again), atol=1e-6)
        assert np.count_nonzero(_gates(again)) == 2

    @pytest.mark.every_backend
    def test_float16_training(self):
        keras.config.set_dtype_policy("mixed_float16")
        try:
            model, x, y = _adapted()
            model.fit(
                x,
                y,
                epochs=10,
                callbacks=[kra.callbacks.RankBudget(1, interval=1)],
                verbose=0,
            )
        finally:
            keras.config.set_dtype_policy("float32")
        assert np.count_nonzero(_gates(model)) == 2

    def test_bad_budgets(self):
        RankBudget = kra.callbacks.RankBudget
        for arguments, message in (
            ({"target_rank": -1}, "`target_rank` must be at least 0"),
            ({"target_rank": 1, "warmup": 1.5}, "must be a share below 1"),
            (
                {"target_rank": 1, "final": np.float64(1.5)},
                "must be a share below 1",
            ),
            ({"target_rank": 1, "interval": 0}, "`interval` must be at least"),
        ):
            with pytest.raises(ValueError, match=message):
                RankBudget(**arguments)
        model, x, y = _adapted()
        for budget, message in (
            (RankBudget(5), "asks for 10 ranks, and the model has 8"),
            (RankBudget(1, warmup=1, final=1), "leave nothing of the 2"),
        ):
            with pytest.raises(ValueError, match=message):
                model.fit(x, y, batch_size=4, callbacks=[budget], verbose=0)
        kra.eject(model)
        with pytest.raises(ValueError, match="found no `RankAllocation`"):
            model.fit(x, y, callbacks=[RankBudget(1)], verbose=0)

    def test_config_round_trip(self):
        config = kra.AdaLoRA(7, orthogonality=0.3, alpha=14).get_config()
        assert kra.AdaLoRA.from_config(config).get_config() == config
        with pytest.raises(TypeError, match="a regularizer of its own"):
            kra.AdaLoRA(7, regularizer="l2")


class TestPaperCount:
    @pytest.mark.slow
    def test_roberta_base(self):
        """Rank 12 at first: 24 * 12 * 1537."""
        model = methods.roberta()
        report = kra.inject(model, kra.AdaLoRA(12), ["query", "value"])
        assert report.adapter_parameters == 442_656
