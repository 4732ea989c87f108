"""The PAC-Bayes callback against a simulation of its training."""

import functools
import itertools
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

import keras_randadapt as kra
from keras_randadapt.callbacks.pac_bayes import PACBayes
from tests import zoo
from tests.callbacks.linear_network import BACKEND
from tests.callbacks.linear_network import RATE
from tests.callbacks.linear_network import Simulation
from tests.callbacks.linear_network import WholeDelta
from tests.callbacks.linear_network import attachments
from tests.callbacks.linear_network import data_of
from tests.callbacks.linear_network import fit
from tests.callbacks.linear_network import flat
from tests.callbacks.linear_network import network
from tests.per_example.test_example_source import Batches

pytestmark = pytest.mark.one_backend("torch")


def _check(model, callback, history, simulation, rtol=2e-4):
    close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=1e-6)
    close(history["loss"], simulation.losses)
    close(history["pac_bayes"], simulation.logged)
    close(callback.information, simulation.rows)
    close(callback.total_information, simulation.totals)
    close(flat(model), simulation.w)


OPTIONS = {
    "quadratic": {},
    "linear": {"mode": "linear", "strength": 0.3},
    "diagonal": {"mode": "diagonal"},
    "site": {"blocks": "site"},
    "linear_site": {"mode": "linear", "blocks": "site", "strength": 0.3},
    "mean": {"reduction": "mean", "strength": 5.0},
    "head": {"head_strength": 0.2, "reduction": "mean"},
    "head_alone": {"strength": 0.0, "head_strength": 0.5},
    "samples": {"samples": 17, "seed": 3, "strength": 0.3},
}


