"""What is special in attaching, switching and removing; `test_matrix.py` has
what holds everywhere."""

import concurrent.futures
import copy
import gc
import os
import subprocess
import sys
import threading
import time
import warnings

import keras
import numpy as np
import pytest
from keras import layers

import keras_randadapt as kra
from keras_randadapt.sites import layer as layer_lib
from keras_randadapt.sites import supported
from tests import zoo
from tests.methods import site_of

BACKEND = keras.config.backend()


def _numpy(x):
    return keras.ops.convert_to_numpy(x)


@keras.saving.register_keras_serializable(package="tests")
class _RowSums(kra.Adapter):
    """What a user may write: build, the delta, and no more."""

    def build(self, site):
        self.gains = self.add_trainable("gains", (site.output_dim,), "zeros")

    def delta(self, x, training=None):
        total = keras.ops.sum(x, axis=-1, keepdims=True)
        return total * keras.ops.cast(self.gains, x.dtype)

    def delta_kernel(self):
        return keras.ops.ones((self.input_dim, 1)) * self.gains


class TestMethodOfOnesOwn:
    def test_has_all_that_injection_gives(self, tmp_path):
        model, x, targets = zoo.classifier()
        kra.inject(model, _RowSums(), targets)
        zoo.fit(model, x)
        zoo.randomize(model)
        out = zoo.outputs(model, x)
        kra.save_adapter(model, tmp_path / "own.safetensors")
        kra.merge(model)
        np.testing.assert_allclose(
            zoo.outputs(model, x), out, rtol=1e-5, atol=1e-5
        )


class TestReport:
    def test_numbers_and_text(self):
        model, _, _ = zoo.bert_classifier()
        base = sum(np.prod(v.shape) for v in model.weights)
        report = kra.inject(
            model, kra.RLoRA(16), keep_trainable="logits", name="task"
        )
        assert report.method == "RLoRA" and report.name == "task"
        assert report.adapter_parameters == 4 * (16 + 8)
        assert report.head_parameters == 27
        assert report.base_parameters == base - 27
        text = str(report)
        for part in ("RLoRA 'task'", "96", "27", "KB"):
            assert part in text

    @pytest.mark.one_backend
    def test_bytes_of_a_quantized_base(self):
        model = keras.Sequential(
            [
                keras.Input((10,)),
                layers.Dense(7, name="site"),
                layers.Dense(3, name="head"),
            ]
        )
        model.get_layer("site").quantize("int8")
        report = kra.inject(model, kra.LoRA(2), "site", keep_trainable="head")
        # A byte a number, and seven scales and biases.
        assert report.base_bytes == 10 * 7 + 4 * (7 + 7)
        assert report.adapter_bytes == 4 * (2 * (10 + 7) + 7 * 3 + 3)
        assert report.optimizer_bytes is None
        model.compile(keras.optimizers.Adam(), "mse")
        model.fit(zoo.normal(4, 10), zoo.normal(4, 3), verbose=0)
        # Two moments a weight, and at least the count of steps.
        assert 0 < report.optimizer_bytes - 2 * report.adapter_bytes < 32
        for part in ("126 B", "232 B", "optimizer"):
            assert part in str(report)
        plain = kra.inject(zoo.sequential()[0], kra.LoRA(2), "all-linear")
        assert plain.base_bytes == 4 * plain.base_parameters
        assert "as stored" not in str(plain)

    @pytest.mark.parametrize("mode", ["int8", "int4", "float8", "int4 blocks"])
    def test_quantized_base_counts_as_the_float_one(self, mode):
        def build():
            ids = keras.Input((7,), dtype="int32")
            embedding = layers.ReversibleEmbedding(11, 6, tie_weights=False)
            x = embedding(ids)
            x = layers.EinsumDense(
                "abc,cde->abde", (None, 3, 5), bias_axes="de"
            )(x)
            x = layers.Reshape((7, 15))(x)
            x = layers.Dense(6, name="site")(x)
            head = layers.Dense(3, name="head")(x)
            return keras.Model(ids, [embedding(x, reverse=True), head])

        plain, model = build(), build()
        embeds = mode not in ("float8",)
        arguments = {"mode": mode}
        if mode == "int4 blocks":
            config = getattr(keras.quantizers, "Int4QuantizationConfig", None)
            if config is None:
                pytest.skip("This Keras has no blocks of int4 kernels.")
            arguments = {"config": config(block_size=2)}
        model.quantize(
            **arguments,
            filters=lambda layer: (
                layer.name not in ("site", "head")
                and (embeds or "embedding" not in layer.name)
            ),
        )
        counted = model.count_params()
        assert counted != plain.count_params()
        reports = [
            kra.inject(one, kra.LoRA(2), "site", keep_trainable="head")
            for one in (plain, model)
        ]
        assert reports[0].base_parameters == reports[1].base_parameters
        assert reports[0].keras_base_parameters == reports[0].base_parameters
        assert reports[1].keras_base_parameters == counted - 21
        assert "as Keras counts" not in str(reports[0])
        assert f"{counted - 21:,}" in str(reports[1])
        assert f"{reports[0].base_parameters:,}" in str(reports[1])

    def test_head_of_an_inactive_adapter(self):
        model, _, _ = zoo.bert_classifier()
        with pytest.warns(kra.AdapterWarning, match="'logits'"):
            kra.inject(model, kra.LoRA(2))
        report = kra.inject(
            model, kra.LoRA(2), keep_trainable="logits", name="b"
        )
        assert report.head_parameters == 27


class TestHeadsOfTasks:
    """A head that no one trains is random, so `inject` warns of it."""

    def test_warning(self):
        model, _, _ = zoo.bert_classifier()
        with pytest.warns(
            kra.AdapterWarning, match=r"Give `keep_trainable=\['logits'\]`"
        ):
            kra.inject(model, kra.LoRA(2))
        assert not model.get_layer("logits").trainable

    def test_head_that_another_adapter_keeps(self):
        model, _, _ = zoo.bert_classifier()
        kra.inject(model, kra.LoRA(2), keep_trainable="logits")
        kra.inject(model, kra.LoRA(2), "key", name="second")
        assert len(model._randadapt.records) == 2

    def test_head_without_the_first_adapter(self):
        model, _, _ = zoo.bert_classifier()
        kra.inject(model, kra.LoRA(2), keep_trainable="logits", name="first")
        kra.inject(model, kra.LoRA(2), keep_trainable="logits", name="second")
        kra.eject(model, "second")
        kra.set_active(model, "first")
        kra.eject(model)
        with pytest.warns(kra.AdapterWarning, match="The head of task"):
            kra.inject(model, kra.LoRA(2), "key")

    @pytest.mark.parametrize(
        "targets", ["logits", ["query", "logits"]], ids=str
    )
    def test_head_with_an_adapter(self, targets):
        model, _, _ = zoo.bert_classifier()
        assert kra.inject(model, kra.LoRA(2), targets).sites

    def test_head_that_is_frozen_by_the_user(self):
        model, _, _ = zoo.pretrained_classifier()
        assert kra.inject(model, kra.LoRA(2)).head_parameters == 0
        kra.inject(model, kra.LoRA(2), "key", name="second")

    def test_masked_language_model(self):
        import keras_hub

        model = keras_hub.models.BertMaskedLM(
            backbone=zoo.bert()[0], preprocessor=None
        )
        with pytest.warns(kra.AdapterWarning, match="'mlm_head'"):
            kra.inject(model, kra.LoRA(2))
        kra.eject(model)
        kra.inject(model, kra.LoRA(2), keep_trainable="mlm_head")

    @pytest.mark.parametrize("family", ["GPT2", "Llama"])
    def test_models_that_generate(self, family):
        """Their heads are in the preset, tied to the embedding or not."""
        import keras_hub

        backbone = {"GPT2": zoo.gpt2, "Llama": zoo.llama}[family]()[0]
        task = getattr(keras_hub.models, f"{family}CausalLM")
        model = task(backbone=backbone, preprocessor=None)
        assert kra.inject(model, kra.LoRA(2)).sites


