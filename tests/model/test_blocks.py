"""What a model computes, and what its loss is, inside a block."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from tests import zoo
from tests.methods import numpy


def _model(layer=None):
    inputs = keras.Input((6,))
    hidden = layer or keras.layers.Dense(8, activation="tanh", name="hidden")
    head = keras.layers.Dense(3, name="head")
    return zoo.set_weights(keras.Model(inputs, head(hidden(inputs))))


def _loss(model):
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x, y = zoo.normal(8, 6), zoo.normal(8, 3, seed=1)
    return model.evaluate(x, y, verbose=0)


@pytest.mark.parametrize(
    "adapter",
    [
        kra.LoRA(2, regularizer=kra.regularizers.Orthogonality(10.0)),
        kra.RMLoRA(2),
        kra.AdaLoRA(2),
    ],
    ids=lambda adapter: type(adapter).__name__,
)
def test_adapters_that_are_off_have_no_penalty(adapter):
    layer = keras.layers.Dense(
        8,
        activation="tanh",
        kernel_regularizer=keras.regularizers.L2(0.1),
        name="hidden",
    )
    model = _model(layer)
    base = _loss(model)
    kra.inject(model, adapter, "hidden")
    kra.inject(model, kra.LoRA(2), "hidden", name="plain")
    zoo.randomize(model)
    adapted = _loss(model)
    with kra.disabled(model):
        np.testing.assert_allclose(_loss(model), base, rtol=1e-5)
    with kra.active(model, "plain"):
        # A delta of zero, and the frozen base kernel has no penalty.
        plain = _loss(model)
    penalty = sum(map(float, map(numpy, layer.losses)), 0.0)
    kernel = numpy(layer._kernel)
    own = 0.1 * float(np.sum(kernel**2))
    np.testing.assert_allclose(plain, base - own, rtol=1e-4)
    with kra.merged(model):
        merged = _loss(model)
    out = kra.merge(model)
    np.testing.assert_allclose(merged, _loss(out), rtol=1e-5)
    assert adapted != merged and penalty >= 0


@keras.saving.register_keras_serializable(package="tests")
class Policy(keras.Model):
    """Its loss is the distance from a reference, as in preference tuning."""

    def __init__(self, reference, **kwargs):
        super().__init__(**kwargs)
        self.reference = reference
        self.hidden = keras.layers.Dense(8, activation="tanh", name="hidden")
        self.normalize = keras.layers.BatchNormalization(name="norm")
        self.head = keras.layers.Dense(3, name="head")

    def call(self, x, training=None):
        return self.head(self.normalize(self.hidden(x), training=training))

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        block = kra.disabled(self)
        if self.reference:
            block = kra.active(self, self.reference)
        with block:
            reference = self(x, training=False)
        return keras.ops.mean((y_pred - reference) ** 2)


def _policy(reference=None):
    model = Policy(reference)
    model(zoo.normal(2, 6))
    zoo.set_weights(model)
    if reference:
        kra.inject(
            model,
            kra.LoRA(2, seed=5),
            "hidden",
            name=reference,
            keep_trainable="head",
        )
        zoo.randomize(model, reference, seed=8)
    kra.inject(
        model, kra.LoRA(2), "hidden", name="policy", keep_trainable="head"
    )
    zoo.randomize(model, "policy")
    kra.set_active(model, "policy")
    model.head.kernel.assign(model.head.kernel + 0.5)
    return model


@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.parametrize("reference", [None, "reference"])
def test_reference_inside_a_training_step(reference, run_eagerly):
    """A head that is kept goes off with its adapter, and gradients stay."""
    x = zoo.normal(8, 6)
    model = _policy(reference)
    mine = numpy(model(x))
    if reference:
        with kra.active(model, reference):
            theirs = numpy(model(x))
    else:
        with kra.disabled(model):
            theirs = numpy(model(x))
    assert np.abs(mine - theirs).max() > 0.1
    model.compile(keras.optimizers.SGD(0.05), run_eagerly=run_eagerly)
    history = model.fit(x, batch_size=8, epochs=8, shuffle=False, verbose=0)
    losses = history.history["loss"]
    expected = float(np.mean((mine - theirs) ** 2))
    assert losses[0] == pytest.approx(expected, rel=1e-4)
    # The policy moves towards its reference, which stays where it was.
    assert losses[-1] < 0.8 * losses[0]
    with kra.active(model, reference) if reference else kra.disabled(model):
        np.testing.assert_allclose(numpy(model(x)), theirs, rtol=1e-6)
    assert model._randadapt.active == ("policy",)
    assert np.abs(numpy(model(x)) - mine).max() > 1e-3


def test_active_is_set_active_for_a_block():
    model = _model()
    kra.inject(model, kra.LoRA(2), "hidden", keep_trainable="head")
    kra.inject(model, kra.LoRA(2), "hidden", name="fr", keep_trainable="head")
    zoo.randomize(model)
    zoo.randomize(model, "fr", seed=4)
    x = zoo.normal(4, 6)
    model.get_layer("head").bias.assign([1.0, 2.0, 3.0])
    first = zoo.outputs(model, x)
    kra.set_active(model, "fr")
    model.get_layer("head").bias.assign([-1.0, 0.0, 1.0])
    second = zoo.outputs(model, x)
    kra.set_active(model, "default")
    with kra.active(model, "fr"):
        np.testing.assert_array_equal(zoo.outputs(model, x), second)
        with kra.disabled(model):
            pass
        with pytest.raises(ValueError, match="inside a `active` block"):
            kra.set_active(model, "fr")
        np.testing.assert_array_equal(zoo.outputs(model, x), second)
    np.testing.assert_array_equal(zoo.outputs(model, x), first)
    kra.set_active(model, "fr")
    np.testing.assert_array_equal(zoo.outputs(model, x), second)
    with pytest.raises(ValueError, match="no adapter called 'de'"):
        with kra.active(model, "de"):
            pytest.fail("entered a block of an unknown adapter")
