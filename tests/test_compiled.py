"""Programs that Keras compiled are found again after a switch and back."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_randadapt as kra
from tests import zoo

BACKEND = keras.config.backend()


class _CountsCalls(layers.Layer):
    """How often Python, and not a compiled program, ran it."""

    calls = 0

    def call(self, x):
        self.calls += 1
        return x


def _model(*names):
    counter = _CountsCalls()
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(6, name="site"), counter]
    )
    model.compile(keras.optimizers.SGD(0.1), "mse")
    for i, name in enumerate(names):
        adapter = kra.LoRA(2, seed=i) if i % 2 else kra.RLoRA(3, seed=i)
        kra.inject(model, adapter, "site", name=name)
        zoo.randomize(model, name)
    return model, counter


def _reference(model, x):
    """What the model computes now, by no compiled program."""
    return np.array(keras.ops.convert_to_numpy(model(x, training=False)))


compiles = pytest.mark.skipif(
    BACKEND == "torch", reason="Keras compiles nothing on torch by default"
)


class TestSwitch:
    @compiles
    @pytest.mark.parametrize("step", ["predict", "evaluate"])
    def test_compiles_once_for_each_adapter(self, step):
        model, counter = _model("a", "b")
        x, y = zoo.normal(8, 4), zoo.normal(8, 6, seed=1)

        def run():
            if step == "predict":
                return model.predict(x, verbose=0)
            return model.evaluate(x, y, verbose=0)

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
        x = zoo.normal(8, 4)
        expected = {}
        for seed in (1, 2):
            zoo.randomize(model, "a", seed=seed)
            kra.save_adapter(model, tmp_path / f"{seed}.safetensors")
            expected[seed] = model.predict(x, verbose=0)
        calls = counter.calls
        for seed in (1, 2, 1):
            kra.load_adapter(model, tmp_path / f"{seed}.safetensors", "a")
            np.testing.assert_array_equal(
                model.predict(x, verbose=0), expected[seed]
            )
        assert counter.calls == calls

    def test_new_values_are_seen(self):
        """Also if they were set while another adapter was active."""
        model, _ = _model("a", "b")
        x = zoo.normal(8, 4)
        kra.set_active(model, "a")
        before = model.predict(x, verbose=0)
        kra.set_active(model, "b")
        model.predict(x, verbose=0)
        zoo.randomize(model, "a", seed=7)
        kra.set_active(model, "a")
        after = model.predict(x, verbose=0)
        assert np.abs(after - before).max() > 1e-3
        np.testing.assert_allclose(
            after, _reference(model, x), rtol=1e-5, atol=1e-6
        )

    def test_after_training(self):
        model, _ = _model("a", "b")
        x = zoo.normal(8, 4)
        for name in "abab":
            kra.set_active(model, name)
            before = model.predict(x, verbose=0)
            model.fit(x, zoo.normal(8, 6, seed=1), verbose=0)
            after = model.predict(x, verbose=0)
            assert np.abs(after - before).max() > 1e-4
            np.testing.assert_allclose(
                after, _reference(model, x), rtol=1e-5, atol=1e-6
            )

    def test_torch_compile(self):
        if BACKEND != "torch":
            pytest.skip("of torch alone")
        import torch

        model, _ = _model("a", "b")
        compilations = []

        def backend(graph, inputs):
            compilations.append(graph)
            return graph.forward

        function = torch.compile(
            lambda x: model(x, training=False), backend=backend
        )
        x = torch.from_numpy(zoo.normal(8, 4))
        with torch.no_grad():
            for names in ("a", "b", []):
                kra.set_active(model, names)
                function(x)
            compiled = len(compilations)
            for names in ("b", [], "a", "b", "a"):
                kra.set_active(model, names)
                np.testing.assert_allclose(
                    function(x).numpy(),
                    _reference(model, x),
                    rtol=1e-5,
                    atol=1e-6,
                )
        assert len(compilations) == compiled


class TestBlocks:
    @compiles
    @pytest.mark.parametrize("block", [kra.disabled, kra.merged])
    def test_compiles_once(self, block):
        model, counter = _model("a")
        x = zoo.normal(8, 4)

        def outputs():
            adapted = model.predict(x, verbose=0)
            with block(model):
                inside = model.predict(x, verbose=0)
            return adapted, inside

        expected = outputs()
        calls = counter.calls
        for _ in range(3):
            np.testing.assert_array_equal(outputs(), expected)
        assert counter.calls == calls

    def test_blocks_do_not_mix(self):
        model, _ = _model("a", "b")
        x = zoo.normal(8, 4)
        with kra.disabled(model):
            base = _reference(model, x)
        for _ in range(2):
            for names in ("a", ["a", "b"], []):
                kra.set_active(model, names)
                adapted = model.predict(x, verbose=0)
                with kra.merged(model):
                    np.testing.assert_allclose(
                        model.predict(x, verbose=0), adapted, atol=1e-5
                    )
                with kra.disabled(model):
                    np.testing.assert_allclose(
                        model.predict(x, verbose=0), base, atol=1e-6
                    )

    @compiles
    def test_in_callbacks(self):
        """Every epoch, beside the program that trains."""
        model, counter = _model("a")
        x, y = zoo.normal(8, 4), zoo.normal(8, 6, seed=1)
        calls = []

        def look(epoch, logs):
            with kra.disabled(model):
                model.predict(x, verbose=0)
            model.predict(x, verbose=0)
            calls.append(counter.calls)

        callback = keras.callbacks.LambdaCallback(on_epoch_end=look)
        model.fit(x, y, epochs=4, verbose=0, callbacks=[callback])
        assert len(set(calls)) == 1


class TestForgets:
    """What was compiled for a model that is no longer so."""

    def test_other_adapters(self):
        model, _ = _model("a", "b")
        x = zoo.normal(8, 4)
        kra.set_active(model, "b")
        model.predict(x, verbose=0)
        kra.set_active(model, "a")
        kra.eject(model, "b")
        kra.inject(model, kra.LoRA(4, seed=9), "site", name="b")
        kra.set_active(model, "b")
        zoo.randomize(model, "b", seed=3)
        np.testing.assert_allclose(
            model.predict(x, verbose=0),
            _reference(model, x),
            rtol=1e-5,
            atol=1e-6,
        )

    def test_ejected_adapters_are_let_go(self):
        model, _ = _model("a", "b")
        model.predict(zoo.normal(8, 4), verbose=0)
        kra.set_active(model, "b")
        kra.eject(model, "b")
        assert model._randadapt.functions._kept == {}

    @compiles
    def test_compile(self):
        model, counter = _model("a", "b")
        x = zoo.normal(8, 4)
        kra.set_active(model, "a")
        model.predict(x, verbose=0)
        kra.set_active(model, "b")
        model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
        kra.set_active(model, "a")
        calls = counter.calls
        model.predict(x, verbose=0)
        model.predict(x, verbose=0)
        assert counter.calls >= calls + 2

    def test_a_limit(self):
        model, _ = _model(*(f"a{i}" for i in range(20)))
        x = zoo.normal(8, 4)
        for i in range(20):
            kra.set_active(model, f"a{i}")
            model.predict(x, verbose=0)
        assert len(model._randadapt.functions._kept) == 16
        kra.set_active(model, "a0")
        np.testing.assert_allclose(
            model.predict(x, verbose=0),
            _reference(model, x),
            rtol=1e-5,
            atol=1e-6,
        )

    def test_flags_that_changed(self):
        """On JAX they move variables to another argument."""
        model, _ = _model("a", "b")
        x = zoo.normal(8, 4)
        kra.set_active(model, "a")
        model.predict(x, verbose=0)
        kra.set_active(model, "b")
        model.predict(x, verbose=0)
        kra.set_active(model, "a")
        model.get_layer("site").trainable = False
        np.testing.assert_allclose(
            model.predict(x, verbose=0),
            _reference(model, x),
            rtol=1e-5,
            atol=1e-6,
        )
