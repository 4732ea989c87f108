"""Adapter files: what they hold, and every way in which one can be wrong."""

import hashlib
import json
import os
import warnings

import keras
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from keras import layers

import keras_randadapt as kra
from keras_randadapt.model import file_format
from tests import adapter_files
from tests import methods
from tests import zoo

pytestmark = pytest.mark.one_backend("torch")

#: The digest of the layers of `zoo.bert`, on every backend.
LAYERS_OF_BERT = "f5bcd86cca69dad8"


def _numpy(x):
    return keras.ops.convert_to_numpy(x)


@pytest.fixture
def saved(tmp_path):
    """A classifier with a trained adapter and head, and its file."""
    model, x, _ = zoo.bert_classifier()
    kra.inject(model, kra.RLoRA(9, seed=2), keep_trainable="logits")
    zoo.randomize(model)
    model.get_layer("logits").bias.assign([0.1, -0.2, 0.3])
    path = tmp_path / "task.safetensors"
    kra.save_adapter(model, path)
    return model, x, path


def _edit(path, metadata=None, tensors=None):
    adapter_files.edit(path, metadata, tensors)


def _model(path):
    """What a file says of its base model."""
    return adapter_files.read(path)[1]["model"]


def _sites(path):
    with safetensors.safe_open(path, framework="np") as file:
        return sorted(key for key in file.keys() if "#" not in key)


