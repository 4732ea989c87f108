"""Tasks of KerasHub: a step, a preset and back, and texts and images made.

Each task has the backbone that the tables have, so the sizes are tiny.
"""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from tests import zoo
from tests.backbones import row as row_lib
from tests.backbones import tables

pytestmark = [
    pytest.mark.slow("whole tasks, with their compiled loops"),
    # What is trained here is trained in front of a random head on purpose.
    pytest.mark.filterwarnings(
        "ignore:The head of task:keras_randadapt.AdapterWarning"
    ),
]


@dataclasses.dataclass(frozen=True)
class Task:
    """A tiny task.

    Attributes:
        name: Its class in `keras_hub.models`.
        backbone: The name of its row in the tables.
        arguments: dict of its other arguments.
        targets: See `inject`.
        labels: Function from the task's outputs to labels.
        loss: `"classes"`, `"mse"`, or `None` for the task's own.
        prompt: The name of the mask of a prompt that `generate` goes on with,
            or `None`.
        fits: Whether KerasHub lets the task be trained. If not, its backbone
            is trained inside it.
        loading: dict of arguments that `from_preset` of the task needs.
        not_loaded: The error of KerasHub's `from_preset`, where it can't load
            what its own `save_to_preset` writes, or `None`.
    """

    name: str
    backbone: str
    arguments: dict = dataclasses.field(default_factory=dict)
    targets: object = None
    labels: Callable | None = None
    loss: str | None = "classes"
    prompt: str | None = None
    fits: bool = True
    loading: dict = dataclasses.field(default_factory=dict)
    not_loaded: str | None = None


def _classes(y):
    """Random classes for logits: one for all axes but the last."""
    return zoo.integers(*y.shape[:-1], high=y.shape[-1], seed=5)


def _maps(y):
    """A random class for each pixel, as one number each."""
    return np.eye(y.shape[-1], dtype="float32")[_classes(y)]


def _boxes(y):
    """One box an image, as large as the smallest that RetinaNet looks for."""
    box = np.array([[0.0, 0.0, 32.0, 32.0]], "float32")
    return {
        "boxes": np.tile(box, (row_lib.BATCH, 1, 1)),
        "labels": np.ones((row_lib.BATCH, 1), "int32"),
    }


def _like(y):
    return keras.tree.map_structure(
        lambda part: zoo.normal(*part.shape, seed=5), y
    )


TASKS = {
    "text_classification": Task(
        "BertTextClassifier",
        "BertBackbone",
        {"num_classes": 3, "dropout": 0.0},
        labels=_classes,
    ),
    "causal_lm": Task(
        "GPT2CausalLM", "GPT2Backbone", labels=_classes, prompt="padding_mask"
    ),
    "seq_2_seq_lm": Task(
        "BartSeq2SeqLM",
        "BartBackbone",
        labels=_classes,
        prompt="decoder_padding_mask",
    ),
    "image_classification": Task(
        "ViTImageClassifier", "ViTBackbone", {"num_classes": 3}, labels=_classes
    ),
    "segmentation": Task(
        "SegFormerImageSegmenter",
        "SegFormerBackbone",
        {"num_classes": 3},
        targets="all-linear",
        labels=_maps,
        loss="categorical_crossentropy",
    ),
    "detection": Task(
        "RetinaNetObjectDetector",
        "RetinaNetBackbone",
        {"num_classes": 3, "bounding_box_format": "xyxy"},
        targets=lambda layer: isinstance(layer, keras.layers.Conv2D),
        labels=_boxes,
        loss=None,
        # The generator of anchors has no `get_config`.
        not_loaded="AnchorGenerator.*could not be deserialized",
    ),
    "speech_to_text": Task(
        "MoonshineAudioToText",
        "MoonshineBackbone",
        labels=_classes,
        prompt="decoder_padding_mask",
        # The backbone's config has a name where KerasHub expects a policy.
        loading={"dtype": "float32"},
    ),
    "text_to_image": Task(
        "StableDiffusion3TextToImage",
        "StableDiffusion3Backbone",
        targets="all-linear",
        labels=_like,
        loss="mse",
        fits=False,
    ),
}


