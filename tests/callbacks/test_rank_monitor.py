"""What RankMonitor logs, and who sees it."""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from tests import zoo

pytestmark = pytest.mark.one_backend("torch")


def _case(**compile_args):
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(8, activation="tanh", name="first")(inputs)
    outputs = keras.layers.Dense(5, name="second")(hidden)
    model = zoo.set_weights(keras.Model(inputs, outputs))
    kra.inject(model, kra.LoRA(2), ["first", "second"])
    model.compile("adam", "mse", **compile_args)
    return model, zoo.normal(8, 6), zoo.normal(8, 5)


def _fit(model, x, y, *callbacks, epochs=3, **kwargs):
    return model.fit(
        x, y, epochs=epochs, callbacks=callbacks, verbose=0, **kwargs
    ).history


class Copy(keras.callbacks.Callback):
    """Keeps what the analysis says at the ends of epochs."""

    def __init__(self):
        super().__init__()
        self.tables = []

    def on_epoch_end(self, epoch, logs=None):
        self.tables.append(kra.analysis.delta_statistics(self.model))


class TestRankMonitor:
    # On PyTorch, the compiler alone takes 15 CPU seconds to start.
    @pytest.mark.one_backend("tensorflow")
    @pytest.mark.parametrize("jit_compile", [False, True])
    def test_history(self, jit_compile):
        model, x, y = _case(jit_compile=jit_compile)
        monitor, copy = kra.callbacks.RankMonitor(), Copy()
        history = _fit(model, x, y, monitor, copy)
        for name, column in (
            ("rank_mean", "rank"),
            ("effective_rank_mean", "effective_rank"),
            ("orthogonality_mean", "orthogonality_loss"),
        ):
            expected = [table[column].mean() for table in copy.tables]
            np.testing.assert_allclose(history[name], expected, rtol=1e-6)
        # It trains, so it moves.
        assert len(set(history["effective_rank_mean"])) == 3
        assert monitor.table["site"].tolist() == list(kra.sites(model))

    def test_training_is_what_it_is_without_it(self):
        histories = []
        for callbacks in ([], [kra.callbacks.RankMonitor()]):
            model, x, y = _case()
            histories.append(
                _fit(model, x, y, *callbacks, validation_data=(x, y))
            )
        for name, values in histories[0].items():
            np.testing.assert_allclose(values, histories[1][name], rtol=1e-6)

    def test_sites_prefix_and_frequency(self):
        model, x, y = _case()
        monitor = kra.callbacks.RankMonitor(
            per_site=True, prefix="adapter_", frequency=2, tolerance=0.9999
        )
        history = _fit(model, x, y, monitor, epochs=5)
        assert len(history["loss"]) == 5
        assert history["adapter_rank_mean"] == [1, 1]
        for site in kra.sites(model):
            assert history[f"adapter_rank/{site}"] == [1, 1]
            assert len(history[f"adapter_orthogonality/{site}"]) == 2
        assert "rank_mean" not in history

    def test_one_of_several_adapters(self):
        model, x, y = _case()
        kra.inject(model, kra.LoRA(3), "all-linear", name="other")
        zoo.randomize(model, "other")
        history = _fit(model, x, y, kra.callbacks.RankMonitor("other"))
        assert history["rank_mean"] == [3, 3, 3]

    def test_early_stopping_behind_it(self):
        model, x, y = _case()
        stop = keras.callbacks.EarlyStopping(
            "orthogonality_mean", mode="min", min_delta=100, patience=1
        )
        history = _fit(model, x, y, kra.callbacks.RankMonitor(), stop)
        assert len(history["rank_mean"]) == 2

    def test_tensorboard(self, tmp_path):
        """Behind RankMonitor in the list, it writes what was logged."""
        import tensorflow as tf

        model, x, y = _case()
        history = _fit(
            model,
            x,
            y,
            kra.callbacks.RankMonitor(),
            keras.callbacks.TensorBoard(tmp_path, write_graph=False),
        )
        written = {}
        (path,) = (tmp_path / "train").glob("events.out.tfevents.*")
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                number = float(tf.make_ndarray(value.tensor))
                written.setdefault(value.tag, {})[event.step] = number
        for name in ("rank_mean", "effective_rank_mean", "orthogonality_mean"):
            epochs = written[f"epoch_{name}"]
            assert list(epochs) == [0, 1, 2]
            np.testing.assert_allclose(
                list(epochs.values()), history[name], rtol=1e-6
            )

    def test_errors(self):
        monitor = kra.callbacks.RankMonitor
        for arguments, error, message in (
            ({"frequency": 0}, ValueError, "`frequency` must be at least 1"),
            ({"frequency": 1.5}, TypeError, "`frequency` must be an integer"),
            ({"prefix": 3}, TypeError, "`prefix` must be a string"),
            ({"prefix": "val_"}, ValueError, "must not begin with 'val_'"),
            ({"tolerance": 2}, ValueError, "`tolerance` must be at least 0"),
        ):
            with pytest.raises(error, match=message):
                monitor(**arguments)
        model, x, y = _case()
        with pytest.raises(ValueError, match="no adapter called 'other'"):
            _fit(model, x, y, monitor("other"))
        kra.set_active(model, [])
        with pytest.raises(ValueError, match="No adapter of model"):
            _fit(model, x, y, monitor())
        kra.eject(model)
        with pytest.raises(ValueError, match="has no adapter attached"):
            _fit(model, x, y, monitor())