class TestContent:
    def test_nothing_that_a_seed_rebuilds(self, saved):
        model, _, path = saved
        with safetensors.safe_open(path, framework="np") as file:
            sizes = {k: file.get_tensor(k).size for k in file.keys()}
            metadata = json.loads(file.metadata()["keras_randadapt"])
        assert sorted(k for k in sizes if "#" not in k) == sorted(
            kra.sites(model)
        )
        for address in kra.sites(model):
            assert sizes[address] == 9 + 8
        assert sizes["layers/dense#0"] == 24 and sizes["layers/dense#1"] == 3
        assert metadata["version"] == 2
        assert metadata["model"] == {
            "class": "BertTextClassifier",
            "backbone": "BertBackbone",
            "layers": LAYERS_OF_BERT,
        }
        assert metadata["adapter"]["class"] == "keras_randadapt>RLoRA"
        assert len(metadata["bases"]) == 2

    def test_same_bytes_again(self, saved, tmp_path):
        model, _, path = saved
        kra.save_adapter(model, tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == path.read_bytes()

    def test_writing_is_all_or_nothing(self, saved, monkeypatch):
        model, _, path = saved
        before = path.read_bytes()

        def fail(*args):
            raise OSError("disk full")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            kra.save_adapter(model, path)
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == [path.name]

    def test_readable_as_other_files_are(self, saved, tmp_path):
        other = tmp_path / "other"
        other.write_text("x")
        assert saved[2].stat().st_mode == other.stat().st_mode

    def test_which_of_several(self, saved, tmp_path):
        model, _, _ = saved
        kra.inject(model, kra.LoRA(2), name="b")
        with pytest.raises(ValueError, match="say which with"):
            kra.save_adapter(model, tmp_path / "x")
        kra.save_adapter(model, tmp_path / "x", name="b")
        with pytest.raises(ValueError, match="no adapter called 'c'"):
            kra.save_adapter(model, tmp_path / "x", name="c")

    def test_inactive_adapter_saves_its_own_head(self, saved, tmp_path):
        model, x, path = saved
        out = zoo.outputs(model, x)
        kra.set_active(model, [])
        kra.save_adapter(model, tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == path.read_bytes()
        kra.set_active(model, "default")
        np.testing.assert_array_equal(zoo.outputs(model, x), out)

    @pytest.mark.cpu_seconds(10, reason="the shapes of RoBERTa-base")
    @pytest.mark.parametrize(
        "adapter,targets,weights",
        [
            (kra.LoRA(8), ["query", "value"], 294_912),
            (kra.RandLoRA(32), ["query", "value"], 460_800),
            (kra.RLoRA(2048), "all-linear", 194_304),
        ],
        ids=["LoRA", "RandLoRA", "RLoRA"],
    )
    def test_size_beside_the_weights(self, adapter, targets, weights, tmp_path):
        """At most a twentieth more, from 100,000 weights on."""
        model = methods.roberta()
        report = kra.inject(model, adapter, targets)
        assert report.adapter_parameters == weights
        kra.save_adapter(model, tmp_path / "x")
        assert (tmp_path / "x").stat().st_size <= 1.05 * 4 * weights

    def test_size_of_a_deep_model(self, tmp_path):
        import keras_hub

        model = keras_hub.models.BertBackbone(
            vocabulary_size=20,
            num_layers=24,
            num_heads=2,
            hidden_dim=8,
            intermediate_dim=8,
            max_sequence_length=6,
        )
        report = kra.inject(model, kra.RLoRA(8), "all-linear")
        kra.save_adapter(model, tmp_path / "x")
        size = (tmp_path / "x").stat().st_size
        assert size == report.file_bytes
        assert (
            size
            <= 4 * report.adapter_parameters + 200 * len(report.sites) + 4096
        )


class TestLoading:
    def test_head_comes_along(self, saved):
        model, x, path = saved
        out = zoo.outputs(model, x)
        fresh, _, _ = zoo.bert_classifier()
        report = kra.load_adapter(fresh, path)
        assert report.head_parameters == 27
        np.testing.assert_array_equal(zoo.outputs(fresh, x), out)
        fresh_head = fresh.get_layer("logits")
        assert fresh_head.trainable and fresh_head.kernel.trainable

    def test_resuming_into_the_same_adapter(self, saved):
        model, x, path = saved
        out = zoo.outputs(model, x)
        zoo.fit(model, x)
        assert np.abs(zoo.outputs(model, x) - out).max() > 1e-4
        optimizer = model.optimizer
        kra.load_adapter(model, path)
        np.testing.assert_array_equal(zoo.outputs(model, x), out)
        assert model.optimizer is optimizer

    def test_under_another_name(self, saved):
        model, x, path = saved
        kra.load_adapter(model, path, name="copy")
        kra.set_active(model, "copy")
        np.testing.assert_array_equal(
            zoo.outputs(model, x),
            (kra.set_active(model, "default"), zoo.outputs(model, x))[1],
        )

    def test_task_and_backbone(self, tmp_path):
        task, x, _ = zoo.pretrained_classifier()
        kra.inject(task, kra.LoRA(2))
        zoo.randomize(task)
        kra.save_adapter(task, tmp_path / "task")
        backbone, _, _ = zoo.bert()
        weights = {w.path: _numpy(w) for w in task.backbone.weights}
        for w in backbone.weights:
            w.assign(weights[w.path])
        kra.load_adapter(backbone, tmp_path / "task")
        np.testing.assert_allclose(
            _numpy(backbone(x)["sequence_output"]),
            _numpy(task.backbone(x)["sequence_output"]),
            atol=1e-6,
        )
        kra.save_adapter(backbone, tmp_path / "backbone")
        kra.eject(task)
        kra.load_adapter(task, tmp_path / "backbone")
        np.testing.assert_allclose(
            _numpy(backbone(x)["sequence_output"]),
            _numpy(task.backbone(x)["sequence_output"]),
            atol=1e-6,
        )

    def test_presets_must_agree(self, saved, tmp_path):
        model, _, _ = saved
        path = tmp_path / "preset"
        kra.save_adapter(model, path, preset="bert_tiny_en_uncased")
        fresh, _, _ = zoo.bert_classifier()
        with pytest.raises(ValueError, match="preset 'bert_tiny_en_uncased'"):
            kra.load_adapter(fresh, path, preset="bert_tiny_en")
        assert kra.sites(fresh) == {}
        kra.load_adapter(fresh, path, preset="bert_tiny_en_uncased")


def _bert(num_layers=2, vocabulary_size=20):
    import keras_hub

    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=vocabulary_size,
        num_layers=num_layers,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=12,
        max_sequence_length=6,
    )
    return zoo.set_weights(backbone)


def _bert_with_head(classes):
    """A model around a backbone that is no task of KerasHub's."""
    backbone = _bert()
    outputs = backbone.output["pooled_output"]
    head = layers.Dense(classes, name="head")
    return keras.Model(backbone.input, head(outputs))


class TestBaseModel:
    """A file loads into the base model that it was trained on, or its like."""

    @pytest.mark.parametrize(
        "other",
        [{"num_layers": 4}, {"vocabulary_size": 30}],
        ids=["deeper", "other vocabulary"],
    )
    def test_other_layers_than_the_sites(self, tmp_path, other):
        model = _bert()
        kra.inject(model, kra.LoRA(2))
        kra.save_adapter(model, tmp_path / "x")
        fresh = _bert(**other)
        before = zoo.snapshot(fresh)
        with pytest.raises(
            ValueError, match="trained on a BertBackbone with other layers"
        ):
            kra.load_adapter(fresh, tmp_path / "x")
        assert zoo.snapshot(fresh).keys() == before.keys()
        assert kra.sites(fresh) == {} and type(fresh) is type(_bert())

    @pytest.mark.parametrize("task_first", [True, False])
    def test_other_layers_in_a_task(self, tmp_path, task_first):
        import keras_hub

        task = keras_hub.models.BertTextClassifier(
            backbone=_bert(4), num_classes=3, preprocessor=None
        )
        task.get_layer("logits").trainable = False
        models = (task, _bert()) if task_first else (_bert(), task)
        first_blocks = ["transformer_layer_0", "transformer_layer_1"]
        chosen = [
            layer
            for block in first_blocks
            for layer in getattr(models[0], "backbone", models[0])
            .get_layer(block)
            ._flatten_layers()
            if layer.name == "query"
        ]
        kra.inject(models[0], kra.LoRA(2), lambda x: x in chosen)
        kra.save_adapter(models[0], tmp_path / "x")
        with pytest.raises(ValueError, match="with other layers"):
            kra.load_adapter(models[1], tmp_path / "x")

    def test_more_than_a_backbone(self, tmp_path):
        """Where a task's own layers are adapted, they count too."""

        def model(depth):
            backbone = _bert()
            x = backbone.output["sequence_output"]
            for i in range(depth):
                x = keras.layers.Dense(6, name=f"own_{i}")(x)
            model = keras.Model(backbone.input, x)
            model.backbone = backbone
            return model

        first = model(1)
        kra.inject(first, kra.LoRA(2), ["own_0"])
        kra.save_adapter(first, tmp_path / "x")
        kra.load_adapter(model(1), tmp_path / "x", check_base="ignore")
        with pytest.raises(ValueError, match="with other layers"):
            kra.load_adapter(model(2), tmp_path / "x")

    def test_scalar_weight_of_a_kept_layer(self, tmp_path):
        def model():
            return keras.Sequential(
                [
                    keras.Input((3,)),
                    layers.Dense(4, name="hidden"),
                    # Its count is an integer without axes.
                    layers.Normalization(name="head"),
                ]
            )

        first, second = model(), model()
        first.get_layer("head").adapt(zoo.normal(20, 4))
        report = kra.inject(first, kra.LoRA(2), "hidden", keep_trainable="head")
        kra.save_adapter(first, tmp_path / "x")
        assert (tmp_path / "x").stat().st_size == report.file_bytes
        kra.load_adapter(second, tmp_path / "x", check_base="ignore")
        for one, two in zip(
            first.get_layer("head").weights, second.get_layer("head").weights
        ):
            np.testing.assert_array_equal(_numpy(one), _numpy(two))

    def test_weights_that_no_adapter_keeps(self, tmp_path):
        model, _, _ = zoo.functional()
        kra.inject(model, kra.LoRA(2), "shared")
        head = model.layers[-1]
        head.trainable = True
        with pytest.warns(UserWarning, match=f"no adapter's.*{head.name}"):
            kra.save_adapter(model, tmp_path / "x")
        head.trainable = False
        kra.inject(
            model, kra.LoRA(2), "shared", keep_trainable=head.name, name="b"
        )
        head.trainable = True
        with pytest.warns(UserWarning, match=f"no adapter's.*{head.name}"):
            kra.save_adapter(model, tmp_path / "x", "default")
        kra.set_active(model, "b")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            kra.save_adapter(model, tmp_path / "x", "b")
            with kra.disabled(model):
                kra.save_adapter(model, tmp_path / "x", "b")

    def test_no_folder(self, tmp_path):
        model, _, targets = zoo.dense()
        kra.inject(model, kra.LoRA(2), targets)
        with pytest.raises(FileNotFoundError, match="There is no folder"):
            kra.save_adapter(model, tmp_path / "nowhere" / "x")

    def test_a_folder(self, tmp_path):
        with pytest.raises(ValueError, match="is a folder"):
            kra.load_adapter(zoo.dense()[0], tmp_path)

    def test_part_of_an_unrelated_model(self, tmp_path):
        """By class and number, its layers' addresses are in many others."""
        part = keras.Sequential(
            [keras.Input((6,)), layers.Dense(8, name="encoder")]
        )
        whole = keras.Sequential([keras.Input((6,)), part, layers.Dense(3)])
        kra.inject(whole, kra.LoRA(2), "encoder")
        kra.save_adapter(whole, tmp_path / "x")
        other = keras.Sequential(
            [keras.Input((6,)), layers.Dense(8), layers.Dense(20)]
        )
        with pytest.raises(ValueError, match="with other layers"):
            kra.load_adapter(other, tmp_path / "x")
        assert kra.sites(other) == {}

    # Nothing is compiled here.
    @pytest.mark.filterwarnings(
        "ignore:.* is used inside another:keras_randadapt.AdapterWarning"
    )
    def test_part_of_a_functional_model(self, tmp_path):
        """A file of the part loads into the whole, and the other way round."""

        def models(units=5):
            inputs = keras.Input((3,))
            hidden = keras.layers.Dense(4, name="hidden")(inputs)
            part = keras.Model(
                inputs, keras.layers.Dense(units)(hidden), name="part"
            )
            inputs = keras.Input((3,))
            head = keras.layers.EinsumDense("ab,bc->ac", 2)
            return part, keras.Model(inputs, head(part(inputs)))

        for i in (0, 1):
            first, second = models()[i], models()[1 - i]
            kra.inject(first, kra.LoRA(2), ["hidden"])
            kra.save_adapter(first, tmp_path / "x")
            kra.load_adapter(second, tmp_path / "x", check_base="ignore")
            assert len(kra.sites(second)) == 1
        part, _ = models()
        kra.inject(part, kra.LoRA(2), ["hidden"])
        kra.save_adapter(part, tmp_path / "x")
        _, other = models(units=6)
        with pytest.raises(ValueError, match="with other layers"):
            kra.load_adapter(other, tmp_path / "x")

    @pytest.mark.parametrize("mode", ["int8", "int4"])
    def test_quantized_and_float(self, tmp_path, mode):
        floats = _bert()
        kra.inject(floats, kra.LoRA(2))
        kra.save_adapter(floats, tmp_path / "floats")
        quantized = _bert()
        quantized.quantize(mode)
        kra.load_adapter(quantized, tmp_path / "floats")
        kra.save_adapter(quantized, tmp_path / "quantized")
        tensors, metadata = adapter_files.read(tmp_path / "floats")
        found, described = adapter_files.read(tmp_path / "quantized")
        assert tensors.keys() == found.keys()
        for key in tensors.keys() - {"#base"}:
            np.testing.assert_array_equal(found[key], tensors[key])
        assert metadata["precisions"] == [["float32", 4]]
        assert described["precisions"] == [[mode, 4]]
        differing = {"precisions", "digest"}
        assert {k: metadata[k] for k in metadata.keys() - differing} == {
            k: described[k] for k in described.keys() - differing
        }

    def test_whatever_is_attached(self, tmp_path):
        """Adapters and layers inside of them are no part of the base."""
        model = _bert()
        kra.inject(model, kra.LoRA(2))
        kra.save_adapter(model, tmp_path / "alone")
        kra.inject(model, kra.Bottleneck(2), name="b")
        kra.inject(model, kra.LoRA(2), name="again")
        kra.inject(model, kra.DoRA(kra.LoRA(2)), "all-linear", name="c")
        kra.save_adapter(model, tmp_path / "beside", name="default")
        content = (tmp_path / "alone").read_bytes()
        assert (tmp_path / "beside").read_bytes() == content
        kra.save_adapter(model, tmp_path / "b", name="b")
        fresh = _bert()
        for file, name in (("b", "b"), ("alone", "one"), ("alone", "two")):
            kra.load_adapter(fresh, tmp_path / file, name=name)

    def test_kept_layers_are_left_out(self, tmp_path):
        """They have a check of their own, which says more."""
        model = _bert_with_head(3)
        kra.inject(model, kra.LoRA(2), keep_trainable="head")
        kra.save_adapter(model, tmp_path / "kept")
        with pytest.raises(ValueError, match="weight 0 of the kept layer"):
            kra.load_adapter(_bert_with_head(5), tmp_path / "kept")
        kra.eject(model)
        kra.inject(model, kra.LoRA(2))
        kra.save_adapter(model, tmp_path / "x")
        assert _model(tmp_path / "x") != _model(tmp_path / "kept")
        with pytest.raises(ValueError, match="with other layers"):
            kra.load_adapter(_bert_with_head(5), tmp_path / "x")

    def test_layers_without_a_kernel_view(self, tmp_path):
        """They can be no site, so they are no reason to fail."""

        def build():
            inputs = keras.Input((4,))
            x = layers.Dense(4, name="site")(inputs)
            x = layers.LayerNormalization(center=False)(x)
            x = layers.BatchNormalization(center=False, scale=False)(x)
            x = layers.EinsumDense("ab,bb->ab", (4,))(x)
            return keras.Model(inputs, x)

        model = build()
        kra.inject(model, kra.LoRA(2), "site")
        kra.save_adapter(model, tmp_path / "x")
        kra.load_adapter(build(), tmp_path / "x", check_base="ignore")

    def test_digests_of_layers_stay_those_of_the_first_version(self):
        """A class that becomes a site later changes no digest of old files."""
        inputs = keras.Input((6, 4))
        x = layers.Conv1D(4, 3, name="conv")(inputs)
        x = layers.DepthwiseConv1D(2, name="depthwise")(x)
        model = keras.Model(inputs, layers.Dense(2, name="dense")(x))
        lines = ["layers/conv1d 12x4", "layers/dense 4x2"]
        found = file_format.layers_digest(model, ["layers/dense"], [])
        text = "\n".join(lines)
        assert found == hashlib.sha256(text.encode()).hexdigest()[:16]
        # A digest does cover the sites.
        lines.append("layers/depthwise_conv1d 2x4")
        text = "\n".join(sorted(lines))
        found = file_format.layers_digest(
            model, ["layers/dense", "layers/depthwise_conv1d"], []
        )
        assert found == hashlib.sha256(text.encode()).hexdigest()[:16]

    def test_only_files_look_at_all_layers(self, monkeypatch, tmp_path):
        """`inject` and its report know the size without the digest."""
        model = _bert()

        def fail(*args):
            raise AssertionError

        with monkeypatch.context() as patch:
            patch.setattr(file_format, "layers_digest", fail)
            report = kra.inject(model, kra.LoRA(2))
        kra.save_adapter(model, tmp_path / "x")
        assert (tmp_path / "x").stat().st_size == report.file_bytes


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def _garbage(path):
    path.write_bytes(b"PK\x03\x04 no safetensors at all")


def _empty(path):
    path.write_bytes(b"")


def _foreign(path):
    safetensors.numpy.save_file({"lora_A.weight": np.zeros((2, 2))}, path)


def _newer(path):
    _edit(path, {"version": 3})


def _other_class(path):
    _edit(path, {"adapter": {"class": "keras_randadapt>FWHT", "config": {}}})


def _other_argument(path):
    _edit(
        path,
        {"adapter": {"class": "keras_randadapt>RLoRA", "config": {"x": 1}}},
    )


def _other_seed(path):
    config = kra.RLoRA(9, seed=3).get_config()
    _edit(
        path, {"adapter": {"class": "keras_randadapt>RLoRA", "config": config}}
    )


def _other_model(path):
    _edit(path, {"model": {"class": "GPT2Backbone", "layers": "0" * 16}})


def _other_layers(path):
    _edit(path, {"model": {**_model(path), "layers": "0" * 16}})


def _no_layers(path):
    _edit(path, {"model": {"class": "BertTextClassifier"}})


def _other_shapes(path):
    _edit(path, {"kernel_views": [["8x16", 4]]})


def _missing_site(path):
    _edit(
        path,
        {"precisions": [["float32", 3]]},
        {_sites(path)[0]: None, **adapter_files.fingerprints(path, 3)},
    )


def _unknown_site(path):
    _edit(
        path,
        {"kernel_views": [["8x8", 5]], "precisions": [["float32", 5]]},
        {
            "layers/no_such_layer": np.zeros(17, "float32"),
            **adapter_files.fingerprints(path, 5),
        },
    )


def _short_tensor(path):
    _edit(path, tensors={_sites(path)[0]: np.zeros(16, "float32")})


def _wrong_dtype(path):
    _edit(path, tensors={_sites(path)[0]: np.zeros(17, "float64")})


def _missing_head(path):
    _edit(path, tensors={"layers/dense#1": None})


def _wrong_head(path):
    _edit(path, tensors={"layers/dense#0": np.zeros((8, 4), "float32")})


def _more_head(path):
    _edit(path, tensors={"layers/dense#2": np.zeros(3, "float32")})


def _far_head(path):
    _edit(path, tensors={"layers/dense#7": np.zeros(3, "float32")})


def _unknown_tensors(path):
    names = ["nonsense#0", "layers/dense_1#0", "layers/dense#x"]
    _edit(path, tensors={name: np.zeros(3, "float32") for name in names})


def _many_unknown_tensors(path):
    _edit(
        path,
        tensors={f"nonsense#{i}": np.zeros(3, "float32") for i in range(7)},
    )


def _integer_head(path):
    _edit(path, tensors={"layers/dense#1": np.zeros(3, "int32")})


def _wide_head(path):
    _edit(path, tensors={"layers/dense#1": np.zeros(3, "float64")})


def _unknown_source(path):
    source = _sites(path)[0]
    _edit(path, {"sources": {"layers/nowhere": source, "nonsense#0": source}})


def _no_metadata(path):
    _edit(path, {"kept": None})


class TestBadFiles:
    @pytest.mark.parametrize(
        "damage, message",
        [
            (_truncate, "damaged or cut short"),
            (_garbage, "damaged or cut short"),
            (_empty, "damaged or cut short"),
            (_foreign, "not one that `keras_randadapt.save_adapter` wrote"),
            (_newer, "format version 3.*Upgrade"),
            (_no_metadata, "lacks the metadata \\['kept'\\]"),
            (_other_class, "is no registered adapter"),
            (_other_argument, "can't be made here"),
            (_other_seed, "trained with other bases"),
            (_other_model, "trained on a GPT2Backbone; this model is a Bert"),
            (_other_shapes, "kernels of other shapes.*8x16 in the file"),
            (_missing_site, "it misses sites"),
            (_unknown_site, "lacks 1 of its 6 addresses: .*no_such_layer"),
            (_short_tensor, "'beta' .* the file holds 7 values for it"),
            (_wrong_dtype, "float64 values"),
            (_missing_head, "holds nothing for weight 1 of the kept"),
            (_wrong_head, "shape \\(8, 4\\) for weight 0 of the kept"),
            (_more_head, "no weights of its kept layers: .'layers/dense#2'"),
            (_far_head, "no weights of its kept layers: .'layers/dense#7'"),
            (
                _unknown_tensors,
                "task.safetensors' holds tensors .*: .'layers/dense#x', "
                "'layers/dense_1#0', 'nonsense#0'.\\.",
            ),
            (_many_unknown_tensors, "'nonsense#4'. and 2 more"),
            (_integer_head, "int32 of shape .* weight 1 .* must be float32"),
            (_wide_head, "float64 of shape .* weight 1 .* must be float32"),
            (
                _unknown_source,
                "input layers of sites .*'layers/nowhere', 'nonsense#0'",
            ),
            (_other_layers, "was trained on a BertBackbone with other layers"),
            (_no_layers, "lacks the metadata \\['model.layers'\\]"),
        ],
        ids=lambda x: getattr(x, "__name__", ""),
    )
    def test_error_and_nothing_changed(self, saved, damage, message):
        damage(saved[2])
        fresh, _, _ = zoo.bert_classifier()
        self._check_refused(fresh, saved[2], message)

    @pytest.mark.parametrize(
        "metadata, message",
        [
            ([], "its metadata must be an object"),
            (3, "its metadata must be an object"),
            ("x", "its metadata must be an object"),
            ({"name": 3}, "metadata 'name' must be a string"),
            ({"adapter": "RLoRA"}, "metadata 'adapter' must be an object"),
            ({"adapter": {"class": 3, "config": []}}, "can't be made here"),
            ({"model": "x"}, "metadata 'model' must be an object"),
            ({"model": {}}, "lacks .*'model.class', 'model.layers'"),
            (
                {"model": {"class": 3, "layers": ""}},
                "metadata 'model.class' must be a string",
            ),
            (
                {"model": {"class": "X", "layers": 3}},
                "metadata 'model.layers' must be a string",
            ),
            (
                {"model": {"class": "X", "layers": "", "backbone": []}},
                "metadata 'model.backbone' must be a string",
            ),
            ({"kernel_views": 3}, "'kernel_views' must be a list of"),
            ({"kernel_views": [["8x8"]]}, "'kernel_views' must be a list of"),
            ({"kernel_views": ["8x8", 4]}, "'kernel_views' must be a list of"),
            ({"kernel_views": [[8, 4]]}, "'kernel_views' must be a list of"),
            (
                {"kernel_views": [["8x8", 0]]},
                "'kernel_views' must be a list of",
            ),
            (
                {"kernel_views": [["8x8", True]]},
                "'kernel_views' must be a list of",
            ),
            ({"kernel_views": [["8x8", 10**15]]}, "it misses sites"),
            ({"bases": ["x"]}, "'bases' must be an object of strings"),
            ({"bases": {"x": 3}}, "'bases' must be an object of strings"),
            ({"kept": 3}, "'kept' must be a list of distinct strings"),
            ({"kept": "layers/dense"}, "'kept' must be a list of distinct"),
            ({"kept": [3]}, "'kept' must be a list of distinct strings"),
            (
                {"kept": ["layers/dense", "layers/dense"]},
                "'kept' must be a list of distinct strings",
            ),
            ({"sources": []}, "'sources' must be an object of strings"),
            ({"sources": {"a": None}}, "'sources' must be an object of"),
            ({"preset": 3}, "'preset' must be a string"),
        ],
        ids=lambda x: None if isinstance(x, str) else json.dumps(x),
    )
    def test_malformed_metadata(self, tmp_path, metadata, message):
        model, _, targets = zoo.dense()
        kra.inject(model, kra.LoRA(2), targets)
        kra.save_adapter(model, tmp_path / "x")
        _edit(tmp_path / "x", metadata)
        self._check_refused(zoo.dense()[0], tmp_path / "x", message)

    def _check_refused(self, fresh, path, message):
        before = zoo.snapshot(fresh)
        classes = [type(layer) for layer in fresh._flatten_layers()]
        with pytest.raises(ValueError, match=message):
            kra.load_adapter(fresh, path)
        after = zoo.snapshot(fresh)
        assert list(after) == list(before)
        for key, (name, value) in before.items():
            np.testing.assert_array_equal(after[key][1], value, err_msg=name)
        assert [type(layer) for layer in fresh._flatten_layers()] == classes

    def test_kept_layer_that_is_quantized_here(self, tmp_path):
        """Its integers must not take the file's floats."""

        def build():
            inputs = keras.Input((4,))
            x = layers.Dense(4, name="site")(inputs)
            x = layers.Dense(4, use_bias=False, name="head")(x)
            return keras.Model(inputs, x)

        model = build()
        kra.inject(model, kra.LoRA(2), "site", keep_trainable="head")
        kra.save_adapter(model, tmp_path / "x")
        fresh = build()
        fresh.quantize("int8")
        with pytest.raises(ValueError, match="float32 .* must be int8"):
            kra.load_adapter(fresh, tmp_path / "x")
        assert kra.sites(fresh) == {}

    def test_two_places_that_fit(self, tmp_path):
        def tower(name):
            return keras.Sequential(
                [keras.Input((4,)), layers.Dense(3)], name=name
            )

        one = tower("one")
        kra.inject(one, kra.LoRA(2), "all-linear")
        kra.save_adapter(one, tmp_path / "x")
        inputs = keras.Input((4,))
        model = keras.Model(
            inputs, [tower("left")(inputs), tower("right")(inputs)]
        )
        with pytest.raises(ValueError, match="fits at several places"):
            kra.load_adapter(model, tmp_path / "x")

    def test_no_file(self, saved):
        with pytest.raises(FileNotFoundError, match="no file 'nowhere'"):
            kra.load_adapter(saved[0], "nowhere")

    def test_damaged_file_for_an_adapter_in_place(self, saved):
        model, x, path = saved
        out = zoo.outputs(model, x)
        _short_tensor(path)
        with pytest.raises(ValueError, match="17 float32 weights"):
            kra.load_adapter(model, path)
        np.testing.assert_array_equal(zoo.outputs(model, x), out)

    def test_name_is_another_adapters(self, saved):
        model, _, path = saved
        kra.eject(model)
        kra.inject(model, kra.LoRA(2), keep_trainable="logits")
        with pytest.raises(ValueError, match="differs from the one in"):
            kra.load_adapter(model, path)
        kra.load_adapter(model, path, name="other")

    def test_site_that_can_not_be_adapted(self, tmp_path):
        inputs = keras.Input((4,))
        model = keras.Model(inputs, layers.Dense(4)(inputs))
        kra.inject(model, kra.LoRA(2), "all-linear")
        kra.save_adapter(model, tmp_path / "x")

        class Dense(layers.Layer):
            def build(self, input_shape):
                self.w = self.add_weight(shape=(4, 4))

            def call(self, x):
                return x @ self.w

        inputs = keras.Input((4,))
        other = keras.Model(inputs, Dense()(inputs))
        with pytest.raises(ValueError, match="can't be adapted"):
            kra.load_adapter(other, tmp_path / "x")
