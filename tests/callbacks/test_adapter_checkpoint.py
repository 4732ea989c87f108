"""Checkpoints of adapters: what is written, and training that goes on."""

import json
import os
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt.callbacks import adapter_checkpoint
from tests import zoo

X = zoo.normal(12, 6)
Y = zoo.normal(12, 3, seed=1)


def _model(adapter=None, optimizer="adamw"):
    """A model with dropout, whose masks depend on a random state."""
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, name="hidden"),
            keras.layers.Dropout(0.5, seed=3),
            keras.layers.Dense(3, name="head"),
        ]
    )
    zoo.set_weights(model)
    adapter = kra.LoRA(2, dropout=0.25) if adapter is None else adapter
    kra.inject(model, adapter, "hidden", keep_trainable="head")
    if optimizer == "adamw":
        rate = keras.optimizers.schedules.CosineDecay(0.05, 12)
        optimizer = keras.optimizers.AdamW(rate, ema_momentum=0.9)
    model.compile(optimizer, "mse")
    return model


def _fit(model, epochs, callbacks=(), first=0, **arguments):
    return model.fit(
        X,
        Y,
        epochs=epochs,
        initial_epoch=first,
        batch_size=4,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
        **arguments,
    )


def _values(model):
    return [
        np.array(keras.ops.convert_to_numpy(v))
        for v in [*model.variables, *model.optimizer.variables]
    ]


METHODS = {
    "lora": lambda: kra.LoRA(2, dropout=0.25),
    "rlora": lambda: kra.RLoRA(5),
    "randlora": lambda: kra.RandLoRA(3),
    "rmlora": lambda: kra.RMLoRA(2),
    "dylora": lambda: kra.DyLoRA(2),
    "sora": lambda: kra.SoRA(2),
    "pissa": lambda: kra.LoRA(2, initialization="pissa"),
    "dora": lambda: kra.DoRA(kra.LoRA(2)),
}