class TestSeveralAdapters:
    def test_sum_of_active_adapters(self):
        model, x, targets = zoo.dense_no_bias()
        base = zoo.outputs(model, x)
        kra.inject(model, kra.LoRA(2), targets, name="a")
        kra.inject(model, kra.RLoRA(9, seed=4), targets, name="b")
        zoo.randomize(model, "a")
        zoo.randomize(model, "b")
        only = {}
        for name in ("a", "b"):
            kra.set_active(model, name)
            only[name] = zoo.outputs(model, x) - base
        kra.set_active(model, ["a", "b"])
        both = zoo.outputs(model, x) - base
        np.testing.assert_allclose(both, only["a"] + only["b"], atol=1e-5)
        with kra.merged(model):
            np.testing.assert_allclose(
                zoo.outputs(model, x), base + both, atol=1e-5
            )
        kra.set_active(model, [])
        np.testing.assert_array_equal(zoo.outputs(model, x), base)
        kra.set_active(model, ["a", "b"])
        kra.merge(model)
        np.testing.assert_allclose(
            zoo.outputs(model, x), base + both, atol=1e-5
        )

    def test_different_sites(self):
        model, x, _ = zoo.sequential()
        kra.inject(model, kra.LoRA(2), lambda d: d.units == 8, name="a")
        kra.inject(model, kra.LoRA(3), "all-linear", name="b")
        assert len(kra.sites(model)) == 3
        kra.eject(model, "b")
        assert len(kra.sites(model)) == 1
        kra.eject(model)
        assert kra.sites(model) == {}

    def test_only_active_adapters_are_trained(self):
        model, x, targets = zoo.dense()
        kra.inject(model, kra.LoRA(2), targets, name="a")
        kra.inject(model, kra.LoRA(2), targets, name="b")
        kra.set_active(model, "b")
        paths = [v.path for v in model.trainable_variables]
        assert paths == ["site/adapter/b/lora_a", "site/adapter/b/lora_b"]
        zoo.randomize(model, "a")
        before = {v.path: _numpy(v) for v in model.variables}
        zoo.fit(model, x)
        for v in model.variables:
            changed = np.any(_numpy(v) != before[v.path])
            assert changed == ("adapter/b" in v.path), v.path
        kra.set_active(model, ["a", "b"])
        assert len(model.trainable_variables) == 4

    def test_each_has_a_head_of_its_own(self):
        model, x, _ = zoo.classifier()
        base = zoo.outputs(model, x)
        kra.inject(model, kra.LoRA(2), keep_trainable="logits", name="a")
        zoo.fit(model, x)
        of_a = zoo.outputs(model, x)
        kra.inject(model, kra.LoRA(2), keep_trainable="logits", name="b")
        np.testing.assert_array_equal(zoo.outputs(model, x), of_a)
        kra.set_active(model, "b")
        # b is untrained: the base model, head included.
        np.testing.assert_allclose(zoo.outputs(model, x), base, atol=1e-6)
        zoo.fit(model, x, optimizer=keras.optimizers.Adam(0.2))
        of_b = zoo.outputs(model, x)
        assert np.abs(of_b - of_a).max() > 1e-3
        with pytest.raises(
            ValueError, match="only one can be active.*heads_from"
        ):
            kra.set_active(model, ["a", "b"])
        kra.set_active(model, "a")
        np.testing.assert_array_equal(zoo.outputs(model, x), of_a)
        kra.set_active(model, "b")
        np.testing.assert_array_equal(zoo.outputs(model, x), of_b)
        kra.merge(model)
        np.testing.assert_allclose(zoo.outputs(model, x), of_b, atol=1e-5)

    def test_a_head_outlives_its_adapter(self, tmp_path):
        """The head of one that is gone is again what the base model has."""
        model, x = zoo.sequential()[:2]
        head = model.layers[-1]
        kept = dict(keep_trainable=head.name)
        first = model.layers[0].name
        kra.inject(model, kra.LoRA(2), first, name="a", **kept)
        kra.inject(model, kra.LoRA(2), first, name="b")
        kra.eject(model, "a")
        model.save(tmp_path / "x.keras")
        keras.models.load_model(tmp_path / "x.keras")
        head.set_weights([w + 1 for w in head.get_weights()])
        kra.set_active(model, [])
        expected = zoo.outputs(model, x)
        kra.inject(model, kra.LoRA(2), first, name="c", **kept)
        kra.set_active(model, "c")
        np.testing.assert_allclose(zoo.outputs(model, x), expected, atol=1e-6)
        # Nor is it stale while "c" is there, but waits.
        kra.set_active(model, [])
        head.set_weights([w + 1 for w in head.get_weights()])
        expected = zoo.outputs(model, x)
        kra.set_active(model, "c")
        with kra.disabled(model):
            np.testing.assert_array_equal(zoo.outputs(model, x), expected)
        kra.eject(model)
        np.testing.assert_array_equal(zoo.outputs(model, x), expected)

    def test_bad_names(self):
        model, _, targets = zoo.dense()
        kra.inject(model, kra.LoRA(2), targets)
        with pytest.raises(ValueError, match="an adapter called 'default'"):
            kra.inject(model, kra.LoRA(2), targets)
        with pytest.raises(ValueError, match="no adapter called 'fr'"):
            kra.set_active(model, "fr")
        with pytest.raises(ValueError, match="no adapter called 'fr'"):
            kra.eject(model, "fr")
        with pytest.raises(ValueError, match="repeats a name"):
            kra.set_active(model, ["default", "default"])
        for name in ("", "a/b", "a.b", 3, None):
            with pytest.raises(ValueError, match="`name` must consist of"):
                kra.inject(model, kra.LoRA(2), targets, name=name)


