"""`convert`: a file becomes that of a LoRA, without a model."""

import json
import os
import re

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt import command_line
from keras_randadapt.adapters import base
from tests import adapter_files
from tests import methods
from tests import zoo
from tests.test_matrix import METHODS

#: Methods of which no LoRA computes the same, or none without the model, and
#: what a user is told to call.
REFUSED = {
    "BitFit": "merge",
    "Bottleneck": "load_adapter",
    "DoRA": "merge",
    "HiRA": "merge",
    "Hydra": "merge",
    "IA3": "merge",
    # It splits channels, and a file has dimensions alone.
    "LoKr": "to_lora",
    "OFT": "merge",
    "SAID": "to_lora",
}
#: Rows of the matrix whose arguments name no layer of the model here.
ELSEWHERE = ("bottleneck_parallel", "ia3_feedforward")
SITES = (
    "dense",
    "einsum_gemma",
    "einsum_shared",
    "embedding",
    "reversible_embedding",
    "conv1d_causal",
    "conv2d_grouped",
)


def _saved(path, adapter, builder=zoo.classifier, **arguments):
    """A file of an adapter, its model without adapters, and the outputs."""
    model, x, targets = builder()
    kra.inject(model, adapter, targets or ["query", "value"], **arguments)
    zoo.randomize(model)
    out = zoo.outputs(model, x)
    kra.save_adapter(model, path, preset="tiny")
    kra.eject(model)
    return str(path), model, x, out


def _convert(*arguments):
    return command_line.main(["convert", *map(str, arguments)])


class TestSameOutputs:
    @pytest.mark.one_backend
    @pytest.mark.parametrize("sites", SITES)
    @pytest.mark.parametrize(
        "make",
        [
            pytest.param(
                lambda: kra.RLoRA(3, seed=5), marks=pytest.mark.every_backend
            ),
            lambda: kra.LoRA(2, alpha=4),
            lambda: kra.RandLoRA(2, basis="sparse"),
        ],
        ids=["rlora", "lora", "randlora"],
    )
    def test_site_classes(self, tmp_path, make, sites):
        builder = zoo.SITE_CLASSES[sites]
        path, model, x, out = _saved(tmp_path / "a.st", make(), builder)
        assert _convert(path, tmp_path / "b.st") == 0
        report = kra.load_adapter(model, tmp_path / "b.st")
        assert report.method == "LoRA"
        methods.close(zoo.outputs(model, x), out)

    @pytest.mark.one_backend
    @pytest.mark.parametrize("name", sorted(set(METHODS) - set(ELSEWHERE)))
    def test_methods(self, tmp_path, capsys, name):
        template, target = METHODS[name](seed=3), tmp_path / "b.st"
        path, model, x, out = _saved(
            tmp_path / "a.st", template, keep_trainable="logits"
        )
        method = type(template).__name__
        way = REFUSED.get(method)
        if template.depends_on_base and method in ("LoRA", "SHiRA"):
            way = "to_lora"
        if name in ("dora_lokr", "loha_tucker"):
            way = way or "to_lora"
        if way is not None:
            assert _convert(path, target) == 2
            error = capsys.readouterr().err
            assert f"`{method}`" in error and way in error
            assert not target.exists()
            return
        assert _convert(path, target) == 0
        kra.load_adapter(model, target)
        methods.close(zoo.outputs(model, x), out)

    @pytest.mark.one_backend
    def test_only_site_of_said(self, tmp_path):
        """With one site it is known what the method drew for it."""
        path, model, x, out = _saved(tmp_path / "a.st", kra.SAID(9), zoo.dense)
        assert _convert(path, tmp_path / "b.st", "--rank", 6) == 0
        kra.load_adapter(model, tmp_path / "b.st")
        methods.close(zoo.outputs(model, x), out)

    @pytest.mark.one_backend
    def test_same_lora_as_in_the_model(self, tmp_path):
        path, model, _, _ = _saved(
            tmp_path / "a.st", kra.VeRA(3, seed=4, dropout=0.1)
        )
        assert _convert(path, tmp_path / "b.st") == 0
        kra.load_adapter(model, path)
        kra.to_lora(model)
        kra.save_adapter(model, tmp_path / "c.st", preset="tiny")
        files = [adapter_files.read(tmp_path / f"{n}.st") for n in "bc"]
        assert files[0][1] == files[1][1]
        for key, value in files[0][0].items():
            np.testing.assert_array_equal(value, files[1][0][key])


