"""Drawing training examples from everything that `fit` takes."""

import itertools
import random

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt.callbacks.pac_bayes import PACBayes
from keras_randadapt.per_example import example_source
from tests import zoo
from tests.callbacks.linear_network import WholeDelta
from tests.callbacks.linear_network import attachments
from tests.callbacks.linear_network import data_of
from tests.callbacks.linear_network import fit
from tests.callbacks.linear_network import flat
from tests.callbacks.linear_network import network

pytestmark = pytest.mark.one_backend("torch")


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y, sizes):
        super().__init__()
        self.x, self.y = x, y
        self.ends = np.cumsum([0, *sizes])

    @property
    def num_batches(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        part = slice(self.ends[i], self.ends[i + 1])
        return self.x[part], self.y[part]


def _pipelines(x, y):
    """Every kind of pipeline that `fit` takes."""
    import tensorflow as tf
    import torch

    def generator(endless):
        for i in itertools.count():
            if i * 4 >= len(x) and not endless:
                return
            part = slice(i * 4 % len(x), i * 4 % len(x) + 4)
            yield x[part], y[part]

    tensors = torch.utils.data.TensorDataset(
        torch.from_numpy(x), torch.from_numpy(y)
    )
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(5)
    unknown = tf.data.Dataset.from_generator(
        lambda: generator(False),
        output_signature=(
            tf.TensorSpec((None, 3), "float32"),
            tf.TensorSpec((None, 1), "float32"),
        ),
    )
    return {
        "py_dataset": Batches(x, y, [3, 8, 1]),
        "tf_data": dataset,
        "tf_data_unknown": unknown,
        "tf_data_endless": dataset.repeat(),
        "data_loader": torch.utils.data.DataLoader(
            tensors, batch_size=5, shuffle=True
        ),
        "generator": generator(True),
        "list_of_batches": _Reiterable(lambda: generator(False)),
    }


class _Reiterable:
    def __init__(self, function):
        self.function = function

    def __iter__(self):
        return self.function()


class TestData:
    def test_every_pipeline(self):
        """With equal examples, whatever is drawn gives the same numbers."""
        x = np.tile(zoo.normal(1, 3), (12, 1))
        y = np.tile(zoo.normal(1, 1, seed=1), (12, 1))
        model = network()
        zoo.randomize(model)
        model.optimizer.learning_rate = 0.0
        # Without a strength, the step is not compiled for every callback.
        options = {"strength": 0.0, "samples": 5, "reference": "zero"}
        arrays = PACBayes(x, y, **options)
        fit(model, arrays, x, y, epochs=2)
        assert arrays.information.min() > 1e-3
        for name, pipeline in _pipelines(x, y).items():
            callback = PACBayes(pipeline, **options)
            fit(model, callback, x, y, epochs=2)
            np.testing.assert_allclose(
                callback.information, arrays.information, 1e-5, err_msg=name
            )

    @pytest.mark.parametrize(
        "name", ["arrays", "py_dataset", "tf_data", "data_loader"]
    )
    def test_draws_are_uniform_and_independent(self, name):
        x = np.arange(12, dtype="float32")[:, None] * np.ones((1, 3), "float32")
        y = x[:, :1]
        if name == "arrays":
            source = example_source.source_of(x, y)
        else:
            source = example_source.source_of(_pipelines(x, y)[name])
        generator = np.random.default_rng(0)
        (batch,) = source.draw(generator, 6000)
        drawn, targets = batch[0][:, 0].astype(int), batch[1][:, 0]
        np.testing.assert_array_equal(drawn, targets.astype(int))
        counts = np.bincount(drawn, minlength=12)
        # Chi-square of 11 degrees of freedom: 31.3 at one in a thousand.
        assert np.sum((counts - 500) ** 2 / 500) < 31.3
        # Of two slots, each pair is as likely as any other: 144 cells.
        pairs = np.zeros((12, 12))
        for _ in range(100):
            (batch,) = source.draw(generator, 32)
            drawn = batch[0][:, 0].astype(int)
            np.add.at(pairs, (drawn[::2], drawn[1::2]), 1)
        expected = 1600 / 144
        assert np.sum((pairs - expected) ** 2 / expected) < 200

    def test_streams_go_on(self):
        x = np.arange(12, dtype="float32")[:, None]
        stream = ((x[i : i + 4],) for i in range(0, 12, 4))
        source = example_source.source_of(stream)
        draws = [source.draw(None, 5)[0][0][:, 0] for _ in range(2)]
        np.testing.assert_array_equal(np.concatenate(draws), np.arange(10))
        with pytest.raises(ValueError, match="came to its end"):
            source.draw(None, 5)

    def test_pipeline_of_unknown_length_stops_after_an_epoch(self):
        endless = _Reiterable(lambda: itertools.repeat((np.ones((2, 1)),)))
        source = example_source.source_of(endless)
        (batch,) = source.draw(np.random.default_rng(0), 3, max_batches=4)
        assert batch[0].shape == (3, 1) and batch[1] is None

    def test_shapes_may_differ_from_batch_to_batch(self):
        """Texts padded to the longest of their batch, say."""
        model = keras.Sequential(
            [
                keras.Input((None, 3)),
                keras.layers.Dense(2, name="first"),
                keras.layers.GlobalAveragePooling1D(),
                keras.layers.Dense(1),
            ]
        )
        zoo.set_weights(model)
        kra.inject(model, WholeDelta(), "first")
        model.compile("sgd", "mse")
        # Equal rows: their mean does not depend on how many there are.
        batches = [
            (np.ones((2, n, 3), "float32"), np.ones((2, 1), "float32"))
            for n in (2, 4)
        ]
        zoo.randomize(model)
        model.optimizer.learning_rate = 0.0
        information = []
        for data in (batches, batches[:1]):
            data = _Reiterable(lambda data=data: iter(data))
            callback = PACBayes(data, samples=8, reference="zero")
            model.fit(*batches[0], verbose=0, callbacks=[callback])
            information.append(callback.information)
        np.testing.assert_allclose(*information, rtol=1e-5)

    @pytest.mark.slow
    def test_nested_inputs_and_integers(self):
        model, x, _ = zoo.bert_classifier()
        kra.inject(model, kra.RLoRA(5), keep_trainable="logits")
        y = zoo.integers(4, high=3)
        callback = PACBayes(x, y, samples=5, head_strength=1.0)
        model.compile(
            "adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        )
        model.fit(x, y, epochs=2, verbose=0, callbacks=[callback])
        assert callback.information.shape == (2, 4)
        assert callback.information[1].min() > 0
        assert callback.head_information.shape == (2, 1)
        assert len(callback.heads) == 1

    def test_raw_texts_of_a_keras_hub_task(self):
        """Preprocessed by the task, like those that `fit` is given."""
        import keras_hub
        import tensorflow as tf

        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film"]
        preprocessor = keras_hub.models.BertTextClassifierPreprocessor(
            keras_hub.models.BertTokenizer(vocabulary=words), sequence_length=6
        )
        backbone, _, _ = zoo.bert()
        model = keras_hub.models.BertTextClassifier(
            backbone, num_classes=2, preprocessor=preprocessor, dropout=0.0
        )
        kra.inject(model, WholeDelta(), keep_trainable="logits")
        texts, labels = ["a film", "film", "a a", "film a"], [0, 1, 0, 1]
        expected = preprocessor(texts)["token_ids"]
        dataset = tf.data.Dataset.from_tensor_slices((texts, labels)).batch(2)
        for data in ((texts, labels), (dataset,)):
            source = example_source.source_of(*data)
            (batch,) = source.draw(np.random.default_rng(0), 20)
            x, y, weights = example_source.preprocess(model, batch)
            assert weights is None
            which = [texts.index(_text(text)) for text in batch[0]]
            assert set(which) == {0, 1, 2, 3}
            np.testing.assert_array_equal(
                x["token_ids"], np.asarray(expected)[which]
            )
            np.testing.assert_array_equal(y, np.array(labels)[which])
        model.compile(
            "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        )
        callback = PACBayes(texts, labels, samples=5)
        model.fit(texts, np.array(labels), verbose=0, callbacks=[callback])
        assert callback.information.max() > 0

    def test_random_states_stay(self):
        import torch

        generator = torch.Generator().manual_seed(1)
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(torch.ones(6, 1)),
            batch_size=2,
            shuffle=True,
            generator=generator,
        )
        source = example_source.source_of(loader)

        def states():
            return [
                random.getstate(),
                np.random.get_state()[1].tolist(),
                torch.get_rng_state().tolist(),
                generator.get_state().tolist(),
            ]

        before = states()
        draws = []
        for seed in (5, 5, 6):
            with example_source.own_random_state(seed, loader):
                source.draw(np.random.default_rng(0), 3)
                draws.append(
                    (random.random(), np.random.rand(), float(torch.rand(())))
                )
        assert states() == before
        assert draws[0] == draws[1] != draws[2]

    @pytest.mark.parametrize("kind", ["arrays", "py_dataset"])
    def test_data_that_do_not_fit_the_model(self, kind):
        """Found before an epoch is spent."""
        x, y = data_of()
        model = network()
        before = flat(model)
        data = (zoo.normal(12, 4), y)
        if kind == "py_dataset":
            data = (Batches(*data, [6, 6]),)
        with pytest.raises(Exception):
            fit(model, PACBayes(*data, samples=5), x, y)
        np.testing.assert_array_equal(flat(model), before)
        assert not attachments(model)

    def test_labels_that_are_missing(self):
        x, y = data_of()
        with pytest.raises(ValueError, match="`PACBayes` has no `y`"):
            fit(network(), PACBayes(x), x, y)

    def test_a_text(self):
        with pytest.raises(TypeError, match="`x` must be arrays"):
            PACBayes("abc")

    def test_examples_for_batches(self):
        x, y = data_of()
        examples = _Reiterable(lambda: zip(x, y[:, 0]))
        with pytest.raises(ValueError, match="batch the data set"):
            fit(network(), PACBayes(examples), x, y)

    def test_empty_pipeline(self):
        x, y = data_of()
        model = network()
        with pytest.raises(ValueError, match="gave no batch"):
            fit(model, PACBayes(_Reiterable(lambda: iter(()))), x, y)
        assert not attachments(model)


def _text(text):
    return text.decode() if isinstance(text, bytes) else str(text)