class TestOwnership:
    """Each weight has one owner: a kept layer is no site of any adapter."""

    def test_site_of_one_kept_by_another(self):
        model, _, _ = zoo.sequential()
        hidden = lambda x: getattr(x, "units", 0) == 8  # noqa: E731
        head = lambda x: getattr(x, "units", 0) == 5  # noqa: E731
        kra.inject(model, kra.LoRA(2), hidden, keep_trainable=head)
        with pytest.raises(ValueError, match="both a target and"):
            kra.inject(model, kra.LoRA(2), head, name="b")
        kra.eject(model)
        kra.inject(model, kra.LoRA(2), hidden)
        with pytest.raises(ValueError, match="both a target and"):
            kra.inject(
                model, kra.LoRA(2), head, keep_trainable=hidden, name="b"
            )
        kra.eject(model)

    def test_kept_layer_inside_another_ones(self):
        model, x, _ = zoo.sequential()
        inner = lambda x: getattr(x, "units", 0) == 7  # noqa: E731
        block = lambda x: isinstance(x, keras.Sequential)  # noqa: E731
        hidden = lambda x: getattr(x, "units", 0) == 8  # noqa: E731
        kra.inject(model, kra.LoRA(2), hidden, keep_trainable=inner)
        with pytest.raises(ValueError, match="by different adapters"):
            kra.inject(
                model, kra.LoRA(2), hidden, keep_trainable=block, name="b"
            )


class TestBlocks:
    """`merged` and `disabled` put back what they found, so nothing else may
    change it in between."""

    @pytest.mark.parametrize("block", [kra.merged, kra.disabled])
    def test_refused_inside(self, block, tmp_path):
        model, x, targets = zoo.dense()
        kra.inject(model, kra.LoRA(2), targets)
        zoo.randomize(model)
        out = zoo.outputs(model, x)
        kra.save_adapter(model, tmp_path / "a")
        with block(model):
            for call in (
                lambda: kra.eject(model),
                lambda: kra.merge(model),
                lambda: kra.set_active(model, "default"),
                lambda: kra.inject(model, kra.LoRA(2), targets, name="b"),
                lambda: kra.load_adapter(model, tmp_path / "a"),
                lambda: kra.merged(model).__enter__(),
            ):
                with pytest.raises(ValueError, match="is inside a"):
                    call()
        np.testing.assert_array_equal(zoo.outputs(model, x), out)
        kra.eject(model)

    @pytest.mark.parametrize("block", [kra.disabled, kra.merged])
    @pytest.mark.parametrize("call", ["fit", "train_on_batch"])
    def test_no_training_inside(self, block, call):
        model, x, targets = zoo.dense()
        kra.inject(model, kra.LoRA(2), targets)
        model.compile("adam", "mse")
        y = zoo.normal(8, 6)
        model.fit(x, y, verbose=0)
        zoo.randomize(model)
        before = [_numpy(w) for w in model.weights]
        with block(model):
            with pytest.raises(ValueError, match="is inside a"):
                getattr(model, call)(x, y)
            model.evaluate(x, y, verbose=0)
        for one, two in zip(model.weights, before):
            np.testing.assert_array_equal(_numpy(one), two)
        model.fit(x, y, verbose=0)

    def test_no_whole_model_of_a_merged_one(self, tmp_path):
        # Its kernels hold the delta, and loading would add it again.
        model, x, targets = zoo.dense()
        kra.inject(model, kra.LoRA(2), targets)
        zoo.randomize(model)
        with kra.merged(model):
            with pytest.raises(ValueError, match="save a merged copy: .*deepc"):
                model.save(tmp_path / "x.keras")
            with pytest.raises(ValueError, match="inside a `merged` block"):
                kra.disabled(model).__enter__()
        # The way that the error tells.
        out = zoo.outputs(model, x)
        kra.merge(copy.deepcopy(model)).save(tmp_path / "x.keras")
        np.testing.assert_array_equal(zoo.outputs(model, x), out)
        loaded = keras.models.load_model(tmp_path / "x.keras", compile=False)
        assert kra.sites(loaded) == {}
        np.testing.assert_allclose(zoo.outputs(loaded, x), out, atol=1e-5)