class TestNumbers:
    def test_linear_regression_by_hand(self):
        """Tells square-then-sum from what it could be mistaken for."""
        x, y = data_of(8)
        model = keras.Sequential(
            [keras.Input((3,)), keras.layers.Dense(1, use_bias=False)]
        )
        zoo.set_weights(model)
        kernel = ops.convert_to_numpy(model.layers[0].kernel).astype(float)
        kra.inject(model, WholeDelta(), "all-linear")
        model.compile(keras.optimizers.SGD(0.3), "mse")
        callback = PACBayes(x, y, strength=0.1, samples=6, seed=0)
        fit(model, callback, x, y, epochs=1)
        d = flat(model)
        key = np.array([0, 0], "uint64")
        drawn = np.random.Generator(np.random.Philox(key=key)).integers(0, 8, 6)
        residual = (x @ kernel)[:, 0] + x @ d - y[:, 0]
        g = (2 * residual[:, None] * x)[drawn]
        right = np.sum((g @ d) ** 2)
        np.testing.assert_allclose(callback.total_information, [right], 1e-5)
        wrong = {
            "sum, then square": np.sum(g @ d) ** 2,
            "gradient of the mean": np.mean(g @ d) ** 2,
            "mean over examples": np.mean((g @ d) ** 2),
            "diagonal": np.sum((g * d) ** 2),
            "from zero": np.sum((g @ (d + kernel[:, 0])) ** 2),
            "at the start": np.sum(
                ((2 * (x @ kernel - y) * x)[drawn] @ d) ** 2
            ),
            "without replacement": np.sum(
                ((2 * residual[:, None] * x)[np.unique(drawn)] @ d) ** 2
            ),
        }
        for name, value in wrong.items():
            assert abs(value - right) > 0.01 * right, name

    @pytest.mark.parametrize(
        "name",
        [
            pytest.param(
                name,
                # Both kinds of estimate, and both kinds of blocks.
                marks=[pytest.mark.every_backend]
                if name in ("quadratic", "linear_site", "head")
                else [],
            )
            for name in OPTIONS
        ],
    )
    def test_training_is_the_simulated_one(self, name):
        x, y = data_of()
        options = {"strength": 1.0, "samples": 5, **OPTIONS[name]}
        model = network()
        simulation = Simulation(model, x, y, **options).run(4)
        # The penalty must matter, or nothing is tested.
        free = Simulation(model, x, y, strength=0.0, samples=5).run(4)
        moved = np.abs(free.w - free.start).max()
        assert np.abs(simulation.w - free.w).max() > 0.01 * moved
        callback = PACBayes(x, y, chunk_size=2, **options)
        history = fit(model, callback, x, y)
        _check(model, callback, history, simulation)
        assert callback.sites == ["layers/dense", "layers/dense_1"]
        assert callback.heads == (["layers/dense_2"] if "head" in name else [])

    @pytest.mark.parametrize("mode", ["quadratic", "diagonal"])
    def test_reference_zero(self, mode):
        x, y = data_of()
        model = network()
        zoo.randomize(model)
        options = {"strength": 0.5, "samples": 5, "reference": "zero"}
        simulation = Simulation(model, x, y, mode=mode, **options).run(3)
        assert simulation.rows[0].min() > 1e-3
        callback = PACBayes(x, y, mode=mode, **options)
        history = fit(model, callback, x, y, epochs=3)
        _check(model, callback, history, simulation)

    @pytest.mark.parametrize(
        "jit_compile",
        [
            pytest.param(
                True,
                # Dynamo takes half a minute to follow Keras's `fit`.
                marks=[pytest.mark.slow] if BACKEND == "torch" else [],
            ),
            False,
        ],
    )
    @pytest.mark.every_backend
    def test_compilation(self, jit_compile, monkeypatch):
        if BACKEND == "torch" and jit_compile:
            import torch

            # Not the default backend, which needs a compiler for the CPU.
            monkeypatch.setattr(
                torch,
                "compile",
                functools.partial(torch.compile, backend="aot_eager"),
            )
        x, y = data_of()
        model = network(jit_compile=jit_compile)
        simulation = Simulation(model, x, y).run(3)
        callback = PACBayes(x, y, strength=1.0, samples=5)
        history = fit(model, callback, x, y, epochs=3)
        _check(model, callback, history, simulation)

    def test_eager(self):
        x, y = data_of()
        model = network(run_eagerly=True)
        simulation = Simulation(model, x, y).run(3)
        callback = PACBayes(x, y, strength=1.0, samples=5)
        _check(
            model, callback, fit(model, callback, x, y, epochs=3), simulation
        )

    def test_sample_weights(self):
        x, y = data_of()
        weights = np.linspace(0.0, 2.0, len(x)).astype("float32")
        model = network()
        simulation = Simulation(model, x, y, weights=weights).run(3)
        callback = PACBayes(
            x, y, strength=1.0, sample_weight=weights, samples=5
        )
        history = fit(model, callback, x, y, epochs=3, sample_weight=weights)
        _check(model, callback, history, simulation)

    def test_nothing_at_init(self):
        """I = 0 where training begins; for RLoRA from zero as well."""
        x, y = data_of()
        for reference in ("initial", "zero"):
            model = network(head=False)
            kra.eject(model)
            kra.inject(model, kra.RLoRA(2), ["first", "second"])
            model.compile(keras.optimizers.SGD(0.0), "mse")
            callback = PACBayes(x, y, samples=5, reference=reference)
            history = fit(model, callback, x, y, epochs=2)
            np.testing.assert_array_equal(callback.information, 0.0)
            assert history["pac_bayes"] == [0.0, 0.0]
            assert history["loss"][0] == history["loss"][1]

    def test_validation_loss_includes_it(self):
        x, y = data_of()
        model = network()
        callback = PACBayes(x, y, strength=5.0, samples=5)
        history = fit(model, callback, x, y, validation_data=(x, y))
        bare = model.evaluate(x, y, verbose=0)
        got = history["val_loss"][-1] - bare
        assert got > 1e-3
        np.testing.assert_allclose(got, history["pac_bayes"][-1], rtol=1e-3)

    @pytest.mark.every_backend
    def test_add_loss_counts_and_regularizers_do_not(self):
        """And a regularizer of the variable that carries the penalty stays."""
        x, y = data_of()
        information = {}
        for what in ("nothing", "regularizer", "activity"):
            model = network()
            first = model.layers[0]
            update = first.adapter.get("default").update
            own = keras.regularizers.L2(3.0)
            if what == "regularizer":
                update.regularizer = own
            if what == "activity":
                first.activity_regularizer = own
            zoo.randomize(model)
            model.optimizer.learning_rate = 0.0
            callback = PACBayes(x, y, samples=5, reference="zero")
            history = fit(model, callback, x, y, epochs=2)
            information[what] = callback.total_information[0]
            if what == "regularizer":
                assert update.regularizer is own
                bare = model.evaluate(x, y, verbose=0)
                np.testing.assert_allclose(
                    history["loss"][1], bare + history["pac_bayes"][1], 1e-5
                )
        assert information["regularizer"] == information["nothing"]
        difference = abs(information["activity"] - information["nothing"])
        assert difference > 0.1 * information["nothing"]

    def test_custom_compute_loss(self):
        class Custom(keras.Sequential):
            def compute_loss(self, x, y, y_pred, sample_weight):
                loss = ops.mean((y_pred - y) ** 2)
                return loss + sum(self.losses, 0.0)

        x, y = data_of()
        reference = network()
        model = Custom(
            [
                keras.Input((3,)),
                keras.layers.Dense(2, use_bias=False, name="first"),
                keras.layers.Dense(2, use_bias=False, name="second"),
                keras.layers.Dense(1, name="head"),
            ]
        )
        zoo.set_weights(model)
        kra.inject(
            model, WholeDelta(), ["first", "second"], keep_trainable="head"
        )
        model.compile(keras.optimizers.SGD(RATE))
        simulation = Simulation(reference, x, y).run(3)
        callback = PACBayes(x, y, strength=1.0, samples=5)
        _check(
            model, callback, fit(model, callback, x, y, epochs=3), simulation
        )


