"""The costs of the PAC-Bayes penalty: seconds and bytes of an estimation.

    KERAS_BACKEND=jax python benchmarks/pac_bayes.py     # one backend
    python benchmarks/pac_bayes.py --all                 # every backend

The model is a KerasHub BERT in the shape of MiniLM (6 layers of 384) with
random weights. Its head is trained and its query and value projections are
adapted, on random sentences of 64 tokens in batches of 16. An adapter is
trained without the callback, and then with it in each mode, for `--repeats`
epochs and two more, which compile. An estimation takes 100 examples. The table
has medians of the estimation's `costs` and of the time of the rest of its
epoch.
"""

import statistics
import time

import numpy as np
import side_by_side

COLUMNS = (
    ("adapter", "{}"),
    ("examples", "{:,}"),
    ("mode", "{}"),
    ("epoch without, s", "{:.2f}"),
    ("epoch with, estimation apart, s", "{:.2f}"),
    ("estimation, s", "{:.2f}"),
    ("of the epoch, %", "{:.0f}"),
    ("an estimation, MB", "{:.1f}"),
)
LENGTH = 64
BATCH = 16


def classifier(quick):
    import keras
    import keras_hub

    keras.utils.set_random_seed(0)
    size = dict(num_layers=1, num_heads=2, hidden_dim=32, intermediate_dim=32)
    if not quick:
        size = dict(
            num_layers=6, num_heads=12, hidden_dim=384, intermediate_dim=1536
        )
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=1000, max_sequence_length=LENGTH, dropout=0.0, **size
    )
    return keras_hub.models.BertTextClassifier(
        backbone, num_classes=2, preprocessor=None, dropout=0.0
    )


def examples(n):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 1000, (n, LENGTH), "int32")
    x = {
        "token_ids": ids,
        "segment_ids": np.zeros_like(ids),
        "padding_mask": np.ones_like(ids, "bool"),
    }
    return x, rng.integers(0, 2, n)


def fit(adapter, n, mode, arguments):
    """The seconds of all epochs but the first two, and the last callback."""
    import keras

    import keras_randadapt as kra

    model = classifier(arguments.quick)
    kra.inject(model, adapter, ["query", "value"], keep_trainable=["logits"])
    x, y = examples(n)
    seconds = []

    class Clock(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.started = time.perf_counter()

        def on_epoch_end(self, epoch, logs=None):
            seconds.append(time.perf_counter() - self.started)

    # The clock comes first, so that it stops before the estimation.
    callbacks = [Clock()]
    if mode is not None:
        callbacks.append(kra.callbacks.PACBayes(x, y, mode=mode))
    model.compile(
        keras.optimizers.AdamW(1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(
        x,
        y,
        batch_size=BATCH,
        epochs=arguments.repeats + 2,
        callbacks=callbacks,
        verbose=0,
    )
    return seconds[2:], callbacks[-1]


def rows(arguments):
    import keras_randadapt as kra

    n = 32 if arguments.quick else 200
    lines = (
        ("RLoRA(384)", lambda: kra.RLoRA(384), ("quadratic",)),
        ("LoRA(8)", lambda: kra.LoRA(8), ("quadratic", "diagonal")),
    )
    for name, make, modes in lines[:1] if arguments.quick else lines:
        plain, _ = fit(make(), n, None, arguments)
        for mode in modes:
            with_term, callback = fit(make(), n, mode, arguments)
            costs = callback.costs[2:]
            estimation = statistics.median(cost["seconds"] for cost in costs)
            rest = statistics.median(with_term)
            yield (
                name,
                n,
                mode,
                statistics.median(plain),
                rest,
                estimation,
                100 * estimation / rest,
                costs[-1]["bytes"] / 1e6,
            )


if __name__ == "__main__":
    side_by_side.main(
        __doc__,
        COLUMNS,
        rows,
        repeats=dict(type=int, default=3),
        quick=dict(action="store_true", help="a tiny model, to see it run"),
    )
