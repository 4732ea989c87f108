"""Clones of adapted models are base models with the flags of before."""

import copy

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from tests import zoo
from tests.interruptions import FailingAssignment

pytestmark = pytest.mark.one_backend


def _nested():
    inner = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(6, name="hidden"),
            keras.layers.BatchNormalization(name="norm"),
        ],
        name="inner",
    )
    inputs = keras.Input((6,))
    outputs = keras.layers.Dense(3, name="head")(inner(inputs))
    return keras.Model(inputs, outputs), zoo.normal(4, 6), "hidden"


def _flags(model):
    """The flags of layers and of their weights, by place in the model."""
    return [
        (type(layer).__name__, layer.trainable, [w.trainable for w in weights])
        for layer in model._flatten_layers()
        if (weights := layer.weights)
    ]


def _of_model(build, freeze):
    model, x, targets = build()
    frozen = [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.Dense)
    ][-1]
    if freeze:
        frozen.trainable = False
    return model, x, targets


@pytest.mark.parametrize(
    "clone",
    [
        keras.models.clone_model,
        lambda model: keras.models.clone_model(
            model,
            clone_function=lambda layer: type(layer).from_config(
                layer.get_config()
            ),
        ),
        lambda model: keras.models.clone_model(model, recursive=True),
    ],
    ids=["plain", "clone_function", "recursive"],
)
@pytest.mark.parametrize("freeze", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize(
    "build",
    [zoo.sequential, zoo.functional, _nested, zoo.classifier, zoo.subclassed],
    ids=lambda build: build.__name__,
)
def test_clone_has_the_flags_of_before(build, freeze, clone):
    model, x, targets = _of_model(build, freeze)
    if build is zoo.subclassed and clone is not keras.models.clone_model:
        with pytest.raises(ValueError, match="only supported for|custom"):
            keras.models.clone_model(model, clone_function=lambda x: x)
        clone = keras.models.clone_model
    expected = _flags(clone(model))
    kra.inject(model, kra.LoRA(2), targets)
    cloned = clone(model)
    assert _flags(cloned) == expected
    assert kra.sites(cloned) == {} and type(cloned) is type(clone(cloned))
    zoo.outputs(cloned, x)
    # It can be adapted by itself, and the first is none the worse for it.
    kra.inject(cloned, kra.LoRA(2), targets)
    kra.eject(model)
    assert _flags(clone(model)) == expected


def test_a_trained_clone_moves_like_a_base_model():
    model, x, targets = zoo.classifier()
    kra.inject(model, kra.LoRA(2), targets, keep_trainable="logits")
    clone = keras.models.clone_model(model)
    before = zoo.snapshot(clone)
    zoo.fit(clone, x)
    after = zoo.snapshot(clone)
    assert len(after) == 6
    for key, (path, value) in before.items():
        assert np.any(after[key][1] != value), path


def test_clone_of_a_compiled_model():
    model, x, targets = zoo.classifier()
    model.compile("adam", "mse")
    kra.inject(model, kra.LoRA(2), targets)
    clone = keras.models.clone_model(model)
    clone.fit(x, zoo.normal(4, 3), verbose=0)
    assert len(clone.trainable_variables) == 6


def test_nothing_is_left_behind():
    model, _, targets = _nested()
    before = [set(vars(layer)) for layer in model._flatten_layers()]
    kra.inject(model, kra.LoRA(2), targets)
    kra.inject(model, kra.LoRA(2), targets, name="second")
    kra.eject(model)
    after = [set(vars(layer)) for layer in model._flatten_layers()]
    assert [a - b for a, b in zip(after, before)] == [set() for _ in before]

    with pytest.raises(MemoryError):
        with FailingAssignment(1):
            kra.inject(model, kra.LoRA(2, initialization="pissa"), targets)
    after = [set(vars(layer)) for layer in model._flatten_layers()]
    assert [a - b for a, b in zip(after, before)] == [set() for _ in before]


def test_copies_and_files_are_adapted_as_before(tmp_path):
    model, x, targets = _nested()
    model.get_layer("head").trainable = False
    kra.inject(model, kra.LoRA(2), targets)
    zoo.randomize(model)
    model.save(tmp_path / "m.keras")
    for twin in (
        copy.deepcopy(model),
        keras.models.load_model(tmp_path / "m.keras"),
    ):
        np.testing.assert_array_equal(
            zoo.outputs(twin, x), zoo.outputs(model, x)
        )
        # Keras itself may give weights in nested models other paths.
        assert [w.name for w in twin.trainable_weights] == ["lora_a", "lora_b"]
        kra.eject(twin)
        assert not twin.get_layer("head").trainable
        assert len(twin.trainable_weights) == 4