class TestSteps:
    @pytest.mark.every_backend
    @pytest.mark.parametrize(
        "every, steps_per_execution",
        [
            (2, 1),
            (3, 2),
            pytest.param(3, 1, marks=pytest.mark.slow),
            pytest.param(2, 2, marks=pytest.mark.slow),
        ],
    )
    def test_every_steps(self, every, steps_per_execution):
        """Six steps an epoch; each step is the simulation's full batch."""
        if BACKEND == "torch" and steps_per_execution > 1:
            # Keras refuses it there, and must not leave anything behind.
            model = network(steps_per_execution=2)
            with pytest.raises(ValueError, match="steps_per_execution"):
                fit(model, PACBayes(*data_of(), samples=5), *data_of())
            assert not attachments(model)
            return
        x, y = data_of()
        model = network(steps_per_execution=steps_per_execution)
        seen = [0]

        def now(step):
            """Whether an execution that ends here crossed a multiple."""
            if (step + 1) % steps_per_execution:
                return False
            before, seen[0] = seen[0], step + 1
            return (step + 1) // every > before // every

        simulation = Simulation(model, x, y).run(12, estimate=now)
        callback = PACBayes(x, y, strength=1.0, samples=5, every=every)
        repeated = [np.concatenate([a] * 6) for a in (x, y)]
        history = model.fit(
            *repeated,
            batch_size=len(x),
            epochs=2,
            shuffle=False,
            verbose=0,
            callbacks=[callback],
        ).history
        assert len(callback.information) == simulation.estimations
        np.testing.assert_allclose(
            callback.information, simulation.rows, rtol=5e-4, atol=1e-6
        )
        np.testing.assert_allclose(flat(model), simulation.w, rtol=5e-4)
        means = np.reshape(simulation.losses, (2, 6)).mean(axis=1)
        np.testing.assert_allclose(history["loss"], means, rtol=2e-4)
        assert all(0 < cost["share"] for cost in callback.costs)

    @pytest.mark.every_backend
    @pytest.mark.parametrize("steps_per_execution", [1, 2])
    def test_nothing_is_traced_anew(self, steps_per_execution):
        if BACKEND == "torch":
            steps_per_execution = 1
        calls = []

        def loss(y, y_pred):
            calls.append(1)
            return ops.mean((y_pred - y) ** 2, axis=-1)

        x, y = data_of()
        counts = {}
        functions = set()
        for epochs in (2, 6):
            model = network(
                loss=loss,
                steps_per_execution=steps_per_execution,
                jit_compile=BACKEND != "torch",
            )
            watch = keras.callbacks.LambdaCallback(
                on_epoch_begin=lambda *_: functions.add(
                    (id(model), id(model.train_function))
                )
            )
            callback = PACBayes(x, y, samples=5, chunk_size=3)
            calls.clear()
            model.fit(
                x,
                y,
                batch_size=3,
                epochs=epochs,
                verbose=0,
                callbacks=[callback, watch],
            )
            counts[epochs] = len(calls)
            assert len(callback.information) == epochs
        assert len(functions) == 2
        if BACKEND == "torch":
            # Eager: four steps and two chunks an epoch, and nothing else.
            assert counts[6] - counts[2] == 4 * (4 + 2)
        else:
            assert counts[2] == counts[6]

    def test_gradient_accumulation(self):
        """Accumulated over two equal batches, a step is the plain one."""
        x, y = data_of()
        weights = []
        for accumulate in (None, 2):
            model = network(
                optimizer=keras.optimizers.SGD(
                    RATE, gradient_accumulation_steps=accumulate
                )
            )
            callback = PACBayes(x, y, strength=1.0, samples=5)
            repeats = accumulate or 1
            model.fit(
                np.concatenate([x] * repeats),
                np.concatenate([y] * repeats),
                batch_size=len(x),
                epochs=3,
                shuffle=False,
                verbose=0,
                callbacks=[callback],
            )
            weights.append(flat(model))
        np.testing.assert_allclose(weights[0], weights[1], rtol=1e-4)

    def test_adaptive_optimizer(self):
        """AdamW, one step of which does not depend on the loss's scale."""
        x, y = data_of()
        weights = []
        for strength in (0.0, 10.0):
            model = network(optimizer="adamw")
            callback = PACBayes(x, y, strength=strength, samples=5)
            history = fit(model, callback, x, y)
            assert (history["pac_bayes"][-1] > 0) == (strength > 0)
            weights.append(flat(model))
        assert np.abs(weights[0] - weights[1]).max() > 1e-6