def _moving_model():
    """A model with state that training moves."""
    inputs = keras.Input((6,))
    x = keras.layers.Dense(5, name="hidden")(inputs)
    x = keras.layers.SpectralNormalization(keras.layers.Dense(5))(x)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    return zoo.set_weights(model)


@pytest.mark.one_backend
class TestWhatIsKept:
    def test_all_but_the_adapter(self, tmp_path):
        model, x = _moving_model(), zoo.normal(8, 6)
        kra.inject(model, kra.RLoRA(3), "hidden", keep_trainable="head")
        zoo.fit(model, x)
        kra.set_active(model, {"default": 0.5})
        kra.save_adapter(model, tmp_path / "a.st", preset="tiny")
        out = zoo.outputs(model, x)
        assert _convert(tmp_path / "a.st", tmp_path / "b.st") == 0
        before, told = adapter_files.read(tmp_path / "a.st")
        after, told_after = adapter_files.read(tmp_path / "b.st")
        for key in ("adapter", "bases", "digest"):
            assert told.pop(key) != told_after.pop(key)
        assert told == told_after and told["moved"] and told["weight"] == 0.5
        assert before.keys() == after.keys()
        for key, value in before.items():
            if "#" in key:
                np.testing.assert_array_equal(after[key], value)
        kra.eject(model)
        kra.load_adapter(model, tmp_path / "b.st")
        methods.close(zoo.outputs(model, x), out)

    def test_file_of_the_first_version(self, tmp_path, capsys):
        path, model, x, out = _saved(tmp_path / "a.st", kra.RLoRA(3))
        adapter_files.as_version_1(path)
        assert _convert(path, tmp_path / "b.st") == 0
        captured = capsys.readouterr()
        assert "version 1" in captured.out
        assert "no fingerprint of the base kernels" in captured.err
        with pytest.warns(kra.AdapterWarning, match="by an earlier version"):
            kra.load_adapter(model, tmp_path / "b.st")
        methods.close(zoo.outputs(model, x), out)

    def test_in_place(self, tmp_path):
        path, model, x, out = _saved(tmp_path / "a.st", kra.RLoRA(3))
        os.chmod(path, 0o640)
        assert _convert(path, path) == 0
        assert os.stat(path).st_mode & 0o777 == 0o640
        assert kra.load_adapter(model, path).method == "LoRA"
        methods.close(zoo.outputs(model, x), out)


@pytest.mark.one_backend
class TestSize:
    def test_rank_and_energy(self, tmp_path, capsys):
        path, _, _, _ = _saved(tmp_path / "a.st", kra.RLoRA(5))
        target = tmp_path / "b.st"
        assert _convert(path, target, "--rank", 2, "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert set(told["ranks"].values()) == {2}
        assert all(0 < lost < 1 for lost in told["energy_lost"].values())
        assert told["bytes"] == target.stat().st_size
        assert told["method"] == "RLoRA" and told["notes"] == []
        assert _convert(path, target, "--energy", 0.7, "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert all(0 < lost <= 0.3 for lost in told["energy_lost"].values())

    def test_larger_than_the_kernel(self, tmp_path, capsys):
        path, _, _, _ = _saved(tmp_path / "a.st", kra.RandLoRA(2))
        assert _convert(path, tmp_path / "b.st") == 0
        captured = capsys.readouterr()
        assert "energy lost" in captured.out
        assert "note: At 2 of 2 sites the LoRA is larger" in captured.err

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--rank", 0), "`rank` must be at least 1"),
            (("--rank", 7), "`rank` must be at most 6, .* of 'layers/dense'"),
            (("--energy", 0), "`energy` must be above 0"),
        ],
    )
    def test_errors(self, tmp_path, capsys, options, words):
        path, _, _, _ = _saved(tmp_path / "a.st", kra.RLoRA(5))
        assert _convert(path, tmp_path / "b.st", *options) == 2
        assert _matches(words, capsys) and not (tmp_path / "b.st").exists()

    def test_one_of_both(self, tmp_path):
        with pytest.raises(SystemExit) as raised:
            _convert("a", "b", "--rank", 2, "--energy", 0.5)
        assert raised.value.code == 2