def _built(task):
    import keras_hub

    row = tables.ROWS[task.backbone]
    backbone = row_lib.built(row)
    cls = getattr(keras_hub.models, task.name)
    model = cls(backbone=backbone, preprocessor=None, **task.arguments)
    x = row_lib.inputs_of(backbone, row)
    if task.prompt:
        model.compile(sampler="greedy")
    return model, x


def _train(task, model, x):
    """One step of training."""
    trained = model if task.fits else model.backbone
    labels = task.labels(trained(x, training=False))
    arguments = {"optimizer": keras.optimizers.Adam(0.05)}
    if task.loss == "classes":
        arguments["loss"] = keras.losses.SparseCategoricalCrossentropy(True)
    elif task.loss:
        arguments["loss"] = task.loss
    if task.prompt:
        arguments["sampler"] = "greedy"
    trained.compile(**arguments)
    trained.fit(x, labels, batch_size=row_lib.BATCH, epochs=1, verbose=0)


def _generated(task, model, x):
    """Tokens after the first two, by the compiled loop."""
    mask = np.zeros_like(x[task.prompt])
    mask[:, :2] = 1
    made = model.generate({**x, task.prompt: mask}, stop_token_ids=None)
    return np.asarray(made[task.prompt.replace("padding_mask", "token_ids")])


def _expected(task, model, x):
    """The same tokens, each by a call with all tokens before it."""
    name = task.prompt.replace("padding_mask", "token_ids")
    tokens = np.array(x[name])
    mask = np.ones_like(x[task.prompt])
    for i in range(2, tokens.shape[1]):
        logits = model({**x, name: tokens, task.prompt: mask}, training=False)
        logits = keras.ops.convert_to_numpy(logits)
        tokens[:, i] = np.argmax(logits[:, i - 1], axis=-1)
    return tokens


def _values(variables):
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


@pytest.mark.parametrize(
    "task",
    [
        pytest.param(task, id=name, marks=pytest.mark.one_backend(number))
        for number, (name, task) in enumerate(TASKS.items())
    ],
)
def test_task(task, tmp_path):
    import keras_hub

    model, x = _built(task)
    base_y = zoo.outputs(model, x)
    variables = list(model.weights)
    base = _values(variables)
    if task.prompt:
        # What is compiled here must not be used any more after an injection.
        base_tokens = _generated(task, model, x)
    kra.inject(model, kra.LoRA(1, seed=1), task.targets)
    np.testing.assert_allclose(zoo.outputs(model, x), base_y, atol=1e-5)

    first = _values(model.trainable_variables)
    _train(task, model, x)
    trained = _values(model.trainable_variables)
    assert not all(map(np.array_equal, first, trained))
    assert all(map(np.array_equal, base, _values(variables)))

    zoo.randomize(model, scale=1.0)
    y = zoo.outputs(model, x)
    assert np.max(np.abs(y - base_y)) > 0.01 * np.max(np.abs(base_y))
    if task.prompt:
        tokens = _generated(task, model, x)
        np.testing.assert_array_equal(tokens, _expected(task, model, x))
        with kra.merged(model):
            np.testing.assert_array_equal(_generated(task, model, x), tokens)
        with kra.disabled(model):
            made = _generated(task, model, x)
            np.testing.assert_array_equal(made, base_tokens)

    folder = tmp_path / "preset"
    model.save_to_preset(str(folder))
    cls = getattr(keras_hub.models, task.name)
    arguments = {"preprocessor": None, **task.loading}
    if task.not_loaded:
        with pytest.raises(TypeError, match=task.not_loaded):
            cls.from_preset(str(folder), **arguments)
        loaded, _ = _built(task)
    else:
        loaded = cls.from_preset(str(folder), **arguments)
    np.testing.assert_allclose(zoo.outputs(loaded, x), base_y, atol=1e-5)
    kra.load_adapter(loaded, folder / "default.adapter.safetensors")
    np.testing.assert_allclose(zoo.outputs(loaded, x), y, rtol=1e-4, atol=1e-4)
