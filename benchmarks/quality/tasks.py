"""The tasks of the experiments: a pretrained model and a few examples.

A task loads its model once. The seed of a run determines its training examples
and the first values of its head. The run injects an adapter, trains it,
measures scores and restores the model.
"""

import math
import pathlib
import sys

import keras
import numpy as np

import keras_randadapt as kra

sys.path.append(str(pathlib.Path(__file__).parents[2] / "examples"))

import classifier  # noqa: E402
import data  # noqa: E402
import dinov2  # noqa: E402
import recipe  # noqa: E402
import smollm2  # noqa: E402

#: The learning rate of the head, the same for every method.
HEAD_RATE = 3e-3

EVALUATION_BATCH = 50


class Task:
    """The base of the tasks.

    Args:
        per_class: int. The number of training examples of each class.
        epochs: int.
        held_out: int. The number of held-out examples, by which
            hyperparameters are chosen.
        test: int. The largest number of test examples.
    """

    #: The layers to adapt, and the head, as `inject` takes them.
    targets = None
    head = None
    # There are few examples, so batches are small to make enough steps.
    batch_size = 16
    # The number of examples in an estimate, as in the paper.
    pac_bayes_samples = 100
    #: The heading, format and factor of each score.
    score_columns = {
        "test": ("test accuracy, %", ".1f", 100),
        "gap": ("train minus test", ".1f", 100),
    }

    def __init__(self, per_class, epochs, held_out, test):
        self.per_class = per_class
        self.epochs = epochs
        self.held_out_size = held_out
        self.test_size = test
        self._held_out = None
        self._test = None

    def load(self):
        """Loads the model, as `self.model`, and the data."""
        raise NotImplementedError

    def examples(self, seed):
        """Training inputs and labels."""
        raise NotImplementedError

    def score(self, x, y):
        """The model's score on examples; larger is better."""
        return accuracy(self.model, x, y)

    def train(
        self,
        seed,
        final,
        adapter,
        rate,
        callbacks=None,
        measure=None,
        whole=None,
    ):
        """One run.

        Args:
            seed: int. It determines examples, head, batches and dropout.
            final: bool. Whether to measure on training and test examples,
                instead of the held-out ones.
            adapter: An adapter template, or `None` for the head alone.
            rate: float. The learning rate of the adapter, or of the head if
                there is none.
            callbacks: Optional function from inputs and labels to a list of
                callbacks.
            measure: Optional function from the trained model to a dict of
                further numbers.
            whole: Optional function from the rate to an optimizer, which then
                trains all of the model instead of an adapter.

        Returns:
            A dict of numbers.
        """
        keras.utils.set_random_seed(seed)
        if self.head:
            reset_head(self.model.get_layer(self.head), seed)
        x, y = self.examples(seed)
        flags = [layer.trainable for layer in self.model.layers]
        adapted = adapter is not None
        before = self.model.get_weights() if whole else None
        numbers = {}
        try:
            if adapted:
                report = kra.inject(
                    self.model,
                    adapter,
                    self.targets,
                    keep_trainable=self.head,
                )
                numbers["parameters"] = report.adapter_parameters
            else:
                for layer in self.model.layers:
                    layer.trainable = bool(whole) or layer.name == self.head
                numbers["parameters"] = _trained_parameters(
                    self.model, self.head
                )
            optimizer = whole(rate) if whole else self._optimizer(adapted, rate)
            self.model.compile(optimizer=optimizer, loss=self.loss())
            self.model.fit(
                x,
                **self.fit_arguments(y),
                epochs=self.epochs,
                batch_size=self.batch_size,
                verbose=0,
                callbacks=callbacks(x, y) if callbacks else None,
            )
            if not final:
                numbers["held_out"] = self.score(*self._held_out)
            else:
                numbers["train"] = self.score(x, y)
                numbers["test"] = self.score(*self._test)
                numbers["gap"] = numbers["train"] - numbers["test"]
            if final and measure:
                numbers.update(measure(self.model))
        finally:
            if kra.sites(self.model):
                kra.eject(self.model)
            for layer, flag in zip(self.model.layers, flags):
                layer.trainable = flag
            if whole:
                self.model.set_weights(before)
        return numbers

    def zero_shot(self):
        """The test score of the model without training."""
        return {"test": self.score(*self._test), "parameters": 0}

    def fit_arguments(self, y):
        return {"y": y}

    def pac_bayes(self, x, y, strength):
        """The PAC-Bayes callback for these training examples."""
        arguments = self.fit_arguments(y)
        return kra.callbacks.PACBayes(
            x, strength=strength, samples=self.pac_bayes_samples, **arguments
        )

    def loss(self):
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def _optimizer(self, adapted, rate):
        if not self.head or not adapted:
            return keras.optimizers.AdamW(rate)
        return kra.optimizers.learning_rate_groups(
            self.model, "adamw", adapter=rate, head=HEAD_RATE
        )