def _pipeline(kind, x, y, size):
    """Batches of `size` in the arrays' order, and what `fit` must be told."""
    if kind == "generator":
        count = -(-len(x) // size)
        parts = [slice(i * size, (i + 1) * size) for i in range(count)]
        batches = ((x[part], y[part]) for part in itertools.cycle(parts))
        return batches, {"steps_per_epoch": count}
    if kind == "tf_data":
        import tensorflow as tf

        return tf.data.Dataset.from_tensor_slices((x, y)).batch(size), {}
    if kind == "py_dataset":
        sizes = [len(x[i : i + size]) for i in range(0, len(x), size)]
        # `fit` shuffles the batches of these alone, unless it is told.
        return Batches(x, y, sizes), {"shuffle": False}
    import torch

    tensors = map(torch.from_numpy, (x, y))
    dataset = torch.utils.data.TensorDataset(*tensors)
    return torch.utils.data.DataLoader(dataset, batch_size=size), {}


@functools.cache
def _trained(of_fit, of_callback="arrays", strength=1.0):
    """Weights after training on data of one kind, estimated from another."""
    x, y = data_of()
    # The last batch of an epoch is smaller.
    data, arguments = (x, y), {"batch_size": 5, "shuffle": False}
    if of_fit != "arrays":
        pipeline, arguments = _pipeline(of_fit, x, y, 5)
        data = (pipeline,)
    drawn = (x, y)
    if of_callback == of_fit:
        # The very object that `fit` has, at work in both.
        drawn = data
    elif of_callback != "arrays":
        drawn = _pipeline(of_callback, x, y, 5)[:1]
    model = network()
    callback = PACBayes(*drawn, strength=strength, samples=5)
    model.fit(*data, epochs=3, verbose=0, callbacks=[callback], **arguments)
    return flat(model)


class TestPipelines:
    @pytest.mark.parametrize(
        "kind", ["generator", "tf_data", "py_dataset", "data_loader"]
    )
    def test_fit_takes_a_pipeline(self, kind):
        expected = _trained("arrays")
        # Else the penalty could be left out and nothing would show.
        free = _trained("arrays", strength=0.0)
        assert np.abs(expected - free).max() > 1e-2
        np.testing.assert_allclose(_trained(kind), expected, 1e-5, 1e-6)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["tf_data", "py_dataset", "data_loader"])
    def test_fit_and_the_callback_share_a_pipeline(self, kind):
        expected = _trained("arrays", kind)
        np.testing.assert_allclose(_trained(kind, kind), expected, 1e-5, 1e-6)


@pytest.mark.every_backend
class TestHalfPrecision:
    @pytest.mark.parametrize(
        "mode",
        [
            "quadratic",
            pytest.param("linear", marks=pytest.mark.slow),
            "diagonal",
        ],
    )
    def test_step(self, mode):
        """One step under the penalty moves weights as in float64."""
        x, y = data_of()
        scale = 2.0**10
        keras.config.set_dtype_policy("mixed_float16")
        try:
            model = network(
                optimizer=keras.optimizers.LossScaleOptimizer(
                    keras.optimizers.SGD(RATE), initial_scale=scale
                )
            )
        finally:
            keras.config.set_dtype_policy("float32")
        assert model.layers[-1].compute_dtype == "float16"
        zoo.randomize(model)
        options = {
            "mode": mode,
            "strength": 2.0,
            "samples": 5,
            "reference": "zero",
        }
        simulation = Simulation(model, x, y, **options)
        # An epoch that only estimates, then the one that is looked at.
        rates = keras.callbacks.LearningRateScheduler(
            lambda epoch: RATE if epoch else 0.0
        )
        start = flat(model)
        model.fit(
            x,
            y,
            batch_size=len(x),
            epochs=2,
            verbose=0,
            callbacks=[PACBayes(x, y, **options), rates],
        )
        # No step was skipped.
        assert int(model.optimizer.inner_optimizer.iterations) == 2
        assert float(model.optimizer.dynamic_scale) == scale

        def move(function):
            return (
                -RATE
                * simulation.differences(
                    lambda w: np.atleast_1d(function(w)), start
                ).ravel()
            )

        simulation.estimate_now()
        expected, penalty = move(simulation.loss), move(simulation.penalty)
        # float16 has eleven bits: a few thousandths in all, and nothing near
        # what the penalty does.
        tolerance = 0.01 * np.abs(expected).max()
        assert np.abs(penalty).max() > 10 * tolerance
        np.testing.assert_allclose(
            flat(model) - start, expected, rtol=0, atol=tolerance
        )


def _rmlora_network(optimizer):
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, activation="tanh", name="first"),
            keras.layers.Dense(4, activation="tanh", name="second"),
            keras.layers.Dense(1, name="head"),
        ]
    )
    zoo.set_weights(model)
    kra.inject(model, kra.RMLoRA(3, update_rank=1), ["first", "second"])
    model.compile(optimizer, "mse")
    return model


