"""Programs that Keras compiled are found again after a switch and back."""

import contextlib

import keras
import numpy as np
import pytest
from keras import layers

import keras_randadapt as kra
from tests import zoo

pytestmark = pytest.mark.needs_optimizer

BACKEND = keras.config.backend()
X, Y = zoo.normal(8, 4), zoo.normal(8, 6, seed=1)


class _CountsCalls(layers.Layer):
    """How often Python, and not a compiled program, ran it."""

    calls = 0
    factor = 1.0

    def call(self, x):
        self.calls += 1
        return self.factor * x


def _model(*names):
    keras.utils.set_random_seed(0)
    counter = _CountsCalls()
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(6, name="site"), counter]
    )
    model.compile(keras.optimizers.SGD(0.1), "mse")
    for i, name in enumerate(names):
        # Equal shapes, and bases that are constants of the program.
        kra.inject(model, kra.RLoRA(3, seed=i), "site", name=name)
        zoo.randomize(model, name, seed=i)
    return model, counter


def _reference(model, x):
    """What the model computes now, by no compiled program."""
    return np.array(keras.ops.convert_to_numpy(model(x, training=False)))


def _loss(model, x, y):
    return np.mean((_reference(model, x) - y) ** 2)


compiles = pytest.mark.skipif(
    BACKEND == "torch", reason="Keras compiles nothing on torch by default"
)


class TestSwitch:
    @compiles
    @pytest.mark.parametrize("step", ["predict", "evaluate"])
    def test_compiles_once_for_each_adapter(self, step):
        model, counter = _model("a", "b")

        def run():
            if step == "predict":
                return model.predict(X, verbose=0)
            return model.evaluate(X, Y, verbose=0)

        active = ["a", "b", ["a", "b"], []]
        first = {}
        for names in active:
            kra.set_active(model, names)
            first[str(names)] = run()
        calls = counter.calls
        assert calls >= len(active)
        for names in [*active, *reversed(active)]:
            kra.set_active(model, names)
            np.testing.assert_array_equal(run(), first[str(names)])
        assert counter.calls == calls

    @compiles
    def test_files_loaded_under_one_name(self, tmp_path):
        model, counter = _model("a")
        expected = {}
        for seed in (1, 2):
            zoo.randomize(model, "a", seed=seed)
            kra.save_adapter(model, tmp_path / f"{seed}.safetensors")
            expected[seed] = model.predict(X, verbose=0)
        calls = counter.calls
        for seed in (1, 2, 1):
            kra.load_adapter(model, tmp_path / f"{seed}.safetensors", "a")
            np.testing.assert_array_equal(
                model.predict(X, verbose=0), expected[seed]
            )
        assert counter.calls == calls

    def test_evaluate(self):
        """On JAX one bound method is compiled for all of them."""
        model, _ = _model("a", "b")
        losses = set()
        for names in ("a", "b", ["a", "b"], [], "b", "a"):
            kra.set_active(model, names)
            loss = model.evaluate(X, Y, verbose=0)
            np.testing.assert_allclose(loss, _loss(model, X, Y), rtol=1e-5)
            losses.add(round(loss, 6))
        assert len(losses) == 4

    def test_new_values_are_seen(self):
        """Also if they were set while another adapter was active."""
        model, _ = _model("a", "b")
        kra.set_active(model, "a")
        before = model.predict(X, verbose=0)
        kra.set_active(model, "b")
        model.predict(X, verbose=0)
        zoo.randomize(model, "a", seed=7)
        kra.set_active(model, "a")
        after = model.predict(X, verbose=0)
        assert np.abs(after - before).max() > 1e-3
        np.testing.assert_allclose(
            after, _reference(model, X), rtol=1e-5, atol=1e-6
        )

    def test_after_training(self):
        model, _ = _model("a", "b")
        for name in "abab":
            kra.set_active(model, name)
            before = model.predict(X, verbose=0)
            model.fit(X, Y, verbose=0)
            after = model.predict(X, verbose=0)
            assert np.abs(after - before).max() > 1e-4
            np.testing.assert_allclose(
                after, _reference(model, X), rtol=1e-5, atol=1e-6
            )

    @pytest.mark.cpu_seconds(20, reason="PyTorch's compiler starts in 8 s")
    @pytest.mark.skipif(BACKEND != "torch", reason="torch.compile")
    def test_torch_compile(self):
        import torch

        # Without the layer that counts, in which the compiler gives up.
        model = keras.Sequential(
            [keras.Input((4,)), layers.Dense(6, name="site")]
        )
        for i, name in enumerate(("a", "b")):
            kra.inject(model, kra.RLoRA(3, seed=i), "site", name=name)
            zoo.randomize(model, name, seed=i)
        compilations = []

        def backend(graph, inputs):
            compilations.append(graph)
            return graph.forward

        function = torch.compile(
            lambda x: model(x, training=False), backend=backend
        )
        x = torch.from_numpy(X)
        with torch.no_grad():
            for names in ("a", "b", []):
                kra.set_active(model, names)
                function(x)
            compiled = len(compilations)
            for names in ("b", [], "a", "b", "a"):
                kra.set_active(model, names)
                np.testing.assert_allclose(
                    function(x).numpy(),
                    _reference(model, X),
                    rtol=1e-5,
                    atol=1e-6,
                )
        assert len(compilations) == compiled