def _matches(words, capsys):
    return re.search(words, capsys.readouterr().err)


@keras.saving.register_keras_serializable(package="tests")
class _ByBias(base.Adapter):
    """A method that reads what no file tells."""

    def build(self, site):
        size = 0 if site.bias_shape is None else 1
        self.shift = self.add_trainable(
            "shift", (site.output_dim + size,), "ones"
        )

    def delta_kernel(self):
        shift = self.shift[: self.output_dim]
        return keras.ops.ones((self.input_dim, 1)) * shift


@pytest.mark.one_backend
class TestRefused:
    def test_damaged(self, tmp_path, capsys):
        path, _, _, _ = _saved(tmp_path / "a.st", kra.RLoRA(3))
        metadata = adapter_files.read(path)[1]
        for views in (["6x8", "8x"], ["6x8", "8x0"], ["6x8", "-8x-8"], ["8"]):
            runs = [[view, 2 // len(views)] for view in views]
            adapter_files.edit(path, {"kernel_views": runs})
            assert _convert(path, tmp_path / "b.st") == 2
            assert _matches("damaged: the shape of the kernel", capsys)
        adapter_files.edit(path, {"kernel_views": [["6x8", 10**15]]})
        for command in ("convert", "inspect"):
            arguments = [path, str(tmp_path / "b.st")]
            arguments = arguments[: 2 if command == "convert" else 1]
            assert command_line.main([command, *arguments]) == 2
            assert _matches("damaged: it misses sites", capsys)
        adapter_files.edit(
            path,
            {
                "kernel_views": metadata["kernel_views"],
                "bases": {"query 6x8": "0" * 12},
            },
        )
        assert _convert(path, tmp_path / "b.st") == 2
        assert _matches("other bases than its seed gives", capsys)
        assert not (tmp_path / "b.st").exists()

    @pytest.mark.parametrize("view", ["6x16777217", "999999x999999"])
    def test_kernels_that_no_model_has(self, tmp_path, capsys, view):
        """They would fill the memory."""
        path, _, _, _ = _saved(tmp_path / "a.st", kra.RLoRA(3))
        adapter_files.edit(path, {"kernel_views": [[view, 2]]})
        assert _convert(path, tmp_path / "b.st") == 2
        assert _matches("claims a kernel of .*too large.*to_lora", capsys)

    def test_values_that_are_no_numbers(self, tmp_path, capsys):
        path, _, _, _ = _saved(tmp_path / "a.st", kra.RLoRA(3))
        tensors, _ = adapter_files.read(path)
        key = min(key for key in tensors if "#" not in key)
        adapter_files.edit(path, tensors={key: np.nan * tensors[key]})
        assert _convert(path, tmp_path / "b.st") == 2
        assert _matches("NaN or infinity", capsys)

    def test_what_only_the_model_tells(self, tmp_path, capsys):
        model, _, _ = zoo.classifier()
        kra.inject(model, _ByBias())
        kra.save_adapter(model, tmp_path / "a.st")
        assert _convert(tmp_path / "a.st", tmp_path / "b.st") == 2
        assert _matches("takes the `bias_shape` .*to_lora", capsys)

    def test_paths(self, tmp_path, capsys):
        path, _, _, _ = _saved(tmp_path / "a.st", kra.RLoRA(3))
        for target, words in (
            (tmp_path / "b.keras", "ending of another format"),
            (tmp_path / "nowhere" / "b.st", "There is no folder"),
            (tmp_path, "a folder, a pipe or a device"),
        ):
            assert _convert(path, target) == 2
            assert _matches(words, capsys)
        assert _convert(tmp_path / "c.st", tmp_path / "b.st") == 2
        assert _matches("There is no file", capsys)
