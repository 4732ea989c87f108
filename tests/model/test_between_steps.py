"""Other threads during `fit`."""

import threading

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from tests import zoo


def _model():
    inputs = keras.Input((6,))
    x = keras.layers.Dense(8, activation="tanh", name="a")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    zoo.set_weights(model)
    kra.inject(model, kra.LoRA(2), "a", keep_trainable="head")
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def _fit(model, callbacks=(), epochs=3):
    model.fit(
        zoo.normal(32, 6),
        zoo.normal(32, 3, seed=1),
        batch_size=4,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
    )


class _InAnotherThread(keras.callbacks.Callback):
    """Starts a thread after a batch; the training goes on meanwhile."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.error = None
        self.thread = None

    def on_train_batch_end(self, batch, logs=None):
        if batch == 2 and self.thread is None:
            self.thread = threading.Thread(target=self._run)
            self.thread.start()

    def _run(self):
        try:
            self.function(self._model)
        except BaseException as error:
            self.error = error


def test_saving_during_fit_leaves_the_training_alone(tmp_path):
    expected = _model()
    _fit(expected)
    model = _model()
    path = tmp_path / "during.safetensors"
    saving = _InAnotherThread(lambda model: kra.save_adapter(model, path))
    _fit(model, [saving])
    saving.thread.join()
    assert saving.error is None
    x = zoo.normal(4, 6)
    np.testing.assert_array_equal(
        zoo.outputs(model, x), zoo.outputs(expected, x)
    )
    loaded = _model()
    start = zoo.outputs(loaded, x)
    kra.load_adapter(loaded, path)
    during = zoo.outputs(loaded, x)
    assert np.all(np.isfinite(during)) and np.any(during != start)


def test_saving_waits_for_the_end_of_fit_at_most(tmp_path):
    """The thread starts in the last batch, after which no step comes."""
    model = _model()
    path = tmp_path / "after.safetensors"
    saving = _InAnotherThread(lambda model: kra.save_adapter(model, path))
    model.fit(
        zoo.normal(12, 6),
        zoo.normal(12, 3, seed=1),
        batch_size=4,
        epochs=1,
        verbose=0,
        callbacks=[saving],
    )
    saving.thread.join()
    assert saving.error is None
    out = zoo.outputs(model, zoo.normal(4, 6))
    loaded = _model()
    kra.load_adapter(loaded, path)
    np.testing.assert_array_equal(zoo.outputs(loaded, zoo.normal(4, 6)), out)


def test_errors_of_saving_are_the_threads_own(tmp_path):
    model = _model()
    saving = _InAnotherThread(
        lambda model: kra.save_adapter(model, tmp_path / "a", name="none")
    )
    _fit(model, [saving])
    saving.thread.join()
    assert isinstance(saving.error, ValueError)
    assert "There is no adapter called 'none'" in str(saving.error)


@pytest.mark.skipif(
    keras.config.backend() != "jax",
    reason="only in JAX have variables no values during `fit`",
)
def test_all_else_is_refused_during_fit_on_jax():
    expected = _model()
    _fit(expected)
    model = _model()

    def block(model):
        with kra.disabled(model):
            pytest.fail("entered a block in another thread")

    refused = _InAnotherThread(block)
    _fit(model, [refused])
    refused.thread.join()
    assert isinstance(refused.error, (RuntimeError, ValueError))
    assert "trained" in str(refused.error)
    x = zoo.normal(4, 6)
    np.testing.assert_array_equal(
        zoo.outputs(model, x), zoo.outputs(expected, x)
    )