class TestBlocks:
    @compiles
    @pytest.mark.parametrize("block", [kra.disabled, kra.merged])
    def test_compiles_once(self, block):
        model, counter = _model("a")

        def outputs():
            adapted = model.predict(X, verbose=0)
            with block(model):
                inside = model.predict(X, verbose=0)
            return adapted, inside

        expected = outputs()
        calls = counter.calls
        for _ in range(3):
            np.testing.assert_array_equal(outputs(), expected)
        assert counter.calls == calls

    def test_blocks_do_not_mix(self):
        model, _ = _model("a", "b")
        with kra.disabled(model):
            base = _reference(model, X)
        for _ in range(2):
            for names in ("a", ["a", "b"], []):
                kra.set_active(model, names)
                adapted = model.predict(X, verbose=0)
                with kra.merged(model):
                    np.testing.assert_allclose(
                        model.predict(X, verbose=0), adapted, atol=1e-5
                    )
                with kra.disabled(model):
                    np.testing.assert_allclose(
                        model.predict(X, verbose=0), base, atol=1e-6
                    )

    @compiles
    def test_compiles_once_beside_each_adapter(self):
        model, counter = _model("a", "b")

        def run():
            for name in ("a", "b"):
                kra.set_active(model, name)
                model.predict(X, verbose=0)
                with kra.disabled(model):
                    model.predict(X, verbose=0)

        run()
        calls = counter.calls
        run()
        assert counter.calls == calls

    def test_evaluate(self):
        model, _ = _model("a", "b")
        for name in ("a", "b", "a"):
            kra.set_active(model, name)
            adapted = _loss(model, X, Y)
            for block in (None, kra.disabled, kra.merged, None):
                with block(model) if block else contextlib.nullcontext():
                    np.testing.assert_allclose(
                        model.evaluate(X, Y, verbose=0),
                        _loss(model, X, Y),
                        rtol=1e-5,
                    )
                    if block is kra.disabled:
                        assert abs(_loss(model, X, Y) - adapted) > 1e-3

    def test_evaluate_in_callbacks(self):
        """While `fit` keeps the functions that it validates with."""
        model, _ = _model("a")
        seen = []

        def look(epoch, logs):
            with kra.disabled(model):
                off = model.evaluate(X, Y, verbose=0), _loss(model, X, Y)
            with kra.merged(model):
                folded = model.evaluate(X, Y, verbose=0), _loss(model, X, Y)
            on = model.evaluate(X, Y, verbose=0), _loss(model, X, Y)
            seen.append((off, folded, on, (logs["val_loss"], on[1])))

        model.fit(
            X,
            Y,
            epochs=3,
            verbose=0,
            validation_data=(X, Y),
            callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=look)],
        )
        assert len(seen) == 3
        for pairs in seen:
            for got, expected in pairs:
                np.testing.assert_allclose(got, expected, rtol=1e-5)
            assert abs(pairs[0][0] - pairs[2][0]) > 1e-3

    @compiles
    def test_compiles_once_in_callbacks(self):
        """Every epoch, beside the program that trains."""
        model, counter = _model("a")
        calls = []

        def look(epoch, logs):
            with kra.disabled(model):
                model.predict(X, verbose=0)
            model.predict(X, verbose=0)
            calls.append(counter.calls)

        callback = keras.callbacks.LambdaCallback(on_epoch_end=look)
        model.fit(X, Y, epochs=4, verbose=0, callbacks=[callback])
        assert len(set(calls)) == 1