class TestOptimizers:
    @pytest.mark.parametrize(
        "builder, optimizer",
        [
            (network, "RMSprop"),
            (network, "Lion"),
            pytest.param(network, "Adagrad", marks=pytest.mark.slow),
            (_rmlora_network, "SGD"),
            pytest.param(_rmlora_network, "RMSprop", marks=pytest.mark.slow),
        ],
    )
    def test_loss_has_the_term_and_weights_feel_it(self, builder, optimizer):
        x, y = data_of()
        weights = []
        for strength in (0.0, 5.0):
            model = builder(
                optimizer=getattr(keras.optimizers, optimizer)(0.05)
            )
            zoo.randomize(model)
            callback = PACBayes(
                x, y, strength=strength, samples=5, reference="zero"
            )
            # The logged loss is that before an epoch's only step, and
            # `pac_bayes` that after it: the last one must not move.
            rates = keras.callbacks.LearningRateScheduler(
                lambda epoch: 0.05 if epoch < 4 else 0.0
            )
            history = model.fit(
                x,
                y,
                batch_size=len(x),
                epochs=5,
                verbose=0,
                callbacks=[callback, rates],
            ).history
            if builder is _rmlora_network:
                assert isinstance(
                    model.optimizer, kra.optimizers.MaskedGradient
                )
            plain = model.evaluate(x, y, verbose=0)
            term = history["pac_bayes"][-1]
            assert (term > 1e-3 * plain) == (strength > 0)
            np.testing.assert_allclose(
                history["loss"][-1] - term, plain, rtol=1e-5
            )
            weights.append(flat(model))
        assert np.abs(weights[0] - weights[1]).max() > 1e-3