@pytest.mark.needs_optimizer
@pytest.mark.one_backend
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            # Dropout, and masks that depend on the step.
            marks=[pytest.mark.every_backend] * (name in ("lora", "rmlora")),
        )
        for name in METHODS
    ],
)
def test_training_goes_on_bit_for_bit(tmp_path, name):
    make = METHODS[name]
    whole = _model(make())
    _fit(whole, 4)
    path = tmp_path / "a.safetensors"
    first = _model(make())
    checkpoint = kra.callbacks.AdapterCheckpoint(path)
    assert checkpoint.resume(first) == 0
    _fit(first, 2, [checkpoint])
    again = _model(make())
    checkpoint = kra.callbacks.AdapterCheckpoint(path)
    assert checkpoint.resume(again) == 2
    _fit(again, 4, [checkpoint], first=2)
    for one, other in zip(_values(again), _values(whole), strict=True):
        np.testing.assert_array_equal(one, other)
    assert checkpoint.resume(_model(make())) == 4


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
        lambda: keras.optimizers.Lion(0.01, use_ema=True),
        lambda: keras.optimizers.Adafactor(0.05),
        lambda: kra.optimizers.GaLore(keras.optimizers.Adam(0.05), 1, 2),
        lambda: kra.optimizers.MaskedGradient(keras.optimizers.Adam(0.05), 1),
    ],
    ids=["SGD", "Lion", "Adafactor", "GaLore", "MaskedGradient"],
)
def test_optimizers(tmp_path, make):
    whole = _model(optimizer=make())
    _fit(whole, 3)
    first = _model(optimizer=make())
    path = tmp_path / "a.safetensors"
    _fit(first, 2, [kra.callbacks.AdapterCheckpoint(path)])
    again = _model(optimizer=make())
    epoch = kra.callbacks.AdapterCheckpoint(path).resume(again)
    _fit(again, 3, first=epoch)
    for one, other in zip(_values(again), _values(whole), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.one_backend
def test_several_adapters(tmp_path):
    def model():
        model = _model()
        kra.inject(model, kra.RLoRA(4), "hidden", name="b")
        kra.inject(model, kra.RLoRA(4, seed=1), "hidden", name="c")
        kra.set_active(
            model, {"default": 0.5, "b": 1, "c": 1}, train=["default", "b"]
        )
        return model

    whole = model()
    _fit(whole, 3)
    path = tmp_path / "a.safetensors"
    first = model()
    with pytest.raises(ValueError, match="say which with `name`"):
        _fit(first, 1, [kra.callbacks.AdapterCheckpoint(path)])
    first = model()
    _fit(first, 2, [kra.callbacks.AdapterCheckpoint(path, "b")])
    again = model()
    checkpoint = kra.callbacks.AdapterCheckpoint(path, "b")
    _fit(again, 3, [checkpoint], first=checkpoint.resume(again))
    for one, other in zip(_values(again), _values(whole), strict=True):
        np.testing.assert_array_equal(one, other)
    plain = _model()
    with pytest.raises(ValueError, match="has the adapters"):
        checkpoint.resume(plain)
    other = model()
    kra.set_active(other, ["default", "b", "c"], train=["default", "b"])
    with pytest.raises(ValueError, match="the weight 0.5, and in this model 1"):
        checkpoint.resume(other)


def test_kilobytes_that_load_everywhere(tmp_path):
    path = tmp_path / "a.safetensors"
    model = _model()
    _fit(model, 1, [kra.callbacks.AdapterCheckpoint(path)])
    assert sorted(os.listdir(tmp_path)) == [
        "a.safetensors",
        "a.training.safetensors",
    ]
    fresh = _model()
    kra.eject(fresh)
    kra.load_adapter(fresh, path)
    np.testing.assert_array_equal(zoo.outputs(fresh, X), zoo.outputs(model, X))
    assert (tmp_path / "a.training.safetensors").stat().st_size < 10_000


class _Scripted(keras.callbacks.Callback):
    """Puts values of its own into the logs, before the checkpoint."""

    def __init__(self, **values):
        super().__init__()
        self.values = values

    def on_epoch_end(self, epoch, logs=None):
        logs.update({key: one[epoch] for key, one in self.values.items()})


@pytest.mark.one_backend
class TestHabits:
    """They are those of `ModelCheckpoint`."""

    def _files(self, folder):
        return sorted(f for f in os.listdir(folder) if "training" not in f)

    def test_fields(self, tmp_path):
        path = str(tmp_path / "task-{epoch:02d}-{val_loss:.1f}.safetensors")
        checkpoint = kra.callbacks.AdapterCheckpoint(path)
        script = _Scripted(val_loss=[3.0, 2.0])
        _fit(_model(), 2, [script, checkpoint])
        assert self._files(tmp_path) == [
            "task-01-3.0.safetensors",
            "task-02-2.0.safetensors",
        ]
        assert os.path.basename(checkpoint.training_file) == (
            "task.training.safetensors"
        )

    @pytest.mark.parametrize(
        ("arguments", "values", "kept"),
        [
            ({}, {"val_loss": [3.0, 4.0, np.nan, 2.0]}, [1, 4]),
            ({"monitor": "val_acc"}, {"val_acc": [0.5, 0.4, 0.6, 0.6]}, [1, 3]),
            (
                {"monitor": "mine", "mode": "max"},
                {"mine": [1.0, 2.0, 0.0, 3.0]},
                [1, 2, 4],
            ),
        ],
    )
    def test_best_only(self, tmp_path, arguments, values, kept):
        path = str(tmp_path / "{epoch}.safetensors")
        checkpoint = kra.callbacks.AdapterCheckpoint(
            path, save_best_only=True, **arguments
        )
        _fit(_model(), 4, [_Scripted(**values), checkpoint])
        assert self._files(tmp_path) == [f"{i}.safetensors" for i in kept]
        # What was best is known after a restart.
        again = kra.callbacks.AdapterCheckpoint(
            path, save_best_only=True, **arguments
        )
        assert again.resume(_model()) == 4
        assert again.best == checkpoint.best

    def test_best_of_nothing(self, tmp_path):
        checkpoint = kra.callbacks.AdapterCheckpoint(
            tmp_path / "a.safetensors", save_best_only=True
        )
        with pytest.warns(kra.AdapterWarning, match="no 'val_loss' to tell"):
            _fit(_model(), 1, [checkpoint])
        assert self._files(tmp_path) == ["a.safetensors"]

    def test_batches(self, tmp_path):
        path = str(tmp_path / "{epoch}.safetensors")
        checkpoint = kra.callbacks.AdapterCheckpoint(path, save_freq=2)
        _fit(_model(), 1, [checkpoint])
        assert self._files(tmp_path) == ["1.safetensors"]
        # The first epoch was not complete.
        assert checkpoint.resume(_model()) == 0
        _fit(_model(), 2, [checkpoint])
        assert self._files(tmp_path) == ["1.safetensors", "2.safetensors"]

    def test_keep(self, tmp_path):
        path = str(tmp_path / "{epoch}.safetensors")
        checkpoint = kra.callbacks.AdapterCheckpoint(path, keep=2)
        _fit(_model(), 3, [checkpoint])
        assert self._files(tmp_path) == ["2.safetensors", "3.safetensors"]
        model = _model()
        checkpoint = kra.callbacks.AdapterCheckpoint(path, keep=2)
        _fit(model, 5, [checkpoint], first=checkpoint.resume(model))
        assert self._files(tmp_path) == ["4.safetensors", "5.safetensors"]

    def test_verbose(self, tmp_path, capsys):
        path = tmp_path / "a.safetensors"
        checkpoint = kra.callbacks.AdapterCheckpoint(
            path, save_best_only=True, verbose=1
        )
        _fit(_model(), 2, [_Scripted(val_loss=[3.0, 4.0]), checkpoint])
        said = capsys.readouterr().out
        assert "Epoch 1: val_loss improved from None to 3" in said
        assert f"Epoch 1: saving the adapter to {path}\n" in said
        assert "Epoch 2: val_loss did not improve" in said

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("{epoch}.safetensors", "checkpoint.training.safetensors"),
            ("a.safetensors", "a.training.safetensors"),
            ("a-{epoch:02d}.safetensors", "a.training.safetensors"),
            ("a", "a.training.safetensors"),
        ],
    )
    def test_name_of_the_training_file(self, name, expected):
        path = os.path.join("folder", name)
        found = kra.callbacks.AdapterCheckpoint(path).training_file
        assert found == os.path.join("folder", expected)

    @pytest.mark.parametrize(
        ("arguments", "error", "match"),
        [
            ({"mode": "up"}, ValueError, "`mode` must be"),
            ({"monitor": "mine"}, ValueError, "can't be told from its name"),
            ({"save_freq": "batch"}, TypeError, "`save_freq`"),
            ({"save_freq": 0}, ValueError, "`save_freq`"),
            ({"keep": 0}, ValueError, "`keep`"),
            ({"filepath": ""}, ValueError, "`filepath` must name a file"),
            ({"filepath": "{epoch"}, ValueError, "can't be read"),
        ],
    )
    def test_bad_arguments(self, arguments, error, match):
        arguments = {"filepath": "a.safetensors", **arguments}
        with pytest.raises(error, match=match):
            kra.callbacks.AdapterCheckpoint(**arguments)

    def test_bad_paths_are_told_before_the_first_step(self, tmp_path):
        for path, error in (
            (tmp_path / "nowhere" / "a.safetensors", FileNotFoundError),
            (tmp_path / "a.h5", ValueError),
        ):
            model = _model()
            before = _values(model)
            with pytest.raises(error):
                _fit(model, 1, [kra.callbacks.AdapterCheckpoint(path)])
            for one, other in zip(_values(model), before):
                np.testing.assert_array_equal(one, other)

    def test_field_that_no_log_fills(self, tmp_path):
        path = str(tmp_path / "{val_x}.safetensors")
        with pytest.raises(ValueError, match="can't be filled: 'val_x'"):
            _fit(_model(), 1, [kra.callbacks.AdapterCheckpoint(path)])


