"""Exported programs: no warnings, and right for every batch size."""

import importlib.util
import logging
import warnings

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from tests import zoo
from tests.test_matrix import METHODS

BACKEND = keras.config.backend()

#: Methods with gradients of their own, and transforms in and around them.
NAMES = [
    "lora",
    "rlora",
    "rlora_stacked",
    "randlora",
    "randlora_hadamard",
    "vera",
    "vera_hadamard",
    "lorafa_hadamard",
    "said",
    "nola",
    "dora_rlora",
    "dvora",
]


def _adapted(name, quantized=False):
    model = keras.Sequential(
        [
            keras.Input((12,)),
            keras.layers.Dense(8, activation="tanh", name="first"),
            keras.layers.Dense(8, name="second"),
        ]
    )
    zoo.set_weights(model)
    kra.inject(model, METHODS[name](), ["first", "second"])
    zoo.randomize(model)
    return model


class _Records(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a SavedModel")
class TestSavedModel:
    @pytest.fixture
    def records(self):
        handler = _Records()
        logger = logging.getLogger("absl")
        logger.addHandler(handler)
        yield handler.messages
        logger.removeHandler(handler)

    @pytest.mark.parametrize("name", NAMES)
    def test_loads_without_warnings(self, name, tmp_path, records):
        import tensorflow as tf

        model = _adapted(name)
        model.export(tmp_path / "saved", verbose=False)
        records.clear()
        loaded = tf.saved_model.load(tmp_path / "saved")
        assert records == []
        x = zoo.normal(5, 12)
        np.testing.assert_allclose(
            loaded.serve(x).numpy(),
            zoo.outputs(model, x).reshape(5, 8),
            rtol=1e-4,
            atol=1e-5,
        )

    def test_a_quantized_tied_head(self, tmp_path, records):
        import tensorflow as tf

        head = keras.layers.ReversibleEmbedding(11, 8, name="head")
        inputs = keras.Input((5,), dtype="int32")
        hidden = keras.layers.Dense(8, name="below")(head(inputs))
        model = keras.Model(inputs, head(hidden, reverse=True))
        zoo.set_weights(model)
        model.quantize("int8", filters="head")
        kra.inject(model, kra.RLoRA(5), "below")
        model.export(tmp_path / "saved", verbose=False)
        records.clear()
        loaded = tf.saved_model.load(tmp_path / "saved")
        assert records == []
        x = zoo.integers(3, 5, high=11)
        np.testing.assert_allclose(
            loaded.serve(x).numpy().ravel(),
            zoo.outputs(model, x),
            rtol=1e-4,
            atol=1e-5,
        )

    @pytest.mark.parametrize("name", ["rlora", "randlora"])
    def test_gradients_of_gradients_are_as_before(self, name):
        """They are TensorFlow's own, of the operations of the gradient."""
        import tensorflow as tf

        model = _adapted(name)
        x = tf.constant(zoo.normal(3, 12))
        direction = tf.constant(zoo.normal(3, 12, seed=1))

        def first(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = tf.reduce_sum(model(x) ** 3)
            return tape.gradient(y, x)

        with tf.GradientTape() as tape:
            tape.watch(x)
            product = tf.reduce_sum(first(x) * direction)
        found = tape.gradient(product, x).numpy()
        step = 1e-2
        expected = (
            first(x + step * direction) - first(x - step * direction)
        ).numpy() / (2 * step)
        np.testing.assert_allclose(
            found, expected, rtol=2e-2, atol=2e-2 * np.abs(expected).max()
        )


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's tracers")
class TestTraces:
    """Keras's ONNX exporter traces with `torch.jit.trace`."""

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("example", [1, 64])
    def test_every_batch_size(self, name, example, monkeypatch):
        import torch

        from keras_randadapt.ops import torch as backend

        # From this batch size on, transforms go through blocks of rows.
        monkeypatch.setattr(backend, "_BLOCK", 16 * 12)
        model = _adapted(name).eval()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(
                model,
                (torch.tensor(zoo.normal(example, 12)),),
                check_trace=False,
            )
            for batch in (1, 3, 64, 100):
                x = torch.tensor(zoo.normal(batch, 12, seed=batch))
                np.testing.assert_allclose(
                    traced(x), model(x), rtol=1e-4, atol=1e-5
                )
        # ONNX has PyTorch's operations, and no autograd function.
        assert "PythonOp" not in str(traced.inlined_graph)

    def test_no_branch_on_the_batch_size(self):
        """The tracer warns of what it takes for a constant."""
        import torch

        def transform(x):
            return kra.ops.fwht(x * 1.0)

        x = torch.tensor(zoo.normal(2, 3, 12))
        with warnings.catch_warnings():
            warnings.simplefilter("error", torch.jit.TracerWarning)
            # Constants of the program, and sizes of the last axis.
            warnings.filterwarnings("ignore", ".*registered as constants.*")
            warnings.filterwarnings(
                "ignore", module=r".*keras_randadapt\.ops\.transforms"
            )
            warnings.filterwarnings(
                "ignore", module=r".*ops.*torch_tensors|keras\..*"
            )
            traced = torch.jit.trace(transform, (x,), check_trace=False)
        for shape in ((5, 1, 12), (1, 7, 12)):
            other = torch.tensor(zoo.normal(*shape))
            np.testing.assert_allclose(
                traced(other), transform(other), rtol=1e-4, atol=1e-5
            )

    @pytest.mark.parametrize("name", NAMES)
    def test_torch_export(self, name):
        import torch

        model = _adapted(name).eval()
        batch = torch.export.Dim("batch")
        with torch.no_grad():
            program = torch.export.export(
                model,
                (torch.tensor(zoo.normal(3, 12)),),
                dynamic_shapes=(({0: batch},),),
                strict=False,
            ).module()
            for size in (2, 5, 100):
                x = torch.tensor(zoo.normal(size, 12, seed=size))
                np.testing.assert_allclose(
                    program(x), model(x), rtol=1e-4, atol=1e-5
                )


class TestLiteRT:
    """`export(format="litert")`, which Keras has from TensorFlow."""

    @pytest.mark.skipif(BACKEND != "tensorflow", reason="Keras refuses others")
    @pytest.mark.parametrize(
        ("name", "merged"),
        [
            ("rlora", False),
            ("rlora", True),
            ("randlora_hadamard", False),
            # No kernel can hold it.
            ("bottleneck", False),
        ],
    )
    # TensorFlow recommends another package than its own interpreter.
    @pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
    def test_outputs(self, name, merged, tmp_path):
        import tensorflow as tf

        model, x = _adapted(name), zoo.normal(1, 12)
        out = zoo.outputs(model, x)
        if merged:
            kra.merge(model)
        path = str(tmp_path / "model.tflite")
        model.export(path, format="litert", verbose=False)
        run = tf.lite.Interpreter(model_path=path).get_signature_runner()
        (key,) = run.get_input_details()
        (y,) = run(**{key: x}).values()
        np.testing.assert_allclose(y.ravel(), out, rtol=1e-4, atol=1e-5)

    @pytest.mark.skipif(BACKEND == "tensorflow", reason="it works there")
    @pytest.mark.skipif(
        importlib.util.find_spec("litert_torch") is not None,
        reason="what Keras asks for is installed",
    )
    def test_where_keras_has_none(self, tmp_path):
        """docs/serving.md quotes what Keras says."""
        words = "LiteRT"
        recent = tuple(map(int, keras.version().split(".")[:2])) >= (3, 15)
        if BACKEND == "torch" and recent:
            words = (
                "To export to LiteRT with the PyTorch backend, you must "
                "install the `litert-torch` package"
            )
        with pytest.raises((ImportError, ValueError), match=words):
            _adapted("rlora").export(
                tmp_path / "model.tflite", format="litert", verbose=False
            )