class TestForgets:
    """What was compiled for a model that is no longer so."""

    def test_other_adapters(self):
        model, _ = _model("a", "b")
        kra.set_active(model, "b")
        model.predict(X, verbose=0)
        kra.set_active(model, "a")
        kra.eject(model, "b")
        kra.inject(model, kra.RLoRA(3, seed=9), "site", name="b")
        kra.set_active(model, "b")
        zoo.randomize(model, "b", seed=1)
        np.testing.assert_allclose(
            model.predict(X, verbose=0),
            _reference(model, X),
            rtol=1e-5,
            atol=1e-6,
        )

    def test_ejected_adapters_are_let_go(self):
        model, _ = _model("a", "b")
        model.predict(X, verbose=0)
        kra.set_active(model, "b")
        kra.eject(model, "b")
        assert model._randadapt.functions._kept == {}

    @compiles
    def test_compile(self):
        model, counter = _model("a", "b")
        kra.set_active(model, "a")
        model.predict(X, verbose=0)
        kra.set_active(model, "b")
        model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
        kra.set_active(model, "a")
        calls = counter.calls
        model.predict(X, verbose=0)
        model.predict(X, verbose=0)
        assert counter.calls >= calls + 2

    def test_compile_from_config(self):
        model, _ = _model("a", "b")
        kra.set_active(model, "b")
        model.evaluate(X, Y, verbose=0)
        kra.set_active(model, "a")
        config = model.get_compile_config()
        model.compile_from_config({**config, "loss": "mae"})
        kra.set_active(model, "b")
        np.testing.assert_allclose(
            model.evaluate(X, Y, verbose=0),
            np.mean(np.abs(_reference(model, X) - Y)),
            rtol=1e-5,
        )

    @pytest.mark.parametrize("step", ["predict", "test"])
    def test_forced(self, step):
        """After a change of the model that only the user knows of."""
        model, counter = _model("a", "b")

        def run():
            if step == "predict":
                return np.mean((model.predict(X, verbose=0) - Y) ** 2)
            return model.evaluate(X, Y, verbose=0)

        for name in ("a", "b"):
            kra.set_active(model, name)
            run()
        counter.factor = 3.0
        getattr(model, f"make_{step}_function")(force=True)
        for name in ("b", "a"):
            kra.set_active(model, name)
            np.testing.assert_allclose(run(), _loss(model, X, Y), rtol=1e-5)

    def test_a_limit(self):
        model, _ = _model(*(f"a{i}" for i in range(20)))
        for i in range(20):
            kra.set_active(model, f"a{i}")
            model.predict(X, verbose=0)
        assert len(model._randadapt.functions._kept) == 16
        kra.set_active(model, "a0")
        np.testing.assert_allclose(
            model.predict(X, verbose=0),
            _reference(model, X),
            rtol=1e-5,
            atol=1e-6,
        )