@pytest.mark.one_backend
class TestRefusals:
    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / "a.safetensors"
        _fit(_model(), 1, [kra.callbacks.AdapterCheckpoint(path)])
        return path

    def _check(self, path, model, match):
        before = _values(model)
        with pytest.raises(ValueError, match=match):
            kra.callbacks.AdapterCheckpoint(path).resume(model)
        for one, other in zip(_values(model), before):
            np.testing.assert_array_equal(one, other)

    def test_another_optimizer(self, path):
        model = _model(optimizer="sgd")
        self._check(path, model, "in the optimizer's variables it has")

    def test_another_adapter(self, path):
        other = _model(kra.LoRA(2, dropout=0.25, alpha=8))
        self._check(path, other, "does not fit this model")
        fewer = _model(kra.LoRA(2))
        self._check(path, fewer, "in the random generators .* it has 2 of")

    def test_another_base(self, path):
        model = _model()
        kernel = model.get_layer("hidden")._kernel
        kernel.assign(2 * keras.ops.convert_to_tensor(kernel))
        self._check(path, model, "other base weights")

    def test_another_backend(self, path, monkeypatch):
        monkeypatch.setattr(keras.config, "backend", lambda: "other")
        model = _model()
        with pytest.raises(ValueError, match="was written on"):
            kra.callbacks.AdapterCheckpoint(path).resume(model)

    def test_not_compiled(self, path):
        model = keras.Sequential(
            [keras.Input((6,)), keras.layers.Dense(8, name="hidden")]
        )
        kra.inject(model, kra.LoRA(2), "hidden")
        with pytest.raises(ValueError, match="is not compiled"):
            kra.callbacks.AdapterCheckpoint(path).resume(model)

    def test_it_is_no_adapter_file(self, path):
        model, _, _ = zoo.classifier()
        file = path.parent / "a.training.safetensors"
        with pytest.raises(ValueError, match="training file of an .*`resume`"):
            kra.load_adapter(model, file)

    @pytest.mark.parametrize("damage", ["cut", "foreign", "version"])
    def test_damaged(self, path, damage):
        file = path.parent / "a.training.safetensors"
        data = file.read_bytes()
        if damage == "cut":
            file.write_bytes(data[:-20])
            match = "damaged or cut short"
        elif damage == "foreign":
            file.write_bytes(path.read_bytes())
            match = "is no file that `AdapterCheckpoint` wrote"
        else:
            old, new = rb"\"version\": 1", rb"\"version\": 9"
            assert old in data
            file.write_bytes(data.replace(old, new))
            match = "has version 9"
        self._check(path, _model(), match)


