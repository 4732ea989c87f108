"""Gradients of single examples, and estimates made of them."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_randadapt as kra
from keras_randadapt import per_example
from keras_randadapt.callbacks.pac_bayes import PACBayes
from keras_randadapt.per_example import example_source
from tests import zoo
from tests.callbacks.linear_network import BACKEND
from tests.callbacks.linear_network import Simulation
from tests.callbacks.linear_network import data_of
from tests.callbacks.linear_network import fit
from tests.callbacks.linear_network import network


@keras.saving.register_keras_serializable(package="tests")
class Branching(keras.layers.Layer):
    """A branch of Python on values: neither batching nor tracing goes."""

    def call(self, x):
        if bool(ops.sum(x) > 1e9):
            return -x
        return x


@keras.saving.register_keras_serializable(package="tests")
class Eager(keras.Model):
    def __init__(self, inner, last, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner
        self.last = last

    def build(self, input_shape):
        self.built = True

    def call(self, x):
        return self.last(self.inner(x))


class TestGradients:
    @pytest.fixture
    def case(self):
        model = network()
        zoo.randomize(model)
        x, y = data_of()
        return model, (x, y, None), model.trainable_variables

    def test_strategies_are_equal_and_right(self, case):
        model, batch, variables = case
        gradients = per_example.PerExampleGradients(model, variables)
        gradients.prepare(batch)
        arrays = gradients._structure.flatten(batch)
        simulation = Simulation(model, *batch[:2])
        expected = simulation.differences(
            simulation.example_losses, simulation.w
        )
        names = []
        for name, function in gradients._strategies:
            with per_example.without_regularizers(model):
                found = function(arrays, np.float32(2.0))
            rows = np.concatenate([g.reshape(12, -1) for g in found], axis=1)
            np.testing.assert_allclose(
                rows / 2, expected, rtol=1e-4, atol=1e-5, err_msg=name
            )
            names.append(name)
        assert names[:2] == ["all at once", "one by one"]

    @pytest.mark.parametrize("chunk_size", [1, 5, 12, 100, None])
    def test_chunks(self, case, chunk_size):
        model, batch, variables = case
        gradients = per_example.PerExampleGradients(
            model, variables, chunk_size
        )
        rows = list(gradients(batch))
        chunks = -(-12 // min(chunk_size or 12, 12))
        assert len(rows) == chunks
        simulation = Simulation(model, *batch[:2])
        expected = simulation.differences(
            simulation.example_losses, simulation.w
        )
        np.testing.assert_allclose(
            np.concatenate(rows), expected, rtol=1e-4, atol=1e-5
        )

    def test_memory_bounds_the_chunk(self, monkeypatch):
        """Gradients and intermediates: a wider input leaves less room."""
        sizes = []
        monkeypatch.setattr(per_example, "MEMORY", 1 << 20)
        for length in (16, 64):
            model = keras.Sequential(
                [
                    keras.Input((length, 32)),
                    keras.layers.Dense(64, activation="tanh", name="first"),
                    keras.layers.Dense(8),
                    keras.layers.GlobalAveragePooling1D(),
                ]
            )
            kra.inject(model, kra.LoRA(1), "first")
            model.compile("sgd", "mse")
            gradients = per_example.PerExampleGradients(
                model, model.trainable_variables
            )
            batch = (zoo.normal(1, length, 32), zoo.normal(1, 8), None)
            gradients.prepare(batch)
            # The hidden layer alone: one float a unit and position at least.
            assert gradients._intermediate_bytes >= 4 * 64 * length
            assert gradients._intermediate_bytes <= 40 * 64 * length
            assert gradients.row_bytes == 4 * (32 + 64)
            assert gradients.working_bytes(10**9) <= 1 << 20
            sizes.append(gradients.chunk_size)
        assert sizes[1] < sizes[0] / 3

    def test_what_can_not_be_vectorized(self):
        """An exact loop over examples, and one warning that says so."""
        x, y = data_of()
        inner = keras.Sequential(
            [
                keras.Input((3,)),
                keras.layers.Dense(2, name="first"),
                keras.layers.Dense(1),
            ]
        )
        zoo.set_weights(inner)
        rows = []
        for branching in (False, True):
            model = Eager(inner, Branching()) if branching else inner
            model.built = True
            kra.inject(model, kra.LoRA(2), "first")
            for v in model.trainable_variables:
                v.assign(zoo.normal(*v.shape))
            model.compile("sgd", "mse", run_eagerly=True)
            gradients = per_example.PerExampleGradients(
                model, model.trainable_variables, chunk_size=5
            )
            if branching:
                # TensorFlow can't compute them one by one either.
                with pytest.warns(
                    kra.AdapterWarning, match="can't be computed"
                ) as caught:
                    (first, *rest) = gradients((x, y, None))
                    rows.append(np.concatenate([first, *rest]))
                assert "can't be computed all" in str(caught[0].message)
                with warnings.catch_warnings():
                    warnings.simplefilter("error", UserWarning)
                    list(gradients((x, y, None)))
            else:
                rows.append(np.concatenate(list(gradients((x, y, None)))))
            kra.eject(model)
        assert np.abs(rows[0]).max() > 0.1
        np.testing.assert_allclose(*rows, rtol=1e-5, atol=1e-6)

    def test_model_is_left_as_it_was(self, case):
        """Statistics, seeds, losses of layers, torch's training flag."""
        model = keras.Sequential(
            [
                keras.Input((3,)),
                keras.layers.Dense(
                    4,
                    name="first",
                    activity_regularizer=keras.regularizers.L2(),
                ),
                keras.layers.BatchNormalization(),
                keras.layers.Dropout(0.5),
                keras.layers.Dense(1),
            ]
        )
        kra.inject(model, kra.LoRA(2), "first")
        model.compile("sgd", "mse", metrics=["mae"])
        x, y = data_of()
        model.fit(x, y, verbose=0)
        gradients = per_example.PerExampleGradients(
            model, model.trainable_variables
        )
        variables = [*model.variables, *model.metrics_variables]
        before = [np.array(ops.convert_to_numpy(v)) for v in variables]
        losses = [len(layer._losses) for layer in model._flatten_layers()]
        if BACKEND == "torch":
            model.train(True)
        for _ in range(2):
            list(gradients((x, y, None)))
        for variable, value in zip(variables, before):
            np.testing.assert_array_equal(
                ops.convert_to_numpy(variable), value, err_msg=variable.path
            )
        after = [len(layer._losses) for layer in model._flatten_layers()]
        # Another call clears what the last one left; nothing piles up.
        assert all(a <= b for a, b in zip(after, losses))
        if BACKEND == "torch":
            assert all(module.training for module in model.modules())

    def test_embeddings(self):
        """Whose gradients are sparse on TensorFlow."""
        model, x, targets = zoo.embedding()
        kra.inject(model, kra.LoRA(2), targets)
        zoo.randomize(model)
        y = zoo.normal(*model(x).shape)
        model.compile(keras.optimizers.SGD(0.0), "mse")
        callback = PACBayes(x, y, samples=5, reference="zero")
        fit(model, callback, x, y, epochs=1)
        assert callback.information[0, 0] > 1e-6

    @pytest.mark.parametrize(
        "policy",
        [
            "mixed_float16",
            pytest.param("mixed_bfloat16", marks=pytest.mark.one_backend),
        ],
    )
    def test_mixed_precision(self, policy):
        """Small losses too, whose gradients float16 can't hold as they are."""
        x, y = data_of()
        information = {}
        for dtype in ("float32", policy):
            for weight in (1.0, 1e-6):
                keras.config.set_dtype_policy(dtype)
                try:
                    model = network(loss_weights=weight)
                finally:
                    keras.config.set_dtype_policy("float32")
                zoo.randomize(model)
                callback = PACBayes(x, y, samples=5, reference="zero")
                # One step of half precision may be skipped for its scale.
                model.optimizer.learning_rate = 0.0
                history = fit(model, callback, x, y, epochs=2)
                assert np.isfinite(history["loss"]).all()
                information[dtype, weight] = callback.total_information[0]
        for weight in (1.0, 1e-6):
            np.testing.assert_allclose(
                information[policy, weight],
                information["float32", weight],
                rtol=0.1,
            )

    def test_half_precision_scale_gives_way_to_overflow(self, case):
        model, (x, y, _), variables = case
        gradients = per_example.PerExampleGradients(model, variables)
        gradients.prepare((x, y, None))
        seen = []

        def function(chunk, scale):
            seen.append(float(scale))
            value = np.inf if scale > 100 else scale
            return [
                np.full((len(chunk[0]), *v.shape), value) for v in variables
            ]

        gradients._strategies = [("all at once", function)]
        gradients.scales = per_example._HALF_SCALES
        (rows,) = gradients((x, y, None))
        assert seen == [2.0**15, 2.0**11, 2.0**7, 2.0**3]
        np.testing.assert_array_equal(rows, 1.0)

    def test_estimate_that_is_not_finite(self):
        x, y = data_of()
        bad = y.copy()
        bad[3] = np.nan
        model = network()
        callback = PACBayes(x, y, strength=1.0, samples=40)
        history = fit(model, callback, x, y, epochs=1)
        buffers = [
            np.array(ops.convert_to_numpy(w)) for w in callback._penalty.weights
        ]
        callback._source = example_source.source_of(x, bad)
        with pytest.warns(UserWarning, match="not finite"):
            history = fit(model, callback, x, y, epochs=2)
        for weight, value in zip(callback._penalty.weights, buffers):
            np.testing.assert_array_equal(ops.convert_to_numpy(weight), value)
        assert np.isnan(callback.information[1:]).all()
        assert np.isfinite(callback.information[0]).all()
        assert np.isfinite(history["loss"]).all()