class TestInsideFit:
    def _run(self, at_epoch_end=None, at_batch_end=None):
        keras.utils.set_random_seed(0)
        model, x, _ = zoo.classifier()
        kra.inject(model, kra.RLoRA(5), keep_trainable="logits")
        events = {}
        if at_epoch_end:
            events["on_epoch_end"] = lambda *_, **__: at_epoch_end(model, x)
        if at_batch_end:
            events["on_train_batch_end"] = lambda *_, **__: at_batch_end(
                model, x
            )
        callback = keras.callbacks.LambdaCallback(**events)
        zoo.fit(model, x, steps=3, callbacks=[callback])
        return zoo.outputs(model, x)

    @pytest.mark.cpu_seconds(10, reason="three trainings with predictions")
    def test_blocks_leave_training_alone(self):
        seen = []

        def use(model, x):
            if hasattr(model, "jax_state_sync"):
                # As `callback.model` does; the blocks do it themselves.
                model.jax_state_sync()
            adapted = zoo.outputs(model, x)
            with kra.merged(model):
                merged = model.predict(x, verbose=0)
            with kra.disabled(model):
                base = model.predict(x, verbose=0)
            seen.append((adapted, np.ravel(merged), np.ravel(base)))

        plain = self._run()
        np.testing.assert_array_equal(self._run(use), plain)
        np.testing.assert_array_equal(self._run(at_batch_end=use), plain)
        assert len(seen) == 6
        for adapted, merged, base in seen:
            np.testing.assert_allclose(merged, adapted, rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(base, seen[0][2])
        # Three different states of one training were merged.
        assert np.abs(seen[0][1] - seen[2][1]).max() > 1e-3

    @pytest.mark.parametrize(
        "change",
        [
            kra.eject,
            kra.merge,
            lambda model: kra.set_active(model, []),
            lambda model: kra.inject(model, kra.LoRA(1), name="b"),
        ],
    )
    def test_switching_is_refused(self, change):
        errors = []

        def use(model, x):
            with pytest.raises(ValueError, match="is being trained") as info:
                change(model)
            errors.append(info)

        np.testing.assert_array_equal(self._run(use), self._run())
        assert len(errors) == 3

    def test_disabled_in_a_loss(self):
        """Traced: Keras for JAX keeps no values in variables meanwhile."""
        inner, x, targets = zoo.bert()

        class Distilled(keras.Model):
            def __init__(self):
                super().__init__()
                self.inner = inner

            def call(self, x, training=None):
                return self.inner(x, training=training)

            def compute_loss(
                self,
                x=None,
                y=None,
                y_pred=None,
                sample_weight=None,
                training=True,
            ):
                with kra.disabled(self):
                    base = self(x, training=False)
                return keras.ops.mean((_first(y_pred) - _first(base)) ** 2)

        def _first(outputs):
            return keras.tree.flatten(outputs)[0]

        model = Distilled()
        model(x)
        kra.inject(model, kra.LoRA(2), targets)
        zoo.randomize(model)
        model.compile(keras.optimizers.SGD(0.01))
        losses = [model.fit(x, verbose=0).history["loss"][0] for _ in range(3)]
        assert losses[0] > losses[1] > losses[2] > 0


class TestBadInput:
    def test_not_a_model(self):
        with pytest.raises(TypeError, match="`model` must be a `keras.Model`"):
            kra.inject(layers.Dense(3), kra.LoRA(2))

    def test_unbuilt_model(self):
        with pytest.raises(ValueError, match="is not built"):
            kra.inject(keras.Sequential([layers.Dense(3)]), kra.LoRA(2))
        with pytest.raises(ValueError, match="is not built"):
            kra.inject(zoo.Subclassed(), kra.LoRA(2), "all-linear")

    def test_not_an_adapter(self):
        model, _, targets = zoo.dense()
        with pytest.raises(TypeError, match="write `LoRA\\(...\\)`"):
            kra.inject(model, kra.LoRA, targets)
        with pytest.raises(TypeError, match="`adapter` must be an adapter"):
            kra.inject(model, layers.Dense(2), targets)

    def test_built_adapter(self):
        model, _, targets = zoo.dense()
        adapter = kra.LoRA(2)
        adapter.build_at(site_of((10, 6)))
        with pytest.raises(ValueError, match="is built already"):
            kra.inject(model, adapter, targets)

    @pytest.mark.parametrize("before", [None, "other"])
    def test_interrupted_start(self, before, monkeypatch):
        """What an adapter derives from the kernel may fail, or take long."""
        model, x, targets = zoo.bert()
        if before:
            kra.inject(model, kra.LoRA(2, seed=1), "key", name=before)
        expected = zoo.snapshot(model)
        classes = [type(layer) for layer in model._flatten_layers()]
        calls = []
        start = kra.LoRA.start_from

        def start_from(self, kernel):
            calls.append(kernel)
            if len(calls) == 3:
                raise KeyboardInterrupt
            start(self, kernel)

        monkeypatch.setattr(kra.LoRA, "start_from", start_from)
        adapter = kra.LoRA(2, initialization="pissa")
        with pytest.raises(KeyboardInterrupt):
            kra.inject(model, adapter, ["query", "value"])
        assert [type(layer) for layer in model._flatten_layers()] == classes
        after = zoo.snapshot(model)
        assert list(after) == list(expected)
        for key, (path, value) in expected.items():
            np.testing.assert_array_equal(after[key][1], value, err_msg=path)
        kra.inject(model, adapter, ["query", "value"])

    def test_optimizer_that_cannot_be_made_anew(self):
        """Keras refuses to read a lambda back."""
        model, x, targets = zoo.dense()
        model.compile(keras.optimizers.SGD(lambda: 0.1), "mse")
        model.fit(x, np.zeros((len(x), *model.output_shape[1:])), verbose=0)
        with pytest.raises(ValueError, match="(?i)lambda"):
            kra.inject(model, kra.LoRA(2), targets)
        assert kra.sites(model) == {}
        assert "_randadapt" not in vars(model)
        model.compile("sgd", "mse")
        kra.inject(model, kra.LoRA(2), targets)

    @pytest.mark.parametrize(
        "adapter, warns",
        [
            (kra.LoRA(2, dropout=0.5), True),
            (kra.DyLoRA(2), True),
            (kra.LoRA(2), False),
        ],
        ids=["dropout", "DyLoRA", "LoRA"],
    )
    def test_call_without_a_training_argument(self, adapter, warns):
        for builder, expected in ((zoo.subclassed, warns), (zoo.dense, False)):
            model, x, targets = builder()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                kra.inject(model, adapter, targets)
            found = [
                w for w in caught if "`training` argument" in str(w.message)
            ]
            assert len(found) == expected
            assert all(w.filename == __file__ for w in found)

    def test_names_of_another_type(self):
        model, _, targets = zoo.dense()
        kra.inject(model, kra.LoRA(2), targets)
        for call, names in (
            (kra.set_active, None),
            (kra.set_active, [3]),
            (kra.eject, ["default"]),
        ):
            with pytest.raises(TypeError, match="must be strings. Received"):
                call(model, names)
        assert kra.sites(model)

    def test_template_is_left_alone(self):
        template = kra.LoRA(2)
        for builder in (zoo.dense, zoo.einsum_query):
            model, _, targets = builder()
            kra.inject(model, template, targets)
        assert not template.built

    @pytest.mark.parametrize(
        "call",
        [
            kra.eject,
            kra.merge,
            lambda m: kra.set_active(m, "x"),
            lambda m: kra.disabled(m).__enter__(),
            lambda m: kra.merged(m).__enter__(),
            lambda m: kra.save_adapter(m, "x"),
        ],
    )
    def test_model_without_adapters(self, call):
        model, _, _ = zoo.dense()
        with pytest.raises(ValueError, match="has no adapter attached"):
            call(model)

    def test_nan_in_a_merge(self):
        model, x, targets = zoo.dense()
        kra.inject(model, kra.LoRA(2), targets)
        zoo.randomize(model)
        (adapter,) = model._randadapt.adapters("default").values()
        adapter.lora_a.assign(np.full((10, 2), np.nan))
        before = zoo.snapshot(model)
        for call in (kra.merge, lambda m: kra.merged(m).__enter__()):
            with pytest.raises(ValueError, match="NaN or infinity"):
                call(model)
        after = zoo.snapshot(model)
        assert list(after) == list(before)
        for key, (path, value) in before.items():
            np.testing.assert_array_equal(after[key][1], value, err_msg=path)
        assert kra.sites(model)

    def test_kernel_shared_by_two_layers(self):
        inputs = keras.Input((4,))
        first, second = layers.Dense(4, name="a"), layers.Dense(4, name="b")
        model = keras.Model(inputs, second(first(inputs)))
        second._tracker.unlock()
        second._kernel = first._kernel
        with pytest.raises(ValueError, match="belongs to other layers as well"):
            kra.inject(model, kra.LoRA(2), "a")

    def test_keras_lora(self):
        model, _, targets = zoo.dense()
        model.get_layer("site").enable_lora(2)
        with pytest.raises(ValueError, match="Keras's own LoRA"):
            kra.inject(model, kra.LoRA(2), targets)

    def test_unbuilt_layer_in_a_built_model(self):
        class Partial(keras.Model):
            def __init__(self):
                super().__init__()
                self.used = layers.Dense(4)
                self.unused = layers.Dense(4, name="unused")

            def call(self, x):
                return self.used(x)

        model = Partial()
        model(np.zeros((2, 4), "float32"))
        with pytest.raises(ValueError, match="has no weights yet"):
            kra.inject(model, kra.LoRA(2), "unused")
        report = kra.inject(model, kra.LoRA(2), "all-linear")
        assert len(report.sites) == 1
        assert model.used in kra.sites(model).values()

    def test_argument_that_no_file_can_store(self):
        model, _, targets = zoo.dense()
        adapter = kra.LoRA(2, a_initializer=lambda shape, dtype=None: shape)
        with pytest.raises(TypeError, match="that no file can store"):
            kra.inject(model, adapter, targets)
        assert kra.sites(model) == {}
        stddev = {"name": "normal", "stddev": np.float32(0.02)}
        kra.inject(model, kra.LoRA(2, a_initializer=stddev), targets)

    @pytest.mark.parametrize("what", ["kernel", "convolution_op"])
    def test_layer_that_overrides_what_call_uses(self, what):
        class Scaled(layers.Dense):
            @property
            def kernel(self):
                return 2 * self._kernel

        class Doubled(layers.Conv2D):
            def convolution_op(self, inputs, kernel):
                return 2 * super().convolution_op(inputs, kernel)

        layer = Scaled(3) if what == "kernel" else Doubled(3, 1)
        inputs = keras.Input((5, 5, 4))
        layer.name = "odd"
        model = keras.Model(inputs, layer(inputs))
        with pytest.raises(ValueError, match=f"overrides `{what}`"):
            kra.inject(model, kra.LoRA(2), "odd")

    def test_enable_lora_in_kept_layers(self):
        """Keras's LoRA freezes the kernel, and keeping the layer trains it."""
        model, x, _ = zoo.classifier()
        model.get_layer("logits").enable_lora(2)
        with pytest.raises(ValueError, match="of `keep_trainable` has Keras"):
            kra.inject(model, kra.LoRA(2), "query", keep_trainable="logits")
        assert kra.sites(model) == {}

    @pytest.mark.parametrize("end", [kra.eject, kra.merge])
    def test_enable_lora_in_other_layers(self, end):
        model, x, _ = zoo.classifier()
        model.get_layer("value").enable_lora(2)
        before = [(v.path, v.trainable) for v in model.variables]
        kra.inject(model, kra.LoRA(2), "query")
        assert len(model.trainable_variables) == 2
        end(model)
        assert [(v.path, v.trainable) for v in model.variables] == before

    @pytest.mark.parametrize("end", [kra.eject, kra.merge])
    def test_enable_lora_afterwards(self, end):
        """Neither of a site nor of another layer; nothing changes."""
        model, _, _ = zoo.classifier()
        flags = [(v.path, v.trainable) for v in model.variables]
        attributes = [set(vars(layer)) for layer in model.layers]
        kra.inject(model, kra.LoRA(2), "query")
        before = [(v.path, v.trainable) for v in model.variables]
        for layer in model.layers[1:]:
            with pytest.raises(ValueError, match="carries adapters of keras_"):
                layer.enable_lora(2)
        assert [(v.path, v.trainable) for v in model.variables] == before
        end(model)
        assert [(v.path, v.trainable) for v in model.variables] == flags
        assert [set(vars(layer)) for layer in model.layers] == attributes
        for layer in model.layers[1:]:
            layer.enable_lora(2)

    @pytest.mark.parametrize("whole", [True, False])
    def test_enable_lora_of_a_backbone_afterwards(self, whole):
        """KerasHub's freezes every layer before it enables anything."""
        model = (zoo.bert if whole else zoo.pretrained_classifier)()[0]
        backbone = model if whole else model.backbone
        before = [(v.path, v.trainable) for v in model.variables]
        kra.inject(model, kra.LoRA(2), "key")
        flags = [layer.trainable for layer in model._flatten_layers()]
        count = len(model.variables)
        with pytest.raises(ValueError, match="carries adapters of keras_"):
            backbone.enable_lora(2)
        assert len(model.variables) == count
        assert [x.trainable for x in model._flatten_layers()] == flags
        kra.eject(model)
        assert [(v.path, v.trainable) for v in model.variables] == before
        backbone.enable_lora(2)
        plain, _, _ = zoo.bert()
        plain.enable_lora(2)
        assert [v.path for v in backbone.trainable_variables] == [
            v.path for v in plain.trainable_variables
        ]

    def test_quantize_afterwards(self):
        model, x, targets = zoo.dense()
        kra.inject(model, kra.LoRA(2), targets)
        with pytest.raises(ValueError, match="Quantize first"):
            model.quantize("int8")
        kra.eject(model)
        model.quantize("int8")

    @pytest.mark.parametrize("end", [kra.eject, kra.merge])
    def test_quantize_after_the_end(self, end):
        plain, model = zoo.dense()[0], zoo.dense()[0]
        before = dict(vars(model))
        kra.inject(model, kra.LoRA(2), "site")
        end(model)
        assert set(vars(model)) == set(before)
        assert vars(model).get("quantize") is before.get("quantize")
        plain.quantize("int8")
        model.quantize("int8")
        assert model.get_layer("site").quantization_mode == "int8"

    def test_unsupported_quantization(self, monkeypatch):
        """Keras may get modes that this library does not know."""
        model, _, targets = zoo.dense()
        model.quantize("float8")
        monkeypatch.setattr(supported, "QUANTIZATION_MODES", (None, "int8"))
        with pytest.raises(ValueError, match="quantized to 'float8'"):
            kra.inject(model, kra.LoRA(2), targets)

    def test_quantize_a_layer_afterwards(self):
        """Its kernel is the adapted model's, be the layer a site or not."""
        model, x, _ = zoo.sequential()
        dense = [one for one in model.layers if hasattr(one, "units")]
        kra.inject(model, kra.LoRA(2), dense[0].name)
        before = zoo.outputs(model, x)
        assert len(dense) == 2
        for layer in dense:
            with pytest.raises(ValueError, match=r"inject\(..., quantize="):
                layer.quantize("int8")
        np.testing.assert_array_equal(zoo.outputs(model, x), before)
        kra.eject(model)
        for layer in dense:
            layer.quantize("int8")

    def test_quantized_kernel_that_is_no_matrix_product(self):
        model, _, targets = zoo.einsum_shared()
        model.quantize("int8")
        with pytest.raises(ValueError, match="no plain matrix product"):
            kra.inject(model, kra.LoRA(2), targets)

    def test_a_part_is_adapted_already(self):
        backbone, _, _ = zoo.bert()
        kra.inject(backbone, kra.LoRA(2))
        inputs = backbone.input
        outer = keras.Model(inputs, backbone(inputs)["sequence_output"])
        with pytest.raises(ValueError, match="has adapters attached"):
            kra.inject(outer, kra.LoRA(2))

    def test_a_part_of_an_adapted_model(self):
        part = keras.Sequential(
            [keras.Input((4,)), layers.Dense(4, name="hidden")], name="part"
        )
        model = keras.Sequential(
            [keras.Input((4,)), part, layers.Dense(2, name="head")]
        )
        kra.inject(model, kra.LoRA(2), "head")
        with pytest.raises(ValueError, match="'part' is a part of model"):
            kra.inject(part, kra.LoRA(2), "hidden")
        kra.eject(model)
        with pytest.warns(UserWarning, match="inside another model"):
            kra.inject(part, kra.LoRA(2), "hidden")

    def test_quantized_head(self):
        model, _, targets = zoo.dense()
        model = keras.Sequential(
            [
                keras.Input((10,)),
                *model.layers[1:],
                layers.Dense(2, name="head"),
            ]
        )
        model.quantize("int8")
        with pytest.warns(UserWarning, match="only their biases can be"):
            kra.inject(model, kra.LoRA(2), targets, keep_trainable="head")

    def test_unknown_arguments(self):
        with pytest.raises(
            TypeError,
            match="`LoRA` has no argument `r` .`rank`.., `sed` .`seed",
        ):
            kra.LoRA(r=2, sed=3)

    def test_a_part_of_two_adapted_models(self):
        def quantized(part):
            with pytest.raises(ValueError, match="has adapters attached"):
                part.quantize("int8")

        def whole(part):
            return keras.Sequential(
                [keras.Input((4,)), part, layers.Dense(2, name="head")]
            )

        part = keras.Sequential(
            [keras.Input((4,)), layers.Dense(4, name="hidden")]
        )
        first, second = whole(part), whole(part)
        for model in (first, second):
            kra.inject(model, kra.LoRA(2), "head")
        quantized(part)
        kra.eject(first)
        quantized(part)
        with pytest.raises(ValueError, match="is a part of model"):
            kra.inject(part, kra.LoRA(2), "hidden")
        # Without a word: neither it nor its adapters are any more.
        del second, model
        gc.collect()
        part.quantize("int8")
        assert part.layers[0].quantization_mode == "int8"
        with pytest.warns(UserWarning, match="inside another"):
            kra.inject(part, kra.LoRA(2), "hidden")
        quantized(part)

    def test_part_of_another_model_warns(self):
        inner, x, _ = zoo.sequential()
        inputs = keras.Input((6,))
        outer = keras.Model(inputs, layers.Dense(2)(inner(inputs)))
        with pytest.warns(UserWarning, match="used inside another model"):
            kra.inject(inner, kra.LoRA(2), "all-linear")
        assert len(outer.trainable_variables) > 2

    def test_gemma4_quantized_feed_forward(self):
        # KerasHub multiplies by its integers, without their scale.
        class Gemma4TextDecoderBlock(layers.Layer):
            def __init__(self):
                super().__init__()
                self.ffw_linear = layers.Dense(4, name="ffw_linear")

            def build(self, input_shape):
                self.ffw_linear.build(input_shape)

            def call(self, x):
                return self.ffw_linear(x)

        inputs = keras.Input((4,))
        model = keras.Model(inputs, Gemma4TextDecoderBlock()(inputs))
        model.quantize("int8")
        with pytest.raises(ValueError, match="without their scale"):
            kra.inject(model, kra.LoRA(2), "ffw_linear")


class TestTraining:
    @pytest.mark.parametrize(
        "jit_compile",
        [
            pytest.param(
                True,
                marks=[pytest.mark.slow(reason="PyTorch traces for 9 s")]
                if BACKEND == "torch"
                else [],
            ),
            False,
        ],
    )
    def test_compilation(self, jit_compile):
        model, x, targets = zoo.einsum_query()
        kra.inject(model, kra.RLoRA(5), targets)
        zoo.randomize(model)
        if BACKEND == "torch" and jit_compile:
            # Keras hands this to torch.compile, which needs a compiler for
            # the CPU; the traced forward is what can be checked everywhere.
            import torch

            compiled = torch.compile(
                lambda t: model(t, training=False), backend="aot_eager"
            )
            got = _numpy(compiled(torch.from_numpy(x))).ravel()
            np.testing.assert_allclose(
                got, zoo.outputs(model, x), rtol=1e-5, atol=1e-5
            )
            return
        history = zoo.fit(model, x, jit_compile=jit_compile)
        losses = history.history["loss"]
        assert losses[-1] < losses[0]

    @pytest.mark.parametrize(
        "adapter",
        [kra.LoRA(2), kra.RLoRA(4), kra.Bottleneck(2)],
        ids=lambda adapter: type(adapter).__name__,
    )
    @pytest.mark.parametrize("mode", ["full", "activations"])
    def test_rematerialization(self, adapter, mode):
        """Layers whose activations Keras computes again for the gradient."""

        def trained(mode, adapted):
            keras.utils.set_random_seed(0)
            with keras.RematScope(mode=mode):
                model = keras.Sequential(
                    [
                        keras.layers.Dense(6, activation="gelu", name="first"),
                        keras.layers.Dense(4, name="second"),
                    ]
                )
                model.build((None, 4))
                if adapted:
                    kra.inject(model, adapter, ["first", "second"])
                model.compile(keras.optimizers.SGD(0.1), "mse")
                x = zoo.normal(8, 4)
                model.fit(x, 2 * x, epochs=2, verbose=0)
            return [np.array(w) for w in map(_numpy, model.weights)]

        if BACKEND == "tensorflow" and mode == "full":
            # Keras hands keyword arguments to `tf.recompute_grad`, which
            # takes none in a graph: what it refuses, it refuses alike.
            for adapted in (False, True):
                with pytest.raises(ValueError, match="keywords arguments"):
                    trained(mode, adapted)
            return
        for got, expected in zip(
            trained(mode, True), trained(None, True), strict=True
        ):
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)

    def test_inject_after_compile_and_fit(self):
        model, x, targets = zoo.einsum_query()
        zoo.fit(model, x)
        trained = {v.path: _numpy(v) for v in model.variables}
        kra.inject(model, kra.LoRA(2), targets)
        y = zoo.normal(*model(x).shape, seed=1)
        # No recompilation by the user.
        model.fit(x, y, epochs=2, verbose=0)
        for v in model.variables:
            if v.path in trained and "optimizer" not in v.path:
                np.testing.assert_array_equal(
                    _numpy(v), trained[v.path], err_msg=v.path
                )
            elif "lora_b" in v.path:
                assert np.any(_numpy(v))
        adapted = model.predict(x, verbose=0)
        kra.eject(model)
        plain = model.predict(x, verbose=0)
        assert np.abs(adapted - plain).max() > 1e-4
        model.fit(x, y, epochs=1, verbose=0)
        kernel = next(v for v in model.variables if v.path == "site/kernel")
        assert np.any(_numpy(kernel) != trained["site/kernel"])

    def test_switching_reaches_predict(self):
        model, x, targets = zoo.dense()
        base = model.predict(x, verbose=0)
        kra.inject(model, kra.LoRA(2), targets)
        zoo.randomize(model)
        adapted = model.predict(x, verbose=0)
        assert np.abs(adapted - base).max() > 1e-3
        with kra.disabled(model):
            np.testing.assert_allclose(
                model.predict(x, verbose=0), base, atol=1e-6
            )
        np.testing.assert_array_equal(model.predict(x, verbose=0), adapted)

    def test_disabled_keeps_the_optimizer(self):
        model, x, targets = zoo.dense()
        kra.inject(model, kra.LoRA(2), targets)
        zoo.fit(model, x)
        optimizer = model.optimizer
        with kra.disabled(model):
            pass
        assert model.optimizer is optimizer
        assert int(optimizer.iterations) == 3

    def test_data_of_a_wrong_shape_in_disabled(self):
        """On JAX such a step takes the variables' values away."""
        model = keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(4, name="hidden"),
                layers.Dense(2, name="head"),
            ]
        )
        kra.inject(model, kra.LoRA(2), "hidden", keep_trainable="head")
        with pytest.raises(Exception, match="incompatible|shape|expected"):
            with kra.disabled(model):
                model.predict(zoo.normal(3, 5), verbose=0)
        assert model._randadapt.active == ("default",)
        assert model._randadapt.block is None

    def test_disabled_nests_and_survives_an_error(self):
        model, x, targets = zoo.dense()
        kra.inject(model, kra.LoRA(2), targets)
        zoo.randomize(model)
        out = zoo.outputs(model, x)
        with pytest.raises(RuntimeError, match="inside"):
            with kra.disabled(model), kra.disabled(model):
                raise RuntimeError("inside")
        np.testing.assert_array_equal(zoo.outputs(model, x), out)
        with pytest.raises(RuntimeError, match="inside"):
            with kra.merged(model):
                raise RuntimeError("inside")
        np.testing.assert_array_equal(zoo.outputs(model, x), out)

    def test_batch_normalization_stops_moving(self):
        model, x, targets = zoo.sequential()
        kra.inject(model, kra.LoRA(2), targets)
        moving = [v for v in model.variables if "moving" in v.path]
        before = [_numpy(v) for v in moving]
        zoo.fit(model, x)
        assert len(moving) == 2
        for v, value in zip(moving, before):
            np.testing.assert_array_equal(_numpy(v), value)

    def test_setting_trainable_does_not_thaw_the_base(self):
        model, x, targets = zoo.sequential()
        kra.inject(model, kra.LoRA(2), targets)
        paths = [v.path for v in model.trainable_variables]
        model.trainable = False
        assert model.trainable_variables == []
        model.trainable = True
        assert [v.path for v in model.trainable_variables] == paths

    def test_model_frozen_as_a_whole(self):
        # The usual way to freeze a model must not freeze its adapters.
        model, x, targets = zoo.sequential()
        model.trainable = False
        kra.inject(model, kra.LoRA(2), targets)
        assert len(model.trainable_variables) == 6
        zoo.fit(model, x)
        kra.eject(model)
        assert not model.trainable and not model.trainable_variables

    @pytest.mark.parametrize("adapter", [kra.LoRA(2), kra.RLoRA(5)], ids=str)
    def test_integer_inputs(self, adapter):
        inputs = keras.Input((8,), dtype="int32")
        outputs = layers.Dense(6, name="site")(inputs)
        model = zoo.set_weights(keras.Model(inputs, outputs))
        x = zoo.integers(4, 8, high=9)
        base = zoo.outputs(model, x)
        kra.inject(model, adapter, "site")
        np.testing.assert_array_equal(zoo.outputs(model, x), base)
        zoo.randomize(model)
        out = zoo.outputs(model, x)
        assert np.abs(out - base).max() > 1e-2
        kra.merge(model)
        np.testing.assert_allclose(
            zoo.outputs(model, x), out, rtol=1e-5, atol=1e-5
        )

    def test_frozen_before_stays_frozen_after(self):
        model, _, targets = zoo.sequential()
        model.layers[0].trainable = False
        flags = [layer.trainable for layer in model._flatten_layers()]
        kra.inject(model, kra.LoRA(2), targets)
        kra.eject(model)
        assert [x.trainable for x in model._flatten_layers()] == flags

    @pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
    def test_mixed_precision(self, policy):
        keras.config.set_dtype_policy(policy)
        try:
            model, x, targets = zoo.einsum_query()
        finally:
            keras.config.set_dtype_policy("float32")
        base = zoo.outputs(model, x)
        kra.inject(model, kra.RLoRA(5), targets)
        np.testing.assert_array_equal(zoo.outputs(model, x), base)
        assert {v.dtype for v in model.trainable_variables} == {"float32"}
        zoo.fit(model, x)
        out = zoo.outputs(model, x)
        assert np.all(np.isfinite(out)) and np.any(out != base)
        with kra.merged(model):
            np.testing.assert_allclose(
                zoo.outputs(model, x), out, rtol=2e-2, atol=2e-2
            )

    @pytest.mark.parametrize(
        "dtype",
        [
            pytest.param("bfloat16", marks=pytest.mark.one_backend),
            "float16",
        ],
    )
    @pytest.mark.parametrize(
        "builder",
        [zoo.einsum_query, zoo.conv2d_grouped, zoo.reversible_embedding],
        ids=lambda b: b.__name__,
    )
    def test_low_precision_models(self, dtype, builder):
        keras.config.set_dtype_policy(dtype)
        try:
            model, x, targets = builder()
        finally:
            keras.config.set_dtype_policy("float32")
        base = zoo.outputs(model, x)
        kra.inject(model, kra.RLoRA(5), targets)
        np.testing.assert_array_equal(zoo.outputs(model, x), base)
        assert {v.dtype for v in model.trainable_variables} == {"float32"}
        zoo.randomize(model)
        out = zoo.outputs(model, x)
        assert np.abs(out - base).max() > 1e-2
        with kra.merged(model):
            np.testing.assert_allclose(
                zoo.outputs(model, x), out, rtol=5e-2, atol=5e-2
            )

    @pytest.mark.parametrize(
        "adapter",
        [kra.LoRA(2), kra.RLoRA(5), kra.BitFit()],
        ids=lambda adapter: type(adapter).__name__,
    )
    def test_fit_in_float16(self, adapter):
        """Weights of the base and products in float16, adapters in float32."""
        keras.config.set_dtype_policy("float16")
        try:
            model, x, targets = zoo.einsum_query()
        finally:
            keras.config.set_dtype_policy("float32")
        kra.inject(model, adapter, targets)
        before = zoo.snapshot(model)
        history = zoo.fit(model, x)
        losses = history.history["loss"]
        assert np.all(np.isfinite(losses)) and losses[-1] < losses[0]
        assert {v.dtype for v in model.trainable_variables} == {"float32"}
        for v in model.weights:
            changed = np.any(_numpy(v) != before[id(v)][1])
            assert changed == ("/adapter/" in v.path), v.path
            assert np.all(np.isfinite(_numpy(v))), v.path

    @pytest.mark.parametrize("groups", [1, 2])
    def test_channels_first_convolution(self, groups):
        layer = layers.Conv2D(
            6,
            3,
            strides=2,
            padding="same",
            groups=groups,
            data_format="channels_first",
            activation="tanh",
            name="site",
        )
        inputs = keras.Input((4, 7, 6))
        model = zoo.set_weights(keras.Model(inputs, layer(inputs)))
        x = zoo.normal(8, 4, 7, 6)
        try:
            base = zoo.outputs(model, x)
        except Exception as error:
            if BACKEND == "tensorflow" and "only supports the NHWC" in str(
                error
            ):
                pytest.skip("TensorFlow does not compute it on this CPU")
            raise
        kra.inject(model, kra.LoRA(2), "site")
        zoo.fit(model, x)
        zoo.randomize(model)
        out = zoo.outputs(model, x)
        assert np.abs(out - base).max() > 1e-2
        with kra.merged(model):
            np.testing.assert_allclose(
                zoo.outputs(model, x), out, rtol=1e-5, atol=1e-5
            )
        np.testing.assert_array_equal(zoo.outputs(model, x), out)
        with kra.disabled(model):
            np.testing.assert_allclose(zoo.outputs(model, x), base, atol=1e-6)

    @pytest.mark.skipif(BACKEND != "torch", reason="torch's parameter lists")
    def test_torch_parameters(self):
        model, x, targets = zoo.bert()
        model(x)
        kra.inject(model, kra.LoRA(2))
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == 8
        assert sum("lora_a" in key for key in model.state_dict()) >= 4
        # Gradients must not pile up from step to step.
        values = []
        for _ in range(3):
            model.zero_grad()
            keras.ops.sum(model(x)["sequence_output"] ** 2).backward()
            values.append([float(p.grad.abs().sum()) for p in trained])
        np.testing.assert_allclose(values[0], values[2], rtol=1e-5)

    @pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution is JAX's")
    def test_variable_paths_fit_layout_maps(self):
        model, _, _ = zoo.bert()
        kra.inject(model, kra.LoRA(2))
        paths = {v.path for v in model.trainable_variables}
        assert (
            "transformer_layer_0/self_attention_layer/query/adapter/default/"
            "lora_a" in paths
        )