_KILLED = """
import sys
from tests.callbacks import test_adapter_checkpoint as tests
import keras, keras_randadapt as kra, os, signal

class Kill(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if self.model.optimizer.iterations == 8:
            os.kill(os.getpid(), signal.SIGKILL)

model = tests._model()
checkpoint = kra.callbacks.AdapterCheckpoint(sys.argv[1])
tests._fit(model, 4, [checkpoint, Kill()])
"""


@pytest.mark.slow(reason="it starts a process")
def test_after_a_kill(tmp_path):
    """The process dies in the middle of the third epoch."""
    path = str(tmp_path / "a.safetensors")
    done = subprocess.run([sys.executable, "-c", _KILLED, path], check=False)
    assert done.returncode == -signal.SIGKILL
    whole = _model()
    _fit(whole, 4)
    model = _model()
    checkpoint = kra.callbacks.AdapterCheckpoint(path)
    epoch = checkpoint.resume(model)
    assert epoch == 2
    _fit(model, 4, [checkpoint], first=epoch)
    for one, other in zip(_values(model), _values(whole), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.one_backend
def test_bfloat16_is_stored_bit_for_bit():
    bits = np.array([0x3F80, 0xC2A7, 0x0001], "uint16")
    values = adapter_checkpoint.training_file._restored(
        bits, keras.Variable([0.0, 0.0, 0.0], dtype="bfloat16")
    )
    assert values[0] == 1.0
    np.testing.assert_array_equal(values.view("uint32") >> 16, bits)
    json.dumps(values.tolist())
