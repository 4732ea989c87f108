"""What setting `trainable` does in an adapted model."""

import keras
import numpy as np

import keras_randadapt as kra
from tests import zoo


def _model():
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, name="hidden"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dense(3, name="out"),
        ]
    )


def test_an_adapted_layer_that_is_set_trainable_trains_its_adapter_alone():
    model = _model()
    kra.inject(model, kra.BitFit(), ["hidden", "norm"])
    kra.inject(model, kra.LoRA(2), "hidden", name="waits")
    before = zoo.snapshot(model)
    trained = [weight.path for weight in model.trainable_weights]
    for name in ("hidden", "norm"):
        model.get_layer(name).trainable = True
    assert [weight.path for weight in model.trainable_weights] == trained
    x = zoo.normal(16, 6)
    zoo.fit(model, x)
    after = zoo.snapshot(model)
    for key, (path, value) in before.items():
        changed = np.any(after[key][1] != value)
        assert changed == (path in trained), path
    # It can be frozen, and thawed again.
    model.get_layer("hidden").trainable = False
    assert len(model.trainable_weights) == len(trained) - 1
    model.get_layer("hidden").trainable = True
    assert [weight.path for weight in model.trainable_weights] == trained
    kra.eject(model)
    assert len(model.trainable_weights) == 6
