"""Adapted models through Keras's own ways of saving and copying."""

import copy
import os
import pickle
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers

import keras_randadapt as kra
from tests import zoo

pytestmark = pytest.mark.one_backend

BACKEND = keras.config.backend()


def _adapted(builder, adapter=None, **kwargs):
    model, x, targets = builder()
    kra.inject(model, adapter or kra.RLoRA(5), targets, **kwargs)
    zoo.randomize(model)
    return model, x


def _numpy(x):
    return np.array(keras.ops.convert_to_numpy(x))


def _run(code, *arguments, backend=BACKEND):
    environment = {**os.environ, "KERAS_BACKEND": backend}
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


class TestCopies:
    @pytest.mark.parametrize(
        "builder",
        [
            zoo.sequential,
            zoo.functional,
            zoo.subclassed,
            zoo.pretrained_classifier,
        ],
        ids=lambda b: b.__name__,
    )
    @pytest.mark.parametrize(
        "copier",
        [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
        ids=["deepcopy", "pickle"],
    )
    def test_copy_and_pickle(self, builder, copier):
        model, x = _adapted(builder)
        twin = copier(model)
        assert list(kra.sites(twin)) == list(kra.sites(model))
        out = zoo.outputs(model, x)
        np.testing.assert_allclose(zoo.outputs(twin, x), out, atol=1e-6)
        zoo.randomize(twin, seed=8)
        np.testing.assert_array_equal(zoo.outputs(model, x), out)
        kra.eject(twin)
        assert kra.sites(model)

    @pytest.mark.parametrize(
        "builder",
        [zoo.sequential, zoo.functional],
        ids=lambda b: b.__name__,
    )
    def test_clone_model_gives_the_base_architecture(self, builder):
        model, x = _adapted(builder)
        clone = keras.models.clone_model(model)
        assert kra.sites(clone) == {}
        with kra.disabled(model):
            base = zoo.outputs(model, x)
        plain = [w for w in model.weights if "/adapter/" not in w.path]
        assert len(clone.weights) == len(plain)
        for mine, theirs in zip(clone.weights, plain):
            mine.assign(theirs)
        np.testing.assert_allclose(zoo.outputs(clone, x), base, atol=1e-6)


class TestWholeModelFiles:
    @pytest.mark.every_backend
    def test_training_goes_on(self, tmp_path):
        """Optimizer state, adapters and flags come back: the next step is
        the one that the model itself would have taken."""
        model, x = _adapted(zoo.einsum_query, kra.LoRA(2))
        zoo.fit(model, x)
        model.save(tmp_path / "x.keras")
        loaded = keras.models.load_model(tmp_path / "x.keras")
        assert [v.path for v in loaded.trainable_variables] == [
            v.path for v in model.trainable_variables
        ]
        y = zoo.normal(*model(x).shape, seed=1)
        for one in (model, loaded):
            one.fit(x, y, batch_size=8, verbose=0)
        assert int(loaded.optimizer.iterations) == 4
        for mine, theirs in zip(
            loaded.trainable_variables, model.trainable_variables
        ):
            np.testing.assert_allclose(
                keras.ops.convert_to_numpy(mine),
                keras.ops.convert_to_numpy(theirs),
                rtol=1e-5,
                atol=1e-6,
            )

    @pytest.mark.parametrize(
        "builder",
        [zoo.sequential, zoo.functional, zoo.bert],
        ids=lambda b: b.__name__,
    )
    def test_ejected_copy_is_trainable_again(self, builder, tmp_path):
        model, _, _ = builder()
        model.layers[1].trainable = False
        trained = [v.path.split("/")[-1] for v in model.trainable_variables]
        kra.inject(model, kra.LoRA(2), "all-linear")
        model.save(tmp_path / "x.keras")
        loaded = keras.models.load_model(tmp_path / "x.keras")
        assert len(loaded.trainable_variables) == len(model.trainable_variables)
        kra.eject(loaded)
        paths = [v.path.split("/")[-1] for v in loaded.trainable_variables]
        if builder is zoo.bert:
            # KerasHub's configs do not state the flags of single layers.
            assert len(paths) >= len(trained) > 0
        else:
            assert paths == trained
        assert not any("lora" in path for path in paths)

    def test_several_adapters_and_heads(self, tmp_path):
        model, x, _ = zoo.bert_classifier()
        base = zoo.outputs(model, x)
        outs = {}
        for i, name in enumerate(("a", "b")):
            kra.inject(
                model, kra.RLoRA(5 + i), keep_trainable="logits", name=name
            )
            kra.set_active(model, name)
            zoo.randomize(model, name)
            model.get_layer("logits").bias.assign([i, 1.0, 2.0])
            outs[name] = zoo.outputs(model, x)
        model.save(tmp_path / "x.keras")
        loaded = keras.models.load_model(tmp_path / "x.keras")
        for name in ("b", "a"):
            kra.set_active(loaded, name)
            np.testing.assert_allclose(
                zoo.outputs(loaded, x), outs[name], atol=1e-6
            )
        kra.eject(loaded)
        np.testing.assert_allclose(zoo.outputs(loaded, x), base, atol=1e-6)

    @pytest.mark.cpu_seconds(10, reason="loads BERT with its head")
    def test_adapted_backbone_inside_a_new_task(self, tmp_path):
        import keras_hub

        backbone, x = _adapted(zoo.bert, kra.LoRA(2))
        task = keras_hub.models.BertTextClassifier(
            backbone=backbone, num_classes=3, preprocessor=None
        )
        out = zoo.outputs(task, x)
        task.save(tmp_path / "x.keras")
        loaded = keras.models.load_model(tmp_path / "x.keras")
        assert kra.sites(loaded.backbone)
        np.testing.assert_allclose(zoo.outputs(loaded, x), out, atol=1e-6)

    # On JAX such a process takes twice as long.
    @pytest.mark.one_backend("torch")
    @pytest.mark.cpu_seconds(15, reason="a process with KerasHub")
    def test_process_that_imports_only_the_library(self, tmp_path):
        model, x = _adapted(zoo.pretrained_classifier)
        model.save(tmp_path / "x.keras")
        np.savez(tmp_path / "x.npz", **x)
        code = (
            "import sys, keras_randadapt, keras, numpy as np\n"
            "model = keras.models.load_model(sys.argv[1])\n"
            "x = dict(np.load(sys.argv[2]))\n"
            "y = keras.ops.convert_to_numpy(model(x, training=False))\n"
            "np.save(sys.argv[3], y)\n"
        )
        _run(code, tmp_path / "x.keras", tmp_path / "x.npz", tmp_path / "y")
        np.testing.assert_allclose(
            np.load(tmp_path / "y.npy").ravel(),
            zoo.outputs(model, x),
            atol=1e-6,
        )

    @pytest.mark.cpu_seconds(10, reason="a process with Keras")
    def test_process_that_does_not_import_the_library(self, tmp_path):
        model, _ = _adapted(zoo.sequential)
        model.save(tmp_path / "x.keras")
        code = (
            "import sys, keras\n"
            "try:\n"
            "    keras.models.load_model(sys.argv[1])\n"
            "except (TypeError, ValueError) as error:\n"
            "    print(error)\n"
        )
        assert "keras_randadapt" in _run(code, tmp_path / "x.keras")

    def test_preset(self, tmp_path):
        import keras_hub

        model, x = _adapted(zoo.bert, kra.LoRA(2))
        out = zoo.outputs(model, x)
        with kra.disabled(model):
            base = zoo.outputs(model, x)
        folder = str(tmp_path / "preset")
        model.save_to_preset(folder)
        plain = keras_hub.models.BertBackbone.from_preset(folder)
        np.testing.assert_allclose(zoo.outputs(plain, x), base, atol=1e-6)
        kra.load_adapter(plain, f"{folder}/default.adapter.safetensors")
        np.testing.assert_allclose(zoo.outputs(plain, x), out, atol=1e-6)
        assert kra.sites(model)


class TestWeightsFiles:
    @staticmethod
    def _with_a_head(seed, name=None):
        model, x, _ = zoo.sequential()
        zoo.set_weights(model, seed=seed)
        if name is not None:
            first, *_, head = (layer.name for layer in model.layers)
            kra.inject(
                model, kra.LoRA(2), first, keep_trainable=head, name=name
            )
        return model, x

    @pytest.mark.parametrize("kind", ["x.weights.h5", "x.keras"])
    def test_plain_weights_are_the_base_models_heads_too(self, tmp_path, kind):
        plain, x = self._with_a_head(5)
        save = plain.save if kind.endswith(".keras") else plain.save_weights
        save(tmp_path / kind)
        expected = zoo.outputs(plain, x)
        adapted, _ = self._with_a_head(6, "default")
        adapted.load_weights(tmp_path / kind)
        with kra.disabled(adapted):
            np.testing.assert_array_equal(zoo.outputs(adapted, x), expected)

    @pytest.mark.parametrize("when", ["active", "disabled", "waiting"])
    def test_adapted_weights_are_not_the_base_models(self, tmp_path, when):
        """A file has the head of an adapter."""
        trained, x = self._with_a_head(6, "default")
        zoo.randomize(trained)
        head = trained.layers[-1]
        head.set_weights([w + 1 for w in head.get_weights()])
        trained.save_weights(tmp_path / "x.weights.h5")
        adapted, _ = self._with_a_head(6, "default")
        base = zoo.outputs(self._with_a_head(6)[0], x)
        if when == "active":
            adapted.load_weights(tmp_path / "x.weights.h5")
        elif when == "disabled":
            with kra.disabled(adapted):
                adapted.load_weights(tmp_path / "x.weights.h5")
                np.testing.assert_array_equal(zoo.outputs(adapted, x), base)
        else:
            kra.set_active(adapted, [])
            adapted.load_weights(tmp_path / "x.weights.h5")
            kra.set_active(adapted, "default")
        np.testing.assert_array_equal(
            zoo.outputs(adapted, x), zoo.outputs(trained, x)
        )
        with kra.disabled(adapted):
            np.testing.assert_array_equal(zoo.outputs(adapted, x), base)
        kra.eject(adapted)
        np.testing.assert_array_equal(zoo.outputs(adapted, x), base)

    @pytest.mark.parametrize(
        "builder",
        [
            zoo.sequential,
            pytest.param(zoo.functional, marks=pytest.mark.slow),
            zoo.subclassed,
            zoo.reversible_embedding,
            pytest.param(zoo.pretrained_classifier, marks=pytest.mark.slow),
        ],
        ids=lambda b: b.__name__,
    )
    def test_plain_weights_load_into_an_adapted_model(self, builder, tmp_path):
        plain, x, _ = builder()
        zoo.set_weights(plain, seed=5)
        plain.save_weights(tmp_path / "plain.weights.h5")
        model, _ = _adapted(builder)
        before = {v.path: _numpy(v) for v in model.weights}
        model.load_weights(tmp_path / "plain.weights.h5")
        base = []
        for v in model.weights:
            if "/adapter/" in v.path:
                np.testing.assert_array_equal(
                    _numpy(v), before[v.path], err_msg=v.path
                )
            else:
                base.append(v)
        for mine, theirs in zip(base, plain.weights, strict=True):
            np.testing.assert_array_equal(
                _numpy(mine), _numpy(theirs), err_msg=mine.path
            )
        expected = zoo.outputs(plain, x)
        with kra.disabled(model):
            np.testing.assert_allclose(
                zoo.outputs(model, x), expected, atol=1e-6
            )
        # The same adapter on the weights of the file.
        assert np.abs(zoo.outputs(model, x) - expected).max() > 1e-3
        kra.inject(plain, kra.RLoRA(5), list(kra.sites(model)))
        zoo.randomize(plain)
        np.testing.assert_allclose(
            zoo.outputs(model, x), zoo.outputs(plain, x), atol=1e-6
        )


class TestLegacyFiles:
    def test_hdf5_is_refused(self, tmp_path):
        model, x, targets = zoo.dense()
        kra.inject(model, kra.LoRA(2), targets)
        for name in ("model.h5", "model.hdf5"):
            with pytest.raises(ValueError, match="legacy HDF5 files"):
                model.save(tmp_path / name)
            assert not (tmp_path / name).exists()
        kra.eject(model)
        model.save(tmp_path / "model.keras")


@pytest.mark.every_backend
class TestExport:
    @pytest.mark.skipif(
        BACKEND == "torch",
        reason="Keras exports no SavedModel from torch, adapters or not",
    )
    @pytest.mark.cpu_seconds(15, reason="a process with TensorFlow")
    @pytest.mark.parametrize(
        "merged",
        [pytest.param(True, marks=pytest.mark.slow), False],
    )
    def test_saved_model(self, merged, tmp_path):
        """Adapted or merged, a SavedModel answers the same in a process that
        has neither Keras nor this library."""
        model, x = _adapted(zoo.pretrained_classifier)
        out = zoo.outputs(model, x)
        if merged:
            kra.merge(model)
        # The sequence length must be fixed: an upstream limitation of
        # KerasHub's position embeddings.
        signature = {
            name: keras.InputSpec(
                shape=(None, *value.shape[1:]), dtype="int32", name=name
            )
            for name, value in x.items()
        }
        model.export(
            str(tmp_path / "saved"),
            input_signature=[signature],
            verbose=False,
        )
        np.savez(tmp_path / "x.npz", **x)
        code = (
            "import sys, numpy as np, tensorflow as tf\n"
            "loaded = tf.saved_model.load(sys.argv[1])\n"
            "x = {k: tf.constant(v, tf.int32)\n"
            "     for k, v in np.load(sys.argv[2]).items()}\n"
            "np.save(sys.argv[3], loaded.serve(x).numpy())\n"
            "assert 'keras_randadapt' not in sys.modules\n"
        )
        _run(code, tmp_path / "saved", tmp_path / "x.npz", tmp_path / "y")
        np.testing.assert_allclose(
            np.load(tmp_path / "y.npy").ravel(), out, rtol=1e-4, atol=1e-5
        )

    @pytest.mark.skipif(BACKEND != "torch", reason="torch's own export")
    def test_torch_export(self, tmp_path):
        import torch

        model, x = _adapted(zoo.einsum_query)
        program = torch.export.export(
            model, (torch.from_numpy(x),), strict=False
        )
        got = program.module()(torch.from_numpy(x))
        np.testing.assert_allclose(
            got.detach().numpy().ravel(), zoo.outputs(model, x), atol=1e-5
        )


NEXT_BACKEND = {"tensorflow": "jax", "jax": "torch", "torch": "tensorflow"}


@pytest.mark.every_backend
@pytest.mark.cpu_seconds(20, reason="a process with another backend")
class TestAcrossBackends:
    """Each backend's file is opened on the next one, round the circle."""

    @pytest.mark.parametrize(
        "builder",
        [
            "classifier",
            pytest.param(
                "bert_classifier",
                marks=pytest.mark.slow(reason="compiles for 10 s"),
            ),
        ],
    )
    def test_adapter_and_whole_model(self, builder, tmp_path):
        model, x, _ = getattr(zoo, builder)()
        kra.inject(model, kra.RLoRA(9, seed=5), keep_trainable="logits")
        kra.inject(
            model,
            kra.LoRA(3, a_initializer="normal"),
            "all-linear",
            exclude="logits",
            name="b",
        )
        zoo.fit(model, x)
        kra.save_adapter(model, tmp_path / "a", name="default")
        out = zoo.outputs(model, x)
        kra.set_active(model, "b")
        zoo.randomize(model, "b")
        kra.save_adapter(model, tmp_path / "b", name="b")
        out_b = zoo.outputs(model, x)
        model.save(tmp_path / "x.keras")
        # The file names PyTorch's class of the optimizer, and PyTorch crashes
        # when it is imported behind TensorFlow.
        compiled = builder != "classifier" or BACKEND != "torch"
        code = (
            "import sys, os, numpy as np, keras\n"
            "import keras_randadapt as kra\n"
            "from tests import zoo\n"
            "folder = sys.argv[1]\n"
            f"model, x, _ = zoo.{builder}()\n"
            "kra.load_adapter(model, folder + '/a')\n"
            "np.save(folder + '/a.npy', zoo.outputs(model, x))\n"
            "kra.load_adapter(model, folder + '/b')\n"
            "kra.set_active(model, 'b')\n"
            "np.save(folder + '/b.npy', zoo.outputs(model, x))\n"
            "kra.save_adapter(model, folder + '/again', name='default')\n"
            f"options = dict(compile={compiled})\n"
            "whole = keras.models.load_model(folder + '/x.keras', **options)\n"
            "np.save(folder + '/whole.npy', zoo.outputs(whole, x))\n"
        )
        _run(code, tmp_path, backend=NEXT_BACKEND[BACKEND])
        for name, expected in (("a", out), ("b", out_b), ("whole", out_b)):
            np.testing.assert_allclose(
                np.load(tmp_path / f"{name}.npy"),
                expected,
                rtol=1e-5,
                atol=1e-5,
                err_msg=name,
            )
        assert (tmp_path / "again").read_bytes() == (
            tmp_path / "a"
        ).read_bytes()


@pytest.mark.every_backend
def test_first_values_are_equal_on_every_backend():
    # All methods draw them from `random`, whose golden values are tested
    # there: here is one that has come all the way into a model.
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(3, name="d")(inputs))
    kra.inject(model, kra.RLoRA(4, seed=11), "d")
    (adapter,) = model._randadapt.adapters("default").values()
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(adapter.alpha), GOLDEN_ALPHA, rtol=1e-6
    )


GOLDEN_ALPHA = [0.14119874, -0.2479254, 0.0605847, -0.02591079]