class SentenceTask(Task):
    """MiniLM with a head on the mean of its tokens."""

    head = classifier.HEAD

    def __init__(self, dataset, per_class, epochs, held_out=500, test=1000):
        super().__init__(per_class, epochs, held_out, test)
        self.dataset = dataset
        self.length = {"sst2": 32, "rt_polarity": 48}[dataset]

    def load(self):
        self.model, _, self._preprocessor = classifier.load(
            "minilm", 2, self.length
        )
        self._train, held_out, test = getattr(data, self.dataset)()
        self._held_out = self._prepared(held_out, self.held_out_size)
        self._test = self._prepared(test, self.test_size)

    def examples(self, seed):
        return self._prepared(data.few_shot(self._train, self.per_class, seed))

    def _prepared(self, split, size=None):
        texts, labels = split
        tokens = classifier.tokenize(self._preprocessor, texts[:size])
        return tokens, np.asarray(labels[:size])


class PromptTask(Task):
    """SmolLM2 answers a question for a sentiment with its next word.

    The 5 % of the texts whose prompts have more than 48 tokens are left out.
    """

    length = 48

    def __init__(self, per_class, epochs, held_out=150, test=300):
        super().__init__(per_class, epochs, held_out, test)

    def load(self):
        self.model = smollm2.word_classifier(
            smollm2.load(), smollm2.SENTIMENT_WORDS
        )
        self._train, held_out, test = map(self._short_ones, data.sst2())
        self._held_out = self._prepared(held_out, self.held_out_size)
        self._test = self._prepared(test, self.test_size)

    def examples(self, seed):
        return self._prepared(data.few_shot(self._train, self.per_class, seed))

    def _short_ones(self, split):
        prompts = smollm2.sentiment_prompts(split.inputs)
        kept = [
            i
            for i, ids in enumerate(smollm2.token_ids(prompts))
            if len(ids) <= self.length
        ]
        return data.Split([split.inputs[i] for i in kept], split.labels[kept])

    def _prepared(self, split, size=None):
        prompts = smollm2.sentiment_prompts(split.inputs[:size])
        return smollm2.tokenize(prompts, self.length), split.labels[:size]