class TestThreads:
    def test_quantized_products(self, monkeypatch):
        """Bias and activation are set aside for the length of a product."""
        model, x, targets = zoo.dense_int8()
        kra.inject(model, kra.LoRA(2), targets)
        zoo.randomize(model)
        layer = model.get_layer("site")
        layer.bias.assign(zoo.normal(*layer.bias.shape))
        layer.activation = keras.activations.tanh
        expected = zoo.outputs(model, x)
        product = layers.Dense.quantized_call
        inside = threading.Event()

        def slow_product(self, *args, **kwargs):
            inside.set()
            time.sleep(0.2)
            return product(self, *args, **kwargs)

        monkeypatch.setattr(layers.Dense, "quantized_call", slow_product)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            first = pool.submit(zoo.outputs, model, x)
            assert inside.wait(60)
            second = pool.submit(zoo.outputs, model, x)
            for one in (first, second):
                np.testing.assert_array_equal(one.result(60), expected)

    def test_classes_put_aside(self):
        """Weights are stored by layers of Keras's own classes."""
        model, _, targets = zoo.dense()
        kra.inject(model, kra.LoRA(2), targets)
        layer = model.get_layer("site")
        adapted = type(layer)

        def class_inside():
            with layer_lib.as_base_class(layer):
                return type(layer)

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            with layer_lib.as_base_class(layer):
                other = pool.submit(class_inside)
                with pytest.raises(concurrent.futures.TimeoutError):
                    other.result(0.2)
                assert type(layer) is layers.Dense
            assert other.result(60) is layers.Dense
        assert type(layer) is adapted

    def test_reading_a_kernel_changes_no_class(self, monkeypatch):
        model, _, targets = zoo.dense()
        kra.inject(model, kra.LoRA(2), targets)
        layer = model.get_layer("site")
        seen = []
        monkeypatch.setattr(
            type(layer),
            "_merged_or_base",
            lambda self, kernel: seen.append(type(self)) or kernel,
        )
        assert layer.kernel is layer._kernel
        assert seen == [type(layer)] != [layers.Dense]


