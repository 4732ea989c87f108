"""SoRA: gates, how they close, and what is left."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from tests import gradients
from tests import methods
from tests import zoo
from tests.methods import site_of

pytestmark = pytest.mark.one_backend


def _built(view=(7, 9), rank=4, **arguments):
    adapter = kra.SoRA(rank, seed=3, **arguments)
    adapter.build_at(site_of(view))
    return adapter


def _dense(adapter, values):
    gated = values["lora_a"] @ np.diag(values["gate"])
    return adapter.scaling * gated @ values["lora_b"]


def _adapted(**arguments):
    x = zoo.normal(8, 7)
    inputs = keras.Input((7,))
    hidden = keras.layers.Dense(6, activation="tanh", name="one")(inputs)
    outputs = keras.layers.Dense(5, name="two")(hidden)
    model = zoo.set_weights(keras.Model(inputs, outputs))
    kra.inject(model, kra.SoRA(4, **arguments), ["one", "two"])
    zoo.randomize(model)
    return model, x, zoo.normal(8, 5, seed=1)


def _gates(model):
    return [
        methods.numpy(adapter.gate)
        for adapter in model._randadapt.adapters("default").values()
    ]


class TestSoRA:
    @pytest.mark.every_backend
    def test_against_dense_reference(self):
        adapter = _built(alpha=6)
        values = methods.randomize(adapter)
        dense = _dense(adapter, values)
        methods.check_products(adapter, dense)
        values["gate"][[0, 2]] = 0
        adapter.gate.assign(values["gate"])
        dense = _dense(adapter, values)
        methods.check_products(adapter, dense)
        assert np.linalg.matrix_rank(dense) == 2

    @pytest.mark.every_backend
    def test_gradients(self):
        adapter = _built(scaling=0.5)
        values = methods.randomize(adapter)
        x, upstream = zoo.normal(6, 7), zoo.normal(6, 9, seed=4)
        names = ["lora_a", "lora_b", "gate"]
        found = gradients.gradients(
            lambda x: adapter.delta(x, True),
            x,
            [getattr(adapter, name) for name in names],
            upstream,
        )
        methods.close(found[0], upstream @ _dense(adapter, values).T, 2e-5)
        for name, got in zip(names, found[1:]):

            def loss(value, name=name):
                return np.sum(
                    upstream * (x @ _dense(adapter, {**values, name: value}))
                )

            expected = gradients.numeric_gradient(loss, values[name])
            methods.close(got, expected, 2e-5)

    def test_first_values_and_counts(self):
        adapter = _built()
        assert methods.numpy(adapter.gate).all()
        assert not methods.numpy(adapter.delta_kernel()).any()
        model, _, _ = zoo.bert()
        report = kra.inject(model, kra.SoRA(3), ["query", "value"])
        assert report.adapter_parameters == 4 * 3 * (8 + 8 + 1)

    def test_plain_fit_closes_gates(self):
        model, x, y = _adapted(sparsity=3.0)
        model.compile(keras.optimizers.SGD(0.02), "mse")
        expected = [np.abs(gate) for gate in _gates(model)]
        model.fit(x, y, epochs=100, verbose=0)
        gates = _gates(model)
        assert any((gate == 0).any() for gate in gates)
        for gate, first in zip(gates, expected):
            assert np.all(np.abs(gate) < first)
        kra.eject(model)
        assert not isinstance(model.optimizer, kra.optimizers.ProximalL1)

    def test_no_sparsity_closes_no_gate(self):
        model, x, y = _adapted(sparsity=0.0)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(x, y, epochs=20, verbose=0)
        assert all(np.all(gate != 0) for gate in _gates(model))

    @pytest.mark.parametrize("sparsity", [0.0, 0.5])
    def test_no_weight_decay_of_gates(self, sparsity):
        model, x, y = _adapted(sparsity=sparsity)
        before = _gates(model)
        optimizer = keras.optimizers.AdamW(1e-8, weight_decay=1e7)
        model.compile(optimizer, "mse")
        model.fit(x, y, verbose=0)
        for one, two in zip(_gates(model), before):
            np.testing.assert_allclose(one, two, rtol=1e-4)

    def test_a_wrapper_of_ones_own_is_kept(self):
        model, x, y = _adapted()
        model.compile(kra.optimizers.ProximalL1("sgd", 2.0), "mse")
        assert not model.optimizer.automatic
        assert isinstance(model.optimizer.inner_optimizer, keras.optimizers.SGD)

    def test_config_round_trip(self):
        config = kra.SoRA(
            7, sparsity=0.1, gate_initializer="ones", alpha=14, dropout=0.1
        ).get_config()
        assert config["sparsity"] == 0.1
        assert kra.SoRA.from_config(config).get_config() == config
        with pytest.raises(ValueError, match="`sparsity` must be at least 0"):
            kra.SoRA(sparsity=-1)

    @pytest.mark.parametrize("sparsity", [0.0, 0.5])
    def test_a_whole_model_file_holds_the_optimizer(self, tmp_path, sparsity):
        model, x, y = _adapted(sparsity=sparsity)
        model.compile("adam", "mse")
        model.fit(x, y, epochs=2, verbose=0)
        model.save(tmp_path / "x.keras")
        again = keras.models.load_model(tmp_path / "x.keras")
        found = [methods.numpy(v) for v in again.optimizer.variables]
        for one, two in zip(found, model.optimizer.variables, strict=True):
            np.testing.assert_array_equal(one, methods.numpy(two))

    def test_resumes_from_a_checkpoint(self, tmp_path):
        model, x, y = _adapted(sparsity=3.0)
        model.compile(keras.optimizers.Adam(0.02), "mse")
        model.fit(x, y, epochs=2, verbose=0)
        model.save(tmp_path / "model.keras")
        model.fit(x, y, epochs=2, verbose=0)
        again = keras.models.load_model(tmp_path / "model.keras")
        again.fit(x, y, epochs=2, verbose=0)
        for one, two in zip(_gates(model), _gates(again)):
            np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-7)


class TestPaperCount:
    @pytest.mark.slow
    def test_roberta_base(self):
        """Rank 8 on query and value: 24 * 8 * (768 + 768 + 1)."""
        model = methods.roberta()
        report = kra.inject(model, kra.SoRA(8), ["query", "value"])
        assert report.adapter_parameters == 295_104