class TestWithoutStrength:
    @pytest.mark.every_backend
    def test_training_is_bit_identical(self):
        """Dropout, shuffling and global generators go on undisturbed."""
        weights = []
        for strength in (None, 0.0):
            keras.utils.clear_session()
            keras.utils.set_random_seed(3)
            model = keras.Sequential(
                [
                    keras.Input((3,)),
                    keras.layers.Dense(8, name="first"),
                    keras.layers.Dropout(0.3),
                    keras.layers.GaussianNoise(0.1),
                    keras.layers.Dense(1),
                ]
            )
            kra.inject(model, kra.LoRA(2, dropout=0.2), "first")
            model.compile("adam", "mse")
            x, y = data_of()
            callbacks = []
            if strength is not None:
                callbacks = [PACBayes(x, y, strength, samples=5)]
            model.fit(
                x, y, batch_size=4, epochs=3, verbose=0, callbacks=callbacks
            )
            after = [np.random.rand(), keras.random.normal((2,))]
            weights.append(
                (
                    flat(model),
                    [ops.convert_to_numpy(v) for v in model.variables],
                    ops.convert_to_numpy(after[1]),
                    after[0],
                    # Names count up, too.
                    keras.layers.Dense(1).name,
                )
            )
        np.testing.assert_array_equal(weights[0][0], weights[1][0])
        for a, b in zip(weights[0][1], weights[1][1], strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(weights[0][2], weights[1][2])
        assert weights[0][3:] == weights[1][3:]
        information = callbacks[0].information
        assert information.shape == (3, 1) and information.min() > 0
        assert len(callbacks[0].costs) == 3

    def test_nothing_is_attached(self):
        model = network()
        variables = list(map(id, model.variables))
        x, y = data_of()

        class Look(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                assert list(map(id, self.model.variables)) == variables

        model.fit(
            x,
            y,
            epochs=2,
            verbose=0,
            callbacks=[PACBayes(x, y, 0, samples=5), Look()],
        )


class TestLifetime:
    def test_detached_after_fit(self):
        model = network()
        before = list(map(id, model.variables))
        x, y = data_of()
        fit(model, PACBayes(x, y, samples=5), x, y)
        assert list(map(id, model.variables)) == before
        assert not attachments(model)

    def test_second_fit_goes_on(self):
        x, y = data_of()
        weights = []
        for parts in ([4], [2, 2]):
            model = network()
            callback = PACBayes(x, y, strength=1.0, samples=5)
            logged = []
            for epochs in parts:
                history = fit(model, callback, x, y, epochs=epochs)
                logged += history["pac_bayes"]
            weights.append((flat(model), callback.information, logged))
        for a, b in zip(*weights):
            np.testing.assert_allclose(a, b, rtol=1e-5)

    def test_interrupted_fit(self, tmp_path):
        model = network()
        before = list(map(id, model.variables))
        x, y = data_of()

        class Stop(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                if self.epoch:
                    raise KeyboardInterrupt

            def on_epoch_begin(self, epoch, logs=None):
                self.epoch = epoch

        callback = PACBayes(x, y, strength=1.0, samples=5)
        with pytest.raises(KeyboardInterrupt):
            model.fit(x, y, epochs=3, verbose=0, callbacks=[callback, Stop()])
        assert list(map(id, model.variables)) == before
        assert not attachments(model)
        assert len(callback.information) == 1
        model.save(tmp_path / "model.keras")
        # Without and with the callback.
        history = fit(model, keras.callbacks.Callback(), x, y, epochs=1)
        bare = history["loss"][0]
        assert "pac_bayes" not in history
        history = fit(model, callback, x, y, epochs=1)
        assert history["pac_bayes"][0] > 0 and np.isfinite(bare)
        kra.eject(model)
        model.predict(x, verbose=0)

    def test_early_stopping_restores_weights_after_it(self):
        x, y = data_of()
        model = network()
        model.fit(
            x,
            y,
            epochs=5,
            verbose=0,
            callbacks=[
                PACBayes(x, y, samples=5),
                keras.callbacks.EarlyStopping(
                    "loss",
                    patience=1,
                    mode="max",
                    restore_best_weights=True,
                    start_from_epoch=0,
                ),
            ],
        )
        assert not attachments(model)

    @pytest.mark.parametrize("what", ["evaluate", "predict"])
    def test_outside_training(self, what):
        x, y = data_of()
        model = network()
        expected = model.evaluate(x, y, verbose=0)
        callback = PACBayes(x, y, samples=5)
        if what == "evaluate":
            got = model.evaluate(x, y, verbose=0, callbacks=[callback])
            assert got == expected
        else:
            model.predict(x, verbose=0, callbacks=[callback])
        assert not attachments(model)
        fit(model, callback, x, y, epochs=1)

    @pytest.mark.parametrize("change", ["eject", "set_active", "merge"])
    def test_adapters_change_while_attached(self, change):
        """A training loop of one's own that broke off."""
        x, y = data_of()
        model = network()
        callback = PACBayes(x, y, samples=5)
        callback.set_model(model)
        assert attachments(model)
        if change == "eject":
            kra.eject(model)
        elif change == "merge":
            kra.merge(model)
        else:
            kra.set_active(model, [])
        assert not [v.path for v in model.variables if "pac_bayes" in v.path]
        model.evaluate(x, y, verbose=0)

    def test_loop_of_ones_own(self):
        x, y = data_of()
        model = network()
        callback = PACBayes(x, y, strength=1.0, samples=5)
        callbacks = keras.callbacks.CallbackList([callback], model=model)
        callbacks.on_train_begin()
        losses = []
        for epoch in range(3):
            callbacks.on_epoch_begin(epoch)
            model.reset_metrics()
            losses.append(float(model.train_on_batch(x, y)))
            callbacks.on_epoch_end(epoch, {})
        callbacks.on_train_end()
        assert not attachments(model)
        simulation = Simulation(network(), x, y).run(3)
        np.testing.assert_allclose(losses, simulation.losses, rtol=2e-4)
        np.testing.assert_allclose(flat(model), simulation.w, rtol=2e-4)


class Break(keras.callbacks.Callback):
    """Breaks off at the beginning of an epoch, as a machine might."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            raise RuntimeError("the power is out")


class BreakAfter(keras.callbacks.Callback):
    """Breaks off after so many steps, in the middle of an epoch."""

    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            raise RuntimeError("the power is out")


class TestFiles:
    @pytest.mark.parametrize(
        "first, options",
        [
            ("backup", {}),
            ("pac_bayes", {}),
            ("pac_bayes", {"mode": "linear", "head_strength": 0.3}),
            ("backup", {"mode": "diagonal", "every": 4}),
        ],
    )
    def test_backup_and_restore(self, tmp_path, first, options):
        """A resumed training is the one that was not interrupted."""
        x, y = data_of()

        def run(broken_at, folder, seed=0):
            keras.utils.set_random_seed(seed)
            model = network(optimizer="adam")
            callback = PACBayes(x, y, strength=1.0, samples=5, **options)
            backup = keras.callbacks.BackupAndRestore(tmp_path / folder)
            callbacks = [callback, backup]
            if first == "backup":
                callbacks.reverse()
            history = model.fit(
                x,
                y,
                batch_size=4,
                shuffle=False,
                epochs=4,
                verbose=0,
                callbacks=[*callbacks, Break(broken_at)],
            )
            return flat(model), callback, history.history["pac_bayes"]

        whole, expected, logged = run(None, "whole")
        with pytest.raises(RuntimeError, match="power"):
            run(2, "broken")
        resumed, callback, logged_after = run(None, "broken", seed=1)
        np.testing.assert_array_equal(resumed, whole)
        np.testing.assert_array_equal(
            callback.information, expected.information
        )
        assert logged_after == logged[2:]

    @pytest.mark.parametrize(
        "every", [pytest.param(3, marks=pytest.mark.slow), 4]
    )
    def test_backup_every_steps(self, tmp_path, every):
        """The file is of step 8; estimations are around it or at it."""
        x, y = data_of()

        def run(steps, epochs, callbacks, seed=0):
            keras.utils.set_random_seed(seed)
            model = network(optimizer="adam")
            callback = PACBayes(x, y, strength=1.0, samples=5, every=every)
            callbacks = [callback, *callbacks]
            # All batches are the same: Keras begins the broken epoch anew,
            # from the weights in its middle.
            model.fit(
                *[np.concatenate([a] * steps) for a in (x, y)],
                batch_size=len(x),
                shuffle=False,
                epochs=epochs,
                verbose=0,
                callbacks=callbacks,
            )
            return flat(model), callback

        def backup():
            return keras.callbacks.BackupAndRestore(tmp_path, save_freq=4)

        with pytest.raises(RuntimeError, match="power"):
            run(6, 3, [backup(), BreakAfter(10)])
        resumed, callback = run(6, 3, [backup()], seed=1)
        # Eight steps from the file and two epochs after them.
        whole, expected = run(20, 1, [])
        assert len(expected.information) == 20 // every
        np.testing.assert_array_equal(
            callback.information, expected.information
        )
        np.testing.assert_array_equal(resumed, whole)

    @pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
    def test_files_of_training_load_without_the_callback(
        self, tmp_path, suffix
    ):
        x, y = data_of()
        model = network()
        path = str(tmp_path / f"model{suffix}")
        checkpoint = keras.callbacks.ModelCheckpoint(
            path, save_weights_only=suffix != ".keras"
        )
        callback = PACBayes(x, y, samples=5, head_strength=0.1)
        model.fit(x, y, epochs=2, verbose=0, callbacks=[callback, checkpoint])
        expected = zoo.outputs(model, x)
        if suffix == ".keras":
            loaded = keras.models.load_model(path)
            assert not attachments(loaded)
        else:
            loaded = network()
            loaded.load_weights(path)
        np.testing.assert_allclose(zoo.outputs(loaded, x), expected, rtol=1e-6)
        loaded.fit(x, y, epochs=1, verbose=0)

    def test_resume_with_the_callback_added(self, tmp_path):
        x, y = data_of()
        folder = tmp_path / "backup"
        backup = keras.callbacks.BackupAndRestore(folder)
        with pytest.raises(RuntimeError, match="power"):
            network().fit(
                x, y, epochs=3, verbose=0, callbacks=[backup, Break(1)]
            )
        model = network()
        start = flat(model)
        callback = PACBayes(x, y, samples=5)
        backup = keras.callbacks.BackupAndRestore(folder)
        model.fit(x, y, epochs=3, verbose=0, callbacks=[callback, backup])
        # Epochs 1 and 2; measured from where the whole training began.
        assert len(callback.information) == 2
        reference = ops.convert_to_numpy(callback._penalty.reference)
        np.testing.assert_array_equal(reference, start[: len(reference)])

    def test_resume_with_other_arguments(self, tmp_path):
        x, y = data_of()
        folder = tmp_path / "backup"
        for options, error in (
            ({"samples": 5}, "power"),
            ({"samples": 6}, "the arguments .`samples`"),
            ({"samples": 5, "mode": "diagonal"}, "'curvature' is missing"),
        ):
            model = network()
            backup = keras.callbacks.BackupAndRestore(folder)
            with pytest.raises((RuntimeError, ValueError), match=error):
                model.fit(
                    x,
                    y,
                    epochs=3,
                    verbose=0,
                    callbacks=[PACBayes(x, y, **options), backup, Break(1)],
                )
            assert not attachments(model)


class TestCosts:
    def test_costs(self):
        x, y = data_of()
        model = network()
        callback = PACBayes(x, y, samples=5, head_strength=1.0)
        fit(model, callback, x, y, epochs=2)
        assert len(callback.costs) == 2
        # Ten adapter weights and a head of three.
        buffers = 4 * (5 * 10 + 10 + 3 + 3)
        for cost in callback.costs:
            assert cost["seconds"] > 0 and cost["share"] > 0
            assert cost["bytes"] >= buffers + 5 * 4 * 13
        small = PACBayes(x, y, samples=5, mode="diagonal", chunk_size=1)
        fit(network(), small, x, y, epochs=1)
        assert small.costs[0]["bytes"] < callback.costs[0]["bytes"]

    def test_files_hold_what_the_docstring_says(self, tmp_path):
        model = network()
        x, y = data_of()
        callback = PACBayes(x, y, samples=50)
        callback.set_model(model)
        assert callback._penalty.count_bytes() == 4 * (50 * 10 + 10)


class TestPlot:
    def test_plot(self):
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        x, y = data_of()
        callback = PACBayes(x, y, samples=5)
        with pytest.raises(ValueError, match="no information yet"):
            callback.plot()
        fit(network(), callback, x, y, epochs=3)
        axis = callback.plot()
        (image,) = axis.get_images()
        np.testing.assert_array_equal(image.get_array(), callback.information.T)
        labels = [label.get_text() for label in axis.get_yticklabels()]
        assert labels == ["dense", "dense_1"]
        assert axis.get_xlabel() == "epoch"
        _, own = pyplot.subplots()
        assert callback.plot(own) is own
        axis.figure.canvas.draw()
        pyplot.close("all")

    def test_without_matplotlib(self, monkeypatch):
        x, y = data_of()
        callback = PACBayes(x, y, samples=5)
        fit(network(), callback, x, y, epochs=1)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError, match="pip install matplotlib"):
            callback.plot()


class TestBadInput:
    @pytest.mark.parametrize(
        "arguments, error, match",
        [
            ({"strength": -1.0}, ValueError, "`strength` must be finite"),
            ({"strength": "0.1"}, TypeError, "`strength` must be a number"),
            ({"strength": float("nan")}, ValueError, "`strength` must be"),
            ({"strength": "much"}, TypeError, "`strength` must be a number"),
            ({"head_strength": -1}, ValueError, "`head_strength`"),
            ({"samples": 0}, ValueError, "`samples` must be at least 1"),
            ({"samples": 1.5}, TypeError, "`samples` must be an integer"),
            ({"every": 0}, ValueError, "`every` must be at least 1"),
            ({"every": "batch"}, TypeError, 'an integer or "epoch"'),
            ({"mode": "cubic"}, ValueError, "`mode` must be one of"),
            ({"reference": "last"}, ValueError, "`reference` must be one"),
            ({"blocks": "layer"}, ValueError, "`blocks` must be one of"),
            ({"reduction": "max"}, ValueError, "`reduction` must be one"),
            ({"seed": -1}, ValueError, "`seed` must be in the range"),
            ({"chunk_size": 0}, ValueError, "`chunk_size` must be at least"),
            ({"chunk_size": "all"}, TypeError, "an integer or None"),
            ({"y": zoo.normal(11, 1)}, ValueError, "12 in `x`, 11 in `y`"),
            ({"sample_weight": np.ones(3)}, ValueError, "3 in `sample_wei"),
            ({"x": np.ones(())}, ValueError, "an axis of examples"),
            ({"x": np.ones((0, 3)), "y": None}, ValueError, "at least one"),
            ({"x": 3.0}, TypeError, "`x` must be arrays"),
            ({"x": iter(())}, ValueError, "`y` goes with arrays only"),
        ],
    )
    def test_arguments(self, arguments, error, match):
        x, y = data_of()
        with pytest.raises(error, match=match):
            PACBayes(**{"x": x, "y": y, **arguments})

    def test_models(self):
        x, y = data_of()
        model = network(head=False)
        with pytest.raises(ValueError, match="`head_strength` is for the"):
            fit(model, PACBayes(x, y, head_strength=1.0), x, y)
        assert not attachments(model)
        with pytest.raises(ValueError, match="at work already"):
            model.fit(x, y, callbacks=[PACBayes(x, y), PACBayes(x, y)])
        assert not attachments(model)
        callback = PACBayes(x, y, samples=5)
        fit(model, callback, x, y, epochs=1)
        with pytest.raises(ValueError, match="for another model"):
            fit(network(), callback, x, y)
        with kra.disabled(model):
            with pytest.raises(ValueError, match="inside a `disabled` block"):
                fit(model, callback, x, y)
        kra.set_active(model, [])
        with pytest.raises(ValueError, match="no active adapter"):
            callback.set_model(model)
        kra.eject(model)
        model.compile("sgd", "mse")
        with pytest.raises(ValueError, match="no adapter attached"):
            fit(model, callback, x, y)

    def test_switched_while_training(self):
        x, y = data_of()
        model = network()
        callback = PACBayes(x, y, samples=5)
        callback.set_model(model)
        callback.on_train_begin()
        callback.on_epoch_begin(0)
        kra.set_active(model, [])
        with pytest.raises(RuntimeError, match="switched or removed"):
            callback.on_epoch_begin(1)

    @pytest.mark.every_backend
    @pytest.mark.cpu_seconds(10, reason="a process of its own")
    def test_several_devices(self):
        x, y = data_of()
        if BACKEND == "torch":
            from torch.nn.parallel import DistributedDataParallel

            # Without a process group there is no better one.
            model = object.__new__(DistributedDataParallel)
            with pytest.raises(ValueError, match="DistributedDataParallel"):
                PACBayes(x, y).set_model(model)
            return
        program = SEVERAL_DEVICES[BACKEND]
        result = subprocess.run(
            [sys.executable, "-c", program],
            env={
                **os.environ,
                "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            },
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr[-3000:]


SEVERAL_DEVICES = {
    "jax": """
import keras
import numpy as np

import keras_randadapt as kra
from tests import zoo

found = []
for several in (False, True):
    if several:
        devices = keras.distribution.list_devices()
        assert len(devices) == 4
        keras.distribution.set_distribution(
            keras.distribution.DataParallel(devices=devices)
        )
    model, x, targets = zoo.dense()
    kra.inject(model, kra.RLoRA(5), targets)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    y = zoo.normal(8, 6, seed=1)
    callback = kra.callbacks.PACBayes(x, y, samples=6, strength=1.0)
    history = model.fit(
        x, y, batch_size=8, epochs=3, verbose=0, callbacks=[callback]
    )
    found.append((history.history["loss"], callback.information))
assert found[0][1][-1] > 0
for a, b in zip(*found):
    np.testing.assert_allclose(a, b, rtol=1e-4)
""",
    "tensorflow": """
import tensorflow as tf

(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(
    cpu, [tf.config.LogicalDeviceConfiguration()] * 2
)
import keras_randadapt as kra
from tests import zoo

with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    model, x, targets = zoo.dense()
    model.compile("sgd", "mse")
    kra.inject(model, kra.LoRA(2), targets)
callback = kra.callbacks.PACBayes(x, x[:, :6])
try:
    model.fit(x, x[:, :6], callbacks=[callback])
    raise AssertionError("no error")
except ValueError as error:
    assert "2 replicas" in str(error), error
""",
}