class TestSites:
    @pytest.mark.parametrize("builder", [zoo.einsum_gemma, zoo.einsum_query])
    def test_rank_of_the_delta(self, builder):
        # Keras factors by position: a rank-2 LoRA there has rank 2 * heads.
        model, _, targets = builder()
        kra.inject(model, kra.LoRA(2), targets)
        zoo.randomize(model)
        (layer,) = kra.sites(model).values()
        (adapter,) = model._randadapt.adapters("default").values()
        delta = _numpy(adapter.delta_kernel())
        assert delta.shape == (6, 8)
        assert np.linalg.matrix_rank(delta) == 2
        axes = (1, 0, 2) if builder is zoo.einsum_gemma else (0, 1, 2)
        shown = _numpy(layer.kernel) - _numpy(layer._kernel)
        np.testing.assert_allclose(
            np.transpose(shown, axes).reshape(6, 8), delta, atol=1e-6
        )

    def test_layers_keep_class_name_and_identity(self):
        model, _, targets = zoo.dense()
        layer = model.get_layer("site")
        # It is that of before, so that a clone can be trained.
        config = layer.get_config()
        kra.inject(model, kra.LoRA(2), targets)
        assert model.get_layer("site") is layer
        assert isinstance(layer, layers.Dense)
        assert type(layer).__name__ == "Dense"
        assert layer.get_config() == config
        again = type(layer).from_config(config)
        assert type(again) is layers.Dense

    def test_new_functional_model_of_adapted_layers(self):
        model, x, targets = zoo.einsum_query()
        kra.inject(model, kra.RLoRA(5), targets)
        zoo.randomize(model)
        inputs = keras.Input((None, 6))
        again = keras.Model(inputs, model.get_layer("site")(inputs))
        np.testing.assert_allclose(
            zoo.outputs(again, x), zoo.outputs(model, x), atol=1e-6
        )


