"""DyLoRA: every rank is a LoRA, and steps draw ranks."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from tests import gradients
from tests import methods
from tests import zoo
from tests.methods import site_of
from tests.ops.test_counter import reference_words

pytestmark = pytest.mark.one_backend


def reference_rank(seed, step, smallest, largest):
    (word,) = reference_words(seed, 0, step, 1)
    return smallest + int(word) % 2**31 % (largest - smallest + 1)


def _built(view=(7, 9), rank=4, step=0, **arguments):
    adapter = kra.DyLoRA(rank, seed=3, **arguments)
    adapter.build_at(site_of(view))
    _set_step(adapter, step)
    return adapter


def _set_step(adapter, step):
    adapter.step_counter.assign(step)


def _dense(adapter, values, rank):
    """The LoRA of the first `rank` ranks, at scale alpha / rank."""
    a, b = values["lora_a"][:, :rank], values["lora_b"][:rank]
    return adapter.scaling * adapter.rank / rank * a @ b


def _step_of_rank(adapter, rank):
    step = next(
        step
        for step in range(100)
        if reference_rank(adapter.seed, step, adapter.min_rank, adapter.rank)
        == rank
    )
    _set_step(adapter, step)


def _adapted(compile=True, **arguments):
    x = zoo.normal(8, 7)
    inputs = keras.Input((7,))
    hidden = keras.layers.Dense(6, activation="tanh", name="one")(inputs)
    hidden = keras.layers.Dense(6, activation="tanh", name="two")(hidden)
    outputs = keras.layers.Dense(5, name="three")(hidden)
    model = zoo.set_weights(keras.Model(inputs, outputs))
    kra.inject(model, kra.DyLoRA(4, **arguments), ["one", "three"])
    zoo.randomize(model)
    if compile:
        model.compile(keras.optimizers.SGD(0.1), "mse")
    return model, x, zoo.normal(8, 5, seed=1)


def _values(model):
    return [methods.numpy(v) for v in model.trainable_variables]


class TestDyLoRA:
    def test_inference_is_lora_of_the_full_rank(self):
        adapter = _built(alpha=6)
        values = methods.randomize(adapter)
        methods.check_products(adapter, _dense(adapter, values, 4))

    @pytest.mark.every_backend
    @pytest.mark.parametrize("frozen", [False, True])
    @pytest.mark.parametrize("rank", [1, 2, 3, 4])
    def test_a_training_step_is_lora_of_the_drawn_rank(self, rank, frozen):
        adapter = _built(alpha=6, frozen=frozen)
        values = methods.randomize(adapter)
        _step_of_rank(adapter, rank)
        dense = _dense(adapter, values, rank)
        tensor = keras.ops.convert_to_tensor
        x, z = zoo.normal(3, 7), zoo.normal(3, 9)
        ids = zoo.integers(5, high=7)
        methods.close(adapter.delta(tensor(x), training=True), x @ dense)
        methods.close(
            adapter.delta_transpose(tensor(z), training=True), z @ dense.T
        )
        methods.close(
            adapter.lookup(tensor(ids), "float32", training=True), dense[ids]
        )
        methods.close(adapter.training_delta_kernel(), dense)

    @pytest.mark.every_backend
    @pytest.mark.parametrize("frozen", [False, True])
    def test_gradients(self, frozen):
        rank = 3
        adapter = _built(scaling=0.5, frozen=frozen)
        values = methods.randomize(adapter)
        _step_of_rank(adapter, rank)
        x, upstream = zoo.normal(6, 7), zoo.normal(6, 9, seed=4)
        found = gradients.gradients(
            lambda x: adapter.delta(x, True),
            x,
            [adapter.lora_a, adapter.lora_b],
            upstream,
        )
        dense = _dense(adapter, values, rank)
        methods.close(found[0], upstream @ dense.T, 2e-5)
        scale = 0.5 * 4 / rank
        of_kernel = x.T.astype("float64") @ upstream
        expected = [
            scale * of_kernel @ values["lora_b"].T,
            scale * values["lora_a"].T @ of_kernel,
        ]
        trained = np.arange(4) < rank
        if frozen:
            trained = np.arange(4) == rank - 1
        expected[0][:, ~trained] = 0
        expected[1][~trained] = 0
        for got, want in zip(found[1:], expected):
            methods.close(got, want, 2e-5)

    def test_ranks_are_uniform(self):
        """Chi-square with 2 degrees of freedom, 99.9 % quantile."""
        adapter = _built(rank=6, min_rank=4)
        drawn = []
        for step in range(600):
            _set_step(adapter, step)
            drawn.append(int(methods.numpy(adapter.drawn_rank())))
            assert drawn[-1] == reference_rank(3, step, 4, 6)
        counts = np.bincount(drawn, minlength=7)[4:]
        assert counts.sum() == 600
        assert ((counts - 200) ** 2 / 200).sum() < 13.8

    @pytest.mark.every_backend
    def test_ranks_of_a_distribution(self):
        """The paper's `p_B`, by the inverse of its cumulative sum."""
        probabilities = [0, 1, 0, 5, 2, 0]
        adapter = _built(rank=7, min_rank=2, probabilities=probabilities)
        cumulative = np.cumsum(probabilities) / 8
        drawn = []
        for step in range(60):
            _set_step(adapter, step)
            (word,) = reference_words(3, 0, step, 1)
            uniform = int(word) % 2**31 / 2**31
            expected = 2 + np.searchsorted(cumulative, uniform, side="right")
            assert int(adapter.drawn_rank()) == expected
            drawn.append(expected)
        assert set(drawn) == {3, 5, 6}

    @pytest.mark.parametrize(
        "probabilities", [[1, 2], [0, 0, 0, 0], [1, 1, 1, -1]]
    )
    def test_bad_distributions(self, probabilities):
        with pytest.raises(ValueError, match="`probabilities` must"):
            kra.DyLoRA(4, probabilities=probabilities)

    def test_config_of_a_distribution(self):
        adapter = kra.DyLoRA(3, probabilities=(1, 2, 4))
        clone = kra.DyLoRA.from_config(adapter.get_config())
        assert clone.probabilities == [1.0, 2.0, 4.0]
        assert "probabilities" not in kra.DyLoRA(3).get_config()

    def test_all_sites_of_a_step_draw_one_rank(self):
        """Plain `fit`: the n-th step trains what the n-th draw says."""
        model, x, y = _adapted(seed=11)
        for step in range(1, 6):
            before = _values(model)
            model.fit(x, y, batch_size=8, verbose=0)
            after = _values(model)
            rank = reference_rank(11, step, 1, 4)
            for i, (b, a) in enumerate(zip(before, after)):
                moved = np.any(b != a, axis=i % 2)
                np.testing.assert_array_equal(moved, np.arange(4) < rank)

    def test_a_layer_that_is_called_twice_draws_once(self):
        inputs = keras.Input((6,))
        shared = keras.layers.Dense(6, name="shared")
        model = keras.Model(inputs, shared(shared(inputs)))
        zoo.set_weights(model)
        kra.inject(model, kra.DyLoRA(4, seed=5), "shared")
        zoo.randomize(model)
        (adapter,) = model._randadapt.adapters("default").values()
        x = zoo.normal(8, 6)
        got = methods.numpy(model(x, training=True))
        values = {
            v.name: methods.numpy(v).astype("float64")
            for v in adapter.trainable_variables
        }
        delta = _dense(adapter, values, reference_rank(5, 1, 1, 4))
        kernel = methods.numpy(shared._kernel) + delta
        bias = methods.numpy(shared.bias)
        methods.close(got, (x @ kernel + bias) @ kernel + bias)

    def test_inference_counts_nothing(self):
        model, x, y = _adapted()
        model.predict(x, verbose=0)
        model(x)
        model.evaluate(x, y, verbose=0)
        (counter,) = model._randadapt.step_counters()
        assert methods.numpy(counter) == 0
        model.fit(x, y, epochs=3, batch_size=4, verbose=0)
        assert methods.numpy(counter) == 6

    @pytest.mark.every_backend
    def test_nothing_is_traced_anew_for_a_rank(self):
        traces = []

        @keras.saving.register_keras_serializable(package="tests")
        class Counting(keras.layers.Layer):
            def call(self, x):
                traces.append(1)
                return x

        inputs = keras.Input((7,))
        outputs = keras.layers.Dense(5, name="site")(Counting()(inputs))
        model = keras.Model(inputs, outputs)
        kra.inject(model, kra.DyLoRA(4), "site")
        model.compile("sgd", "mse")
        x, y = zoo.normal(8, 7), zoo.normal(8, 5)
        model.fit(x, y, batch_size=8, verbose=0)
        first = len(traces)
        model.fit(x, y, batch_size=8, epochs=8, verbose=0)
        more = 8 if keras.config.backend() == "torch" else 0
        assert len(traces) == first + more

    def test_convolutions_draw_ranks_too(self):
        model, x, targets = zoo.conv2d_strided()
        kra.inject(model, kra.DyLoRA(4, seed=6), targets)
        zoo.randomize(model)
        first = methods.numpy(model(x, training=True))
        (counter,) = model._randadapt.step_counters()
        again = reference_rank(6, 1, 1, 4)
        assert again != 4
        full = methods.numpy(model(x, training=False))
        assert np.abs(first - full).max() > 1e-3
        report = kra.truncate(model, again)
        assert report.method == "LoRA"
        methods.close(model(x, training=False), first)

    @pytest.mark.parametrize("rank", [1, 3, 4])
    def test_truncate(self, rank):
        model, x, y = _adapted(alpha=6)
        adapters = list(model._randadapt.adapters("default").values())
        expected = [
            _dense(
                adapter,
                {
                    v.name: methods.numpy(v).astype("float64")
                    for v in adapter.trainable_variables
                },
                rank,
            )
            for adapter in adapters
        ]
        report = kra.truncate(model, rank)
        assert report.adapter_parameters == rank * (7 + 6 + 6 + 5)
        cut = model._randadapt.adapters("default").values()
        for adapter, dense in zip(cut, expected):
            assert type(adapter) is kra.LoRA and adapter.rank == rank
            methods.close(adapter.delta_kernel(), dense)

    def test_truncate_out_of_range(self):
        model, x, _ = _adapted(min_rank=2)
        before = zoo.outputs(model, x)
        for rank in (1, 5):
            with pytest.raises(ValueError, match="must be from 2 to 4"):
                kra.truncate(model, rank)
        with pytest.raises(TypeError, match="`rank` must be an integer"):
            kra.truncate(model, 2.5)
        np.testing.assert_array_equal(zoo.outputs(model, x), before)

    def test_resumes_from_a_checkpoint(self, tmp_path):
        model, x, y = _adapted(seed=11)
        model.fit(x, y, epochs=3, verbose=0)
        model.save(tmp_path / "model.keras")
        model.save_weights(tmp_path / "model.weights.h5")
        model.fit(x, y, epochs=3, verbose=0)
        loaded = keras.models.load_model(tmp_path / "model.keras")
        fresh, _, _ = _adapted(seed=11)
        fresh.load_weights(tmp_path / "model.weights.h5")
        for again in (loaded, fresh):
            again.fit(x, y, epochs=3, verbose=0)
            for one, two in zip(_values(model), _values(again)):
                np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-7)

    def test_the_count_is_in_no_adapter_file(self, tmp_path):
        model, x, y = _adapted()
        model.fit(x, y, epochs=2, verbose=0)
        kra.save_adapter(model, tmp_path / "file")
        out = zoo.outputs(model, x)
        kra.eject(model)
        kra.load_adapter(model, tmp_path / "file")
        np.testing.assert_array_equal(zoo.outputs(model, x), out)
        (counter,) = model._randadapt.step_counters()
        assert methods.numpy(counter) == 0

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="`min_rank` must be at most 4"):
            kra.DyLoRA(4, min_rank=5)
        with pytest.raises(ValueError, match="`min_rank` must be at least 1"):
            kra.DyLoRA(4, min_rank=0)

    def test_config_round_trip(self):
        config = kra.DyLoRA(7, min_rank=2, frozen=True, alpha=14).get_config()
        assert kra.DyLoRA.from_config(config).get_config() == config