class GenerationTask(Task):
    """SmolLM2 describes a restaurant; the score is nats a reference token.

    Scores are negative, so that larger is better. The tenth of the examples
    that have more than 96 tokens is left out.

    Args:
        examples: int. The number of training examples.
        epochs: int.
        held_out: int.
        test: int.
        label_smoothing: float. The label smoothing of the training loss.
        warmup: float. The share of the training in which the rate rises; it
            falls linearly afterwards. With 0 the rate is constant.
    """

    batch_size = 4
    length = 96
    # An epoch has as many examples, and an estimate costs as much as an epoch.
    pac_bayes_samples = 32
    score_columns = {
        "test": ("test nats a token", ".3f", -1),
        "gap": ("test minus train", ".3f", 1),
    }

    def __init__(
        self,
        examples,
        epochs,
        held_out=32,
        test=64,
        label_smoothing=0.0,
        warmup=0.0,
    ):
        super().__init__(examples, epochs, held_out, test)
        # The paper's recipe has a smoothing of 0.1 and a linear schedule that
        # begins with a warm-up, here a share of the training.
        self.label_smoothing = label_smoothing
        self.warmup = warmup

    def load(self):
        self.model = smollm2.load()
        self._train, held_out, test = map(self._short_ones, data.e2e())
        self._held_out = self._prepared(held_out, self.held_out_size)
        self._test = self._prepared(test, self.test_size)

    def examples(self, seed):
        return self._prepared(data.sample(self._train, self.per_class, seed))

    def loss(self):
        if self.label_smoothing:
            return recipe.SmoothedCrossentropy(
                self.label_smoothing, reduction="mean_with_sample_weight"
            )
        return keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        )

    def _optimizer(self, adapted, rate):
        if self.warmup:
            steps = math.ceil(self.per_class / self.batch_size) * self.epochs
            rate = recipe.LinearWarmup(rate, int(self.warmup * steps), steps)
        return super()._optimizer(adapted, rate)

    def fit_arguments(self, y):
        targets, weights = y
        return {"y": targets, "sample_weight": weights}

    def score(self, x, y):
        targets, weights = y
        total = 0.0
        for start in range(0, len(targets), self.batch_size):
            part = slice(start, start + self.batch_size)
            logits = self.model.predict_on_batch(
                {name: tensor[part] for name, tensor in x.items()}
            )
            nats = keras.losses.sparse_categorical_crossentropy(
                targets[part], logits, from_logits=True
            )
            total += float(
                np.sum(keras.ops.convert_to_numpy(nats) * weights[part])
            )
        return -total / float(np.sum(weights))

    def _short_ones(self, split):
        prompts = smollm2.description_prompts(split.inputs)
        pairs = zip(smollm2.token_ids(prompts), smollm2.token_ids(split.labels))
        kept = [
            i
            for i, (prompt, text) in enumerate(pairs)
            if len(prompt) + len(text) <= self.length
        ]
        return data.Split(
            [split.inputs[i] for i in kept], [split.labels[i] for i in kept]
        )

    def _prepared(self, split, size=None):
        x, y, weights = smollm2.completion_data(
            smollm2.description_prompts(split.inputs[:size]),
            split.labels[:size],
            self.length,
        )
        return x, (y, weights)


class PhotoTask(Task):
    """DINOv2-small on photographs of sign-language digits."""

    head = dinov2.HEAD

    def __init__(self, per_class, epochs, held_out=400, test=400):
        super().__init__(per_class, epochs, held_out, test)

    def load(self):
        self.model = dinov2.classifier(dinov2.load(data.IMAGE_SIZE), 10)
        self._train, held_out, test = data.sign_digits()
        self._held_out = self._prepared(held_out, self.held_out_size)
        self._test = self._prepared(test, self.test_size)

    def examples(self, seed):
        return self._prepared(data.few_shot(self._train, self.per_class, seed))

    def _prepared(self, split, size=None):
        images = dinov2.preprocess(split.inputs[:size])
        return {"images": images}, split.labels[:size]


def _trained_parameters(model, head):
    """The number of trained weights without the head's."""
    return sum(
        math.prod(variable.shape)
        for variable in model.trainable_variables
        if not variable.path.startswith(f"{head}/")
    )


def reset_head(layer, seed):
    """Gives a dense head initial weights that depend only on the seed."""
    generator = np.random.default_rng([7, seed])
    kernel = generator.normal(size=layer.kernel.shape) / np.sqrt(
        layer.kernel.shape[0]
    )
    layer.kernel.assign(kernel.astype("float32"))
    layer.bias.assign(np.zeros(layer.bias.shape, "float32"))


def accuracy(model, x, y):
    logits = model.predict(_padded(x), batch_size=EVALUATION_BATCH, verbose=0)
    return float(np.mean(np.argmax(logits[: len(y)], axis=-1) == y))


def _padded(x):
    """The inputs, padded to whole batches, for one compiled function."""

    def repeat_last(tensor):
        missing = -len(tensor) % EVALUATION_BATCH
        return np.concatenate([tensor, np.repeat(tensor[-1:], missing, 0)])

    return keras.tree.map_structure(repeat_last, x)