class TestGeneration:
    @pytest.mark.cpu_seconds(10, reason="compiles a generation")
    def test_generate_follows_the_adapter(self):
        """A KerasHub task compiles `generate` once; switching must reach it."""
        import keras_hub

        backbone, _, _ = zoo.gpt2()
        task = keras_hub.models.GPT2CausalLM(
            backbone=backbone, preprocessor=None
        )
        task.compile(sampler="greedy", optimizer="adam", loss="mse")
        prompt = {
            "token_ids": zoo.integers(2, 6, high=20),
            "padding_mask": np.array([[1, 1, 0, 0, 0, 0]] * 2, "int32"),
        }

        def generate():
            y = task.generate(prompt, stop_token_ids=None)
            return _numpy(y["token_ids"])

        base = generate()
        kra.inject(task, kra.LoRA(4, scaling=20.0), "all-linear")
        np.testing.assert_array_equal(generate(), base)
        zoo.randomize(task, scale=1.0)
        adapted = generate()
        assert np.any(adapted != base)
        with kra.disabled(task):
            np.testing.assert_array_equal(generate(), base)
        kra.eject(task)
        np.testing.assert_array_equal(generate(), base)


DISTRIBUTED = """
import keras, numpy as np
import keras_randadapt as kra
from tests import zoo
from tests.methods import site_of

devices = keras.distribution.list_devices()
assert len(devices) == 4
mesh = keras.distribution.DeviceMesh((2, 2), ["batch", "model"], devices)
layout = keras.distribution.LayoutMap(mesh)
layout[".*(query|key|value)/kernel"] = (None, "model", None)
distribution = keras.distribution.ModelParallel(
    layout_map=layout, batch_dim_name="batch"
)
with distribution.scope():
    model, x, _ = zoo.bert()
try:
    kra.inject(model, kra.LoRA(2))
    raise AssertionError("no error")
except ValueError as error:
    assert "but no distribution is active" in str(error), error
assert not kra.sites(model)
keras.distribution.set_distribution(distribution)
kra.inject(model, kra.RLoRA(5))
before = zoo.snapshot(model)
zoo.fit(model, x)
for v in model.variables:
    changed = np.any(np.asarray(v) != before[id(v)][1])
    assert changed == ("/adapter/" in v.path), v.path
for change in (
    lambda: kra.to_lora(model, rank=2),
    lambda: kra.combine(model, {"default": 0.5}, "half", rank=2),
):
    keras.distribution.set_distribution(None)
    try:
        change()
        raise AssertionError("no error")
    except ValueError as error:
        assert "but no distribution is active" in str(error), error
    keras.distribution.set_distribution(distribution)
    change()
"""


@pytest.mark.cpu_seconds(25, reason="a process with four devices")
@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution is JAX's")
def test_distribution():
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    result = subprocess.run(
        [sys.executable, "-c", DISTRIBUTED],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
